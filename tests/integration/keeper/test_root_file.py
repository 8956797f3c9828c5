"""The root file: whole or not at all, never replaced, refused when anything about it is wrong."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.keeper.conftest import Connect
from tests.support.processes import KeeperProcess
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError, StateError
from vtpm.keeper.root_key import ROOT_FILE, NewRoot, open_root_key
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import ZeroPcrs
from vtpm.platform_tpm.sealed_blob import SealedBlob
from vtpm.recovery_key import RecoveryKey
from vtpm.tpm.types import VtpmId
from vtpm.wire.keeper import AnchorState
from vtpm.wire.keeper_client import KeeperClient

pytestmark = pytest.mark.timeout(60)

Keep = Callable[[KeeperProcess], KeeperProcess]
KILLS = 10


@pytest.fixture
def keeper(directory: Path, swtpm: SwtpmPlatform, keepers: Keep) -> KeeperProcess:
    return keepers(KeeperProcess(directory, swtpm.tcti))


def check_locked(client: KeeperClient, why: str) -> None:
    """The keeper says why the root key is locked, and does nothing that needs it."""
    status = client.status()
    assert why in status.locked
    assert status.locked_next_step
    for ask in (
        lambda: client.new_key(VtpmId(uuid4())),
        lambda: client.unwrap_key(VtpmId(uuid4()), bytes(109)),
        client.anchor_key,
        client.channel_key,
        client.read_anchor,
        lambda: client.write_anchor(AnchorState(1, bytes(32))),
        client.policy,
        lambda: client.policy_drop("set-up"),
        client.new_recovery_key,
        lambda: client.confirm_recovery_key(RecoveryKey.generate().public.to_text()),
        client.recovery_public_key,
    ):
        with pytest.raises((PlatformTpmError, StateError), match=re.escape(why)):
            ask()


def test_root_key_is_locked_when_pcrs_changed(keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect) -> None:
    keeper.start().terminate()
    before = keeper.root_file.read_bytes()
    swtpm.extend(7)
    check_locked(connect(keeper.start()), "PCRs changed in bank sha256: 7")
    assert keeper.root_file.read_bytes() == before


def test_root_key_is_locked_when_the_tpm_is_another(
    keeper: KeeperProcess, directory: Path, keepers: Keep, connect: Connect
) -> None:
    keeper.start().terminate()
    before = keeper.root_file.read_bytes()
    (directory / "other").mkdir()
    with SwtpmPlatform(directory / "other") as other:
        other.extend(0, "firmware")
        second = keepers(KeeperProcess(directory, other.tcti)).start()
        check_locked(connect(second), "is not the one that the root key was sealed by")
    assert keeper.root_file.read_bytes() == before


def test_root_key_keeps_its_pcrs_when_the_setting_changes(
    keeper: KeeperProcess, directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    keeper.start().terminate()
    second = keepers(KeeperProcess(directory, swtpm.tcti, "--pcrs", "sha256:0")).start()
    status = connect(second).status()
    assert status.pcr_selection == "sha256:0,2,4,7"
    assert "not sha256:0" in status.warnings[-1]


def damaged_files(good: bytes) -> list[bytes]:
    """Return the file with each field damaged in its own ways, and other things that are no root file."""
    fields = json.loads(good)
    damaged = []
    for name, value in fields.items():
        doubled = value * 2 if not isinstance(value, dict) else value | {"handle": value["handle"] * 2}
        values: list[object] = [None, "", 7, [], {}, doubled if name != "version" else 3]
        if isinstance(value, str):
            values += [value[:-1], value[:-2], value.upper() + "A"]
            values += [value[:at] + ("1" if value[at] != "1" else "2") + value[at + 1 :] for at in range(len(value))]
        if isinstance(value, dict):
            values += [value | {"handle": other} for other in (0, value["handle"] ^ 1, "", 0x01000000)]
            values += [value | {"name": other} for other in ("", 7, value["name"][:-2], "00" + value["name"][2:])]
            values += [value | {"more": 1}, {"handle": value["handle"]}]
        if name == "lists":
            [[one]] = value
            pcrs = one["values"]
            values += [[[]], [[one, one]], [[one], [one], [one]], [[one] * 9], [one], [[[one]]]]
            values += [[[one | {"values": other}]] for other in (pcrs[:-1], [*pcrs[:3], "ff" * 32], [], 7, [7] * 4)]
            values += [[[one | {"pcrs": other}]] for other in ("sha256:0,2,4,8", "sha1:0,2,4,7", "", 7)]
            values += [[[one | {"label": other}]] for other in ("", "\n", "x" * 65, 7)] + [[[one | {"more": 1}]]]
        for other in values:
            changed = json.dumps(fields | {name: other}, sort_keys=True, separators=(",", ":")).encode() + b"\n"
            damaged.append(changed)
        without = {key: kept for key, kept in fields.items() if key != name}
        damaged.append(json.dumps(without, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    damaged += [b"", good[:-1], good + b"\n", good[: len(good) // 2], b" " + good, good.replace(b":", b": ", 1)]
    damaged += [json.dumps(fields | {"more": 1}, sort_keys=True, separators=(",", ":")).encode() + b"\n"]
    damaged += [b"\0" * len(good), b"[" * 16000, b"x" * 100_000]
    return damaged


def test_root_file_is_refused_and_kept_when_any_field_is_damaged(directory: Path, swtpm: SwtpmPlatform) -> None:
    path = directory / ROOT_FILE
    with PlatformTpm(swtpm.tcti) as tpm:
        root = open_root_key(directory, tpm, NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
        good = path.read_bytes()
        for damaged in damaged_files(good):
            if damaged == good:
                continue
            path.write_bytes(damaged)
            with pytest.raises((StateError, PlatformTpmError), match="does not open"):
                open_root_key(directory, tpm, NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
            assert path.read_bytes() == damaged
        path.write_bytes(good)
        opened = open_root_key(directory, tpm, NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
        assert opened.secret.reveal() == root.secret.reveal()


def test_root_file_is_refused_when_it_is_a_link_or_a_folder(directory: Path, swtpm: SwtpmPlatform) -> None:
    path = directory / ROOT_FILE
    with PlatformTpm(swtpm.tcti) as tpm:
        path.symlink_to(directory / "nowhere")
        with pytest.raises(StateError, match="cannot be read"):
            open_root_key(directory, tpm, NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
        path.unlink()
        path.mkdir()
        with pytest.raises(StateError, match="cannot be read"):
            open_root_key(directory, tpm, NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))


@pytest.mark.parametrize(
    ("step", "call"),
    [("file fsync", "os.fsync"), ("link", "os.link"), ("unlink", "pathlib.Path.unlink"), ("folder fsync", "os.fsync")],
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_root_file_is_whole_or_absent_when_killed_at_a_step(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect, step: str, call: str, side: str
) -> None:
    module, _, name = call.rpartition(".")
    # The keeper's own module is the only caller that counts: others may use the same functions.
    prelude = f"""
