from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.vault.swtpm_files import block, encrypted, headed, plain
from vtpm.errors import ConflictError, StateError, UsageError
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind, TpmVersion
from vtpm.vault.swtpm_blob import KeyFormat, SwtpmKey
from vtpm.vault.swtpm_state import SwtpmState, read_state

KEY = bytes(range(16))
RAW = SwtpmKey.from_key_file(KEY, KeyFormat.BINARY)
_HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "wb")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def lock_held(path: Path) -> Iterator[None]:
    """Another process holds the lock, for a lock of this process is none against it."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate(timeout=10)


def fill(directory: Path, **contents: bytes) -> Path:
    for name, content in contents.items():
        (directory / name.replace("__", ".").replace("_", "-")).write_bytes(content)
    return directory


def test_all_kinds_are_read_when_tpm_is_20_or_12(tmp_path: Path) -> None:
    for version, prefix in ((TpmVersion.V1_2, "tpm-00"), (TpmVersion.V2_0, "tpm2-00")):
        directory = tmp_path / prefix
        directory.mkdir()
        for suffix in ("permall", "volatilestate", "savestate"):
            (directory / f"{prefix}.{suffix}").write_bytes(plain(suffix.encode()))
        # What swtpm leaves behind and what others put there is not looked at.
        for other in (".lock", "TMP2-00.permall", "tpm2-00.permall.bak", "tpm2-01.permall"):
            (directory / other).write_bytes(b"?")
        assert read_state(directory) == SwtpmState(
            version,
            {
                StateKind.PERMANENT: b"permall",
                StateKind.VOLATILE: b"volatilestate",
                StateKind.SAVESTATE: b"savestate",
            },
        )


def test_state_is_not_shown_when_printed(tmp_path: Path) -> None:
    assert "secret" not in repr(read_state(fill(tmp_path, tpm2_00__permall=plain(b"secret state"))))


def test_nothing_is_changed_when_read(tmp_path: Path) -> None:
    fill(tmp_path, tpm2_00__permall=encrypted(b"state", KEY, KEY))
    before = sorted((path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    assert read_state(tmp_path, RAW).states == {StateKind.PERMANENT: b"state"}
    assert sorted((path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before


def test_file_is_named_when_one_of_them_is_damaged(tmp_path: Path) -> None:
    fill(tmp_path, tpm2_00__permall=plain(b"p"), tpm2_00__volatilestate=plain(b"v")[:-1])
    with pytest.raises(StateError, match=r"tpm2-00\.volatilestate is damaged"):
        read_state(tmp_path)


def test_file_is_named_when_one_of_them_is_plain_and_the_others_encrypted(tmp_path: Path) -> None:
    fill(tmp_path, tpm2_00__permall=encrypted(b"p", KEY, KEY), tpm2_00__volatilestate=plain(b"v"))
    with pytest.raises(StateError, match=r"tpm2-00\.volatilestate is not encrypted"):
        read_state(tmp_path, RAW)
    with pytest.raises(UsageError, match=r"tpm2-00\.permall is encrypted"):
        read_state(tmp_path)


def test_cause_is_named_when_there_is_no_or_no_clear_state(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no state of swtpm.*tpm2 or tpm1\.2"):
        read_state(tmp_path)
    fill(tmp_path, tpm2_00__volatilestate=plain(b"v"))
    with pytest.raises(StateError, match=r"tpm2-00\.permall is missing.*\.bak"):
        read_state(tmp_path)
    fill(tmp_path, tpm2_00__permall=plain(b"p"), tpm_00__permall=plain(b"p"))
    with pytest.raises(StateError, match=r"both a TPM 1\.2 and a TPM 2\.0"):
        read_state(tmp_path)


def test_cause_is_named_when_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_state(tmp_path / "absent")
    file = fill(tmp_path, file=b"") / "file"
    with pytest.raises(UsageError, match="Not a directory"):
        read_state(file)


def test_refused_when_state_is_a_link_a_pipe_or_a_folder(tmp_path: Path) -> None:
    state = tmp_path / "tpm2-00.permall"
    fill(tmp_path, elsewhere=plain(b"p"))
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="cannot be read"):
        read_state(tmp_path)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(StateError, match="no regular file"):
        read_state(tmp_path)
    state.unlink()
    state.mkdir()
    with pytest.raises(StateError, match="no regular file"):
        read_state(tmp_path)


def test_refused_and_not_read_whole_when_file_is_huge(tmp_path: Path) -> None:
    with open(tmp_path / "tpm2-00.permall", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StateError, match="bytes are no state"):
        read_state(tmp_path)
    fill(tmp_path, tpm2_00__permall=headed(block(1, bytes(MAX_STATE_BYTES))))
    assert len(read_state(tmp_path).states[StateKind.PERMANENT]) == MAX_STATE_BYTES


def test_refused_when_another_process_holds_the_lock(tmp_path: Path) -> None:
    fill(tmp_path, tpm2_00__permall=plain(b"p"))
    with lock_held(tmp_path / ".lock"), pytest.raises(ConflictError, match="in use by a running swtpm"):
        read_state(tmp_path)
    assert read_state(tmp_path).states == {StateKind.PERMANENT: b"p"}


def test_lock_is_held_while_files_are_read_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, tpm2_00__permall=plain(b"p"), __lock=b"")
    held = []

    def probe(*arguments: object) -> bytes:
        held.append(_locked_for_others(tmp_path / ".lock"))
        return b"p"

    monkeypatch.setattr("vtpm.vault.swtpm_state.open_blob", probe)
    read_state(tmp_path)
    assert held == [True]
    assert not _locked_for_others(tmp_path / ".lock")


def _locked_for_others(path: Path) -> bool:
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 or "BlockingIOError" in done.stderr
    return done.returncode != 0


def test_lock_file_is_refused_when_it_is_a_link(tmp_path: Path) -> None:
    fill(tmp_path, tpm2_00__permall=plain(b"p"))
    (tmp_path / ".lock").symlink_to("/dev/null")
    with pytest.raises(StateError, match=r"\.lock cannot be read"):
        read_state(tmp_path)


def test_no_descriptor_is_left_open_when_read_or_refused(tmp_path: Path) -> None:
    fill(tmp_path, tpm2_00__permall=plain(b"p"), __lock=b"")
    before = len(os.listdir("/proc/self/fd"))
    read_state(tmp_path)
    os.mkfifo(tmp_path / "tpm2-00.savestate")
    with pytest.raises(StateError):
        read_state(tmp_path)
    with lock_held(tmp_path / ".lock"), pytest.raises(ConflictError):
        read_state(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
