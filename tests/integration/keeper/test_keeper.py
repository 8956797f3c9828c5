"""The keeper as a process: what it answers, to whom, and what it keeps to itself."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.keeper.conftest import Connect
from tests.support.processes import KeeperProcess, run_as_other_user
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import AccessDeniedError, PlatformTpmError, StateError, UnavailableError, VtpmError
from vtpm.tpm.types import VtpmId
from vtpm.wire.keeper import KEEPER_SOCKET, PlatformKind, Protection
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.service import MAX_PACKET_BYTES

pytestmark = pytest.mark.timeout(60)

Keep = Callable[[KeeperProcess], KeeperProcess]
OTHER_UID = 1987313999


@pytest.fixture
def keeper(directory: Path, swtpm: SwtpmPlatform, keepers: Keep) -> KeeperProcess:
    return keepers(KeeperProcess(directory, swtpm.tcti)).start()


def test_status_says_what_protects_the_root_key_when_hardware(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect
) -> None:
    status = connect(keeper).status()
    assert status.kind is PlatformKind.HARDWARE
    assert status.protection is Protection.SEALED
    assert status.tcti == swtpm.tcti
    assert status.manufacturer.startswith("IBM SWTPM")
    assert status.pcr_selection == "sha256:0,2,4,7"
    assert status.reachable
    (warning,) = status.warnings
    assert "PCRs 2, 4, 7" in warning


def test_key_is_the_same_when_unwrapped_after_a_restart(keeper: KeeperProcess, connect: Connect) -> None:
    vtpm_id = VtpmId(uuid4())
    client = connect(keeper)
    made = client.new_key(vtpm_id)
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key
    assert keeper.terminate() == 0
    keeper.start()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key
    os.kill(keeper.pid, signal.SIGKILL)
    keeper.wait()
    keeper.start()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key


def test_every_key_is_new_when_asked_again(keeper: KeeperProcess, connect: Connect) -> None:
    client = connect(keeper)
    made = [client.new_key(VtpmId(uuid4())) for _ in range(20)]
    assert len({key.key for key in made} | {key.wrapped for key in made}) == 40


def test_key_is_refused_when_it_is_another_vtpms_or_damaged(keeper: KeeperProcess, connect: Connect) -> None:
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    made = client.new_key(vtpm_id)
    with pytest.raises(StateError, match="does not open"):
        client.unwrap_key(VtpmId(uuid4()), made.wrapped)
    with pytest.raises(StateError):
        client.unwrap_key(vtpm_id, made.wrapped[:-1] + bytes([made.wrapped[-1] ^ 1]))
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key


def test_keys_still_unwrap_when_the_tpm_has_gone(keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect) -> None:
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    made = client.new_key(vtpm_id)
    swtpm.stop()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key
    status = client.status()
    assert not status.reachable
    assert "cannot be reached" in status.warnings[-1]
    swtpm.start()
    assert client.status().reachable


def test_status_answers_in_time_when_the_tpm_hangs(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect
) -> None:
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    os.kill(swtpm.pid, signal.SIGSTOP)
    assert not client.status().reachable
    assert "does not answer within" in client.status().warnings[-1]
    assert client.new_key(vtpm_id).key
    os.kill(swtpm.pid, signal.SIGCONT)


def test_status_and_keys_are_answered_in_time_when_many_calls_wait_for_a_tpm_that_hangs(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect
) -> None:
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    made = client.new_key(vtpm_id)
    os.kill(swtpm.pid, signal.SIGSTOP)

    def read() -> str:
        with contextlib.closing(KeeperClient(keeper.run_dir, timeout_s=30)) as other:
            try:
                other.read_anchor()
            except VtpmError as error:
                return error.message
        return ""

    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(read) for _ in range(12)]
        for _ in range(3):
            began = time.monotonic()
            assert not client.status().reachable
            assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key
            assert time.monotonic() - began < 1.5
        first = next(as_completed(waiting, timeout=15)).result()
        assert "an earlier call waits for it" in first
        os.kill(swtpm.pid, signal.SIGCONT)
        # The one that waited longest may have been given up; those after it hear the TPM.
        assert [answer.result(60) for answer in waiting].count("") >= 1
    assert client.status().reachable


def test_service_goes_on_when_its_session_and_terminal_end(keeper: KeeperProcess, connect: Connect) -> None:
    assert os.getsid(keeper.pid) == keeper.pid
    os.kill(keeper.pid, signal.SIGHUP)
    assert connect(keeper).status().reachable


def test_second_keeper_is_refused_when_one_runs(
    keeper: KeeperProcess, directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    second = keepers(KeeperProcess(directory, swtpm.tcti))
    assert second.run() == 4
    assert f"its pid is {keeper.pid}" in second.log
    assert connect(keeper).status().reachable


def test_second_keeper_is_refused_when_only_the_state_is_shared(
    keeper: KeeperProcess, directory: Path, swtpm: SwtpmPlatform, keepers: Keep
) -> None:
    (directory / "2").mkdir()
    second = keepers(KeeperProcess(directory / "2", swtpm.tcti, state_dir=keeper.state_dir))
    assert second.run() == 4
    assert f"its pid is {keeper.pid}" in second.log


def test_other_clients_go_on_when_one_sends_garbage(keeper: KeeperProcess, connect: Connect) -> None:
    good = connect(keeper)
    good.status()
    packets = (b"\0", b"{}", b"[" * 60000, b"\xff\xfe", b'{"id":1,"op":"status"}', b"x" * (MAX_PACKET_BYTES + 1))
    for packet in packets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.settimeout(10)
            raw.connect(str(keeper.run_dir / KEEPER_SOCKET))
            raw.send(packet)
            answer = raw.recv(MAX_PACKET_BYTES)
            assert answer == b"" or b'"code":"protocol"' in answer
        assert good.new_key(VtpmId(uuid4())).key


def test_operation_is_refused_when_descriptors_come_with_it(keeper: KeeperProcess, connect: Connect) -> None:
    before = len(list(Path(f"/proc/{keeper.pid}/fd").iterdir()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(10)
        raw.connect(str(keeper.run_dir / KEEPER_SOCKET))
        for number in range(5):
            socket.send_fds(raw, [b'{"id":%d,"op":"status","args":{}}' % number], [0, 1, 2])
            assert b'"code":"protocol"' in raw.recv(MAX_PACKET_BYTES)
        assert len(list(Path(f"/proc/{keeper.pid}/fd").iterdir())) <= before + 1


def test_peer_is_refused_when_it_is_not_the_manager(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    keeper = keepers(KeeperProcess(directory, swtpm.tcti, "--manager-uid", str(OTHER_UID))).start()
    path = keeper.run_dir / KEEPER_SOCKET
    path.chmod(0o666)  # so that it is the peer's user id alone that is looked at
    code = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
    raw.settimeout(10)
    raw.connect(sys.argv[1])
    try:
        raw.send(b'{"id":1,"op":"status","args":{}}')
        print(raw.recv(65536).decode() or "refused")
    except (BrokenPipeError, ConnectionResetError):
        print("refused")
"""
    assert run_as_other_user(code, [str(path)], OTHER_UID + 1).strip() == "refused"
    assert f"uid {OTHER_UID + 1 if os.geteuid() == 0 else os.geteuid()} may not use it" in keeper.log
    if os.geteuid() == 0:
        assert '"ok"' in run_as_other_user(code, [str(path)], OTHER_UID)


