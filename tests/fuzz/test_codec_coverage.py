"""The unit tests of a codec reach every branch of it; what none reaches is dead or untested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 60

CODECS = {
    "wire/framing": "wire/test_framing*.py",
    "wire/manager_link": "wire/test_manager_link*.py",
    "wire/manager_link_peers": "wire/test_manager_link*.py",
    "wire/emulator": "wire/test_control_decoder.py",
    "wire/emulator_messages": "wire/test_emulator*.py",
    "wire/emulator_replies": "wire/test_emulator*.py",
    "wire/tpm_stream": "wire/test_tpm_stream.py",
    "tpm/event_log": "tpm/test_event_log.py",
    "tpm/pcr_prediction": "tpm/test_pcr_prediction.py",
    "tpm/authenticode": "tpm/test_authenticode.py",
    "recovery_key": "test_recovery_key.py",
    "vault/backup": "vault/test_backup.py",
    "vault/passphrase": "vault/test_passphrase.py",
    "vault/swtpm_blob": "vault/test_swtpm_blob.py",
    "vault/swtpm_state": "vault/test_swtpm_state.py",
}
"""Modules of vtpm, and their tests in tests/unit."""


def coverage(directory: Path, command: str, *arguments: str) -> None:
    """Run coverage.py without the project's settings, which count the whole package."""
    own = [f"--data-file={directory / 'data'}", "--rcfile=/dev/null"]
    done = subprocess.run(
        [sys.executable, "-m", "coverage", command, *own, *arguments],
        cwd=ROOT,
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(2 * LIMIT_S)
def test_every_branch_is_taken_when_the_unit_tests_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = ROOT / "tests" / "unit"
    tests = sorted({str(path) for glob in CODECS.values() for path in units.glob(glob)})
    include = ",".join(f"*/vtpm/{module}.py" for module in CODECS)
    pytest_arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    coverage(tmp_path, "run", "--branch", f"--include={include}", *pytest_arguments)
    coverage(tmp_path, "json", "-o", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    totals = report["totals"]
    with capsys.disabled():
        branches = f"{totals['covered_branches']} of {totals['num_branches']} branches"
        print(f"\ncodecs ({', '.join(CODECS)}): {totals['percent_covered']:.1f} % covered, {branches}")
    measured = {name.partition("vtpm/")[2].removesuffix(".py") for name in report["files"]}
    assert measured == set(CODECS)
    missing = {
        name: file["missing_lines"] + file["missing_branches"]
        for name, file in report["files"].items()
        if file["missing_lines"] or file["missing_branches"]
    }
    assert missing == {}