import os, pathlib, signal, sys
real, seen = {call}, 0
def deadly(*args, **kwargs):
    global seen
    if sys._getframe(1).f_code.co_filename.endswith(("root_key.py", "durable_file.py")):
        seen += 1
        if seen == {2 if step in ("folder fsync", "unlink") else 1}:
            if {side == "after"}:
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{module}.{name} = deadly
"""
    doomed = keepers(KeeperProcess(directory, swtpm.tcti, prelude=prelude))
    assert doomed.run() == -signal.SIGKILL
    appeared = doomed.root_file.read_bytes() if doomed.root_file.exists() else None
    assert (appeared is not None) == (step in ("unlink", "folder fsync") or (step, side) == ("link", "after"))
    keeper = keepers(KeeperProcess(directory, swtpm.tcti)).start()
    if appeared is not None:
        SealedBlob.from_bytes(appeared)
        assert keeper.root_file.read_bytes() == appeared
    assert connect(keeper).new_key(VtpmId(uuid4())).key
    # What the first start had made in the TPM is in use or gone.
    listed = subprocess.run(
        ["tpm2_getcap", "-T", swtpm.tcti, "handles-nv-index"], check=True, timeout=10, capture_output=True, text=True
    )
    assert len(listed.stdout.splitlines()) == 2
    assert not keeper.root_file.with_name("root.sealed.new").exists()


def test_root_file_is_whole_or_absent_when_killed_at_random_moments(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    seed = 20261124
    dice = random.Random(seed)
    began = time.monotonic()
    (directory / "first").mkdir()
    keepers(KeeperProcess(directory / "first", swtpm.tcti)).start().stop()
    start_s = time.monotonic() - began
    for number in range(KILLS):
        (directory / str(number)).mkdir()
        keeper = keepers(KeeperProcess(directory / str(number), swtpm.tcti))
        keeper.spawn()
        # The moment is random on purpose; there is no event to wait for.
        time.sleep(dice.uniform(0.5, 1.1) * start_s)
        os.kill(keeper.pid, signal.SIGKILL)
        keeper.wait()
        appeared = keeper.root_file.read_bytes() if keeper.root_file.exists() else None
        keeper.start()
        assert appeared in (None, keeper.root_file.read_bytes()), f"seed {seed}, kill {number}"
        assert connect(keeper).new_key(VtpmId(uuid4())).key
        keeper.stop()