def test_process_hides_its_memory_when_it_has_dropped_privileges(
    directory: Path, keepers: Keep, connect: Connect
) -> None:
    is_root = os.geteuid() == 0
    uid = OTHER_UID if is_root else os.geteuid()
    keeper = keepers(KeeperProcess(directory, "embedded", "--uid", str(uid))).start()
    process = Path(f"/proc/{keeper.pid}")
    status = (process / "status").read_text()
    assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
    if is_root:
        assert f"Gid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        assert "CapEff:\t0000000000000000" in status
    # A process that is not dumpable shows its files in /proc as root's.
    assert (process / "environ").stat().st_uid == 0
    limits = (process / "limits").read_text()
    assert any(line.split()[4:6] == ["0", "0"] for line in limits.splitlines() if line.startswith("Max core"))
    assert (process / "comm").read_text() == "vtpm-keeper\n"
    assert keeper.root_file.stat().st_mode & 0o777 == 0o600
    assert connect(keeper).status().protection is Protection.UNPROTECTED


def test_no_key_is_in_the_log_when_everything_is_asked(keeper: KeeperProcess, connect: Connect) -> None:
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    made = client.new_key(vtpm_id)
    again = client.unwrap_key(vtpm_id, made.wrapped)
    with pytest.raises(StateError):
        client.unwrap_key(VtpmId(uuid4()), made.wrapped)
    assert keeper.terminate() == 0
    spellings = (made.key.hex(), base64.b64encode(made.key).decode(), repr(made.key), repr(made.key)[2:-1])
    for text in (keeper.log, repr(made), repr(again)):
        assert not any(spelling in text for spelling in spellings)


def test_directory_is_refused_when_others_may_write(directory: Path, swtpm: SwtpmPlatform, keepers: Keep) -> None:
    keeper = keepers(KeeperProcess(directory, swtpm.tcti))
    keeper.state_dir.mkdir()
    keeper.state_dir.chmod(0o777)
    assert keeper.run() == AccessDeniedError.exit_status
    assert "others may write" in keeper.log


@pytest.mark.parametrize("arguments", [("--pcrs", "sha1:0"), ("--pcrs", "sha256:99"), ("--gid", "5")])
def test_start_is_refused_when_a_setting_is_wrong(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, arguments: tuple[str, ...]
) -> None:
    keeper = keepers(KeeperProcess(directory, swtpm.tcti, *arguments))
    assert keeper.run() == 2
    assert not keeper.root_file.exists()


def test_start_fails_clearly_when_the_tpm_is_gone(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    keeper = keepers(KeeperProcess(directory, swtpm.tcti))
    swtpm.stop()
    assert keeper.run() == PlatformTpmError.exit_status
    assert swtpm.tcti in keeper.log
    assert "cannot be reached" in keeper.log
    assert not keeper.root_file.exists()
    with pytest.raises(UnavailableError):
        KeeperClient(keeper.run_dir).status()


def test_start_is_refused_when_no_boot_was_measured_and_the_operator_wants_one(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep
) -> None:
    keeper = keepers(KeeperProcess(directory, swtpm.tcti, "--pcrs", "sha256:2,4", "--zero-pcrs", "refuse"))
    assert keeper.run() == PlatformTpmError.exit_status
    assert "are all zero" in keeper.log


def test_keeper_ends_and_leaves_the_hardware_when_the_manager_asks(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect
) -> None:
    connect(keeper).end()
    assert keeper.wait() == 0
    swtpm.extend(9)  # it is still there
