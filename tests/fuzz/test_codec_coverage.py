"""How much of each codec the tests reach: its unit tests every branch, and its fuzz tests what is written down here.

What no unit test reaches is dead or untested; what no fuzz test reaches has met nothing but what somebody thought of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 60


@dataclass(frozen=True)
class HeldBy:
    """Tests of a codec: a pattern in tests/unit, a name in tests/fuzz, and the least share of branches in percent that
    the fuzz tests take; the rest is held by the unit tests alone.
    """

    unit: str
    fuzz: str
    least_fuzzed: int = 100


CODECS = {
    "wire/framing": HeldBy("wire/test_framing*.py", "framing", 85),
    "wire/fields": HeldBy("wire/test_m*.py", "manager_link", 60),
    "wire/message_codec": HeldBy("wire/test_manager_link*.py", "manager_link", 85),
    "wire/manager_link": HeldBy("wire/test_manager_link*.py", "manager_link", 70),
    "wire/manager_link_peers": HeldBy("wire/test_manager_link*.py", "manager_link", 95),
    "wire/manager_link_moves": HeldBy("wire/test_manager_link_moves.py", "manager_link", 75),
    "wire/guest_port": HeldBy("wire/test_guest_port.py", "guest_port", 75),
    "wire/evidence": HeldBy("wire/test_evidence.py", "evidence", 60),
    "wire/migration": HeldBy("wire/test_migration.py", "migration"),
    "wire/launcher_port": HeldBy("wire/test_launcher_port.py", "launcher_port"),
    "wire/emulator": HeldBy("wire/test_control_decoder.py", "emulator", 95),
    "wire/emulator_messages": HeldBy("wire/test_emulator*.py", "emulator", 85),
    "wire/emulator_replies": HeldBy("wire/test_emulator*.py", "emulator", 90),
    "wire/tpm_stream": HeldBy("wire/test_tpm_stream.py", "tpm_stream", 95),
    "wire/xen_ring": HeldBy("wire/test_xen_ring.py", "xen_ring", 85),
    "wire/xenbus": HeldBy("wire/test_xenbus.py", "xenbus", 80),
    "wire/hold": HeldBy("wire_hold/test_hold.py", "hold"),
    "wire/service": HeldBy("wire_service/test_service.py", "service"),
    "wire/service_codec": HeldBy("wire_service/test_service.py", "service", 90),
    "guest_link/journal": HeldBy("guest_link/test_*.py", "journal", 60),
    "tpm/attest": HeldBy("tpm/test_attest.py", "attest", 25),
    "tpm/structure": HeldBy("tpm/test_attest.py", "attest", 90),
    "tpm/credential": HeldBy("tpm/test_credential.py", "attest", 45),
    "tpm/event_log": HeldBy("tpm/test_event_log.py", "event_log", 75),
    "tpm/launch_log": HeldBy("tpm/test_launch_log.py", "launch_log", 80),
    "tpm/pcr_prediction": HeldBy("tpm/test_pcr_prediction.py", "event_log", 75),
    "tpm/authenticode": HeldBy("tpm/test_authenticode.py", "authenticode", 80),
    "peers/answers": HeldBy("peers/test_answers.py", "answers", 90),
    "recovery_key": HeldBy("test_recovery_key.py", "backup", 75),
    "vault/backup": HeldBy("vault/test_backup.py", "backup", 55),
    "vault/passphrase": HeldBy("vault/test_passphrase.py", "backup", 50),
    "vault/swtpm_blob": HeldBy("vault/test_swtpm_blob.py", "swtpm", 75),
    "vault/swtpm_state": HeldBy("vault/test_swtpm_state.py", "swtpm"),
}
"""Modules of vtpm."""


@dataclass(frozen=True)
class Reached:
    """Branches of one module, those taken, and the lines and branches that were not."""

    branches: int
    taken: int
    missing: list[object]

    @property
    def percent(self) -> float:
        return 100 * self.taken / self.branches if self.branches else 100.0


def _coverage(directory: Path, command: str, *arguments: str) -> None:
    """Run coverage.py without the project's settings, which count the whole package."""
    environment = os.environ | {"VTPM_FUZZ_TRACED": "1"}
    # A soak draws at random, and what is reached must not depend on luck.
    environment.pop("VTPM_FUZZ_EXAMPLES", None)
    own = [f"--data-file={directory / 'data'}", "--rcfile=/dev/null"]
    done = subprocess.run(
        [sys.executable, "-m", "coverage", command, *own, *arguments],
        cwd=ROOT,
        env=environment,
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _reached(directory: Path, tests: Iterable[Path]) -> dict[str, Reached]:
    """Run tests and return what they reached of each codec."""
    include = ",".join(f"*/vtpm/{module}.py" for module in CODECS)
    pytest_arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted({str(path) for path in tests})]
    _coverage(directory, "run", "--branch", f"--include={include}", *pytest_arguments)
    _coverage(directory, "json", "-o", str(directory / "report.json"))
    report = json.loads((directory / "report.json").read_text())
    reached = {
        name.partition("vtpm/")[2].removesuffix(".py"): Reached(
            file["summary"]["num_branches"],
            file["summary"]["covered_branches"],
            file["missing_lines"] + file["missing_branches"],
        )
        for name, file in report["files"].items()
    }
    assert set(reached) == set(CODECS)
    return reached


def _print(capsys: pytest.CaptureFixture[str], by: str, reached: dict[str, Reached]) -> None:
    with capsys.disabled():
        print(f"\nbranches taken by the {by} tests:")
        for module in CODECS:
            one = reached[module]
            print(f"  {module:<24} {one.taken:>3} of {one.branches:<3} {one.percent:5.1f} %")


@pytest.mark.timeout(2 * LIMIT_S)
def test_every_branch_is_taken_when_the_unit_tests_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = ROOT / "tests" / "unit"
    reached = _reached(tmp_path, (path for tests in CODECS.values() for path in units.glob(tests.unit)))
    _print(capsys, "unit", reached)
    assert {module: one.missing for module, one in reached.items() if one.missing} == {}


@pytest.mark.timeout(2 * LIMIT_S)
def test_each_codec_is_fuzzed_as_far_as_promised_when_the_fuzz_tests_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(__file__).parent
    reached = _reached(tmp_path, (folder / f"test_{tests.fuzz}_fuzz.py" for tests in CODECS.values()))
    _print(capsys, "fuzz", reached)
    short = {module: one.missing for module, one in reached.items() if one.percent < CODECS[module].least_fuzzed}
    assert short == {}
