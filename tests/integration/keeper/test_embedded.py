"""The embedded TPM: made once, never blank again, durable before it answers; found again by the keeper."""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2B_AUTH,
    TPM2B_NV_PUBLIC,
    TPMA_NV,
    TPMS_NV_PUBLIC,
    TSS2_Exception,
)

from tests.integration.keeper.conftest import Connect
from tests.support.processes import EmbeddedTpmProcess, KeeperProcess, run_as_other_user
from vtpm.errors import ConflictError, PlatformTpmError, StateError, StoreError
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.types import VtpmId
from vtpm.wire.emulator import Command, Plain, SetLocality, encode_reply, encode_request, error_reply
from vtpm.wire.keeper import PlatformKind, Protection

pytestmark = pytest.mark.timeout(60)

Keep = Callable[[KeeperProcess], KeeperProcess]
NV_INDEX = 0x01800001
NV_BYTES = 8
KILLS = 8


def state_file(tpm: EmbeddedTpmProcess) -> Path:
    return tpm.directory / "embedded-tpm" / "state"


def define_nv(tpm: EmbeddedTpmProcess) -> None:
    attributes = TPMA_NV.OWNERWRITE | TPMA_NV.OWNERREAD | TPMA_NV.NO_DA
    public = TPMS_NV_PUBLIC(nvIndex=NV_INDEX, nameAlg=TPM2_ALG.SHA256, attributes=attributes, dataSize=NV_BYTES)
    with ESAPI(tpm.tcti) as esapi:
        handle = esapi.nv_define_space(TPM2B_AUTH(), TPM2B_NV_PUBLIC(nvPublic=public))
        esapi.nv_write(handle, bytes(NV_BYTES), auth_handle=ESYS_TR.OWNER)


def read_nv(tpm: EmbeddedTpmProcess) -> int:
    with ESAPI(tpm.tcti) as esapi:
        handle = esapi.tr_from_tpmpublic(NV_INDEX)
        return int.from_bytes(bytes(esapi.nv_read(handle, NV_BYTES, auth_handle=ESYS_TR.OWNER)), "big")


def write_nv_until_killed(tpm: EmbeddedTpmProcess, start: int, kill_after_s: float) -> int:
    """Write counting numbers, kill the TPM at a moment of its own, and return the last that was answered."""
    assert tpm.process is not None
    answered = start
    killer = threading.Timer(kill_after_s, os.kill, (tpm.process.pid, signal.SIGKILL))
    with ESAPI(tpm.tcti) as esapi:
        handle = esapi.tr_from_tpmpublic(NV_INDEX)
        killer.start()
        with pytest.raises(TSS2_Exception):
            while True:
                esapi.nv_write(handle, (answered + 1).to_bytes(NV_BYTES, "big"), auth_handle=ESYS_TR.OWNER)
                answered += 1
    killer.join()
    tpm.stop()
    return answered


def test_answered_writes_are_there_when_killed_at_random_moments(directory: Path) -> None:
    seed = 20261124
    dice = random.Random(seed)
    tpm = EmbeddedTpmProcess(directory)
    with tpm:
        define_nv(tpm)
        value = 0
        for number in range(KILLS):
            answered = write_nv_until_killed(tpm, value, dice.uniform(0.02, 0.12))
            assert answered > value
            tpm.start()
            value = read_nv(tpm)
            # The write that was cut off may have been made durable before it could be answered.
            assert value in (answered, answered + 1), f"seed {seed}, kill {number}"


def test_write_is_not_answered_when_the_disk_is_full(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        define_nv(tpm)
    before = state_file(tpm).read_bytes()
    most = len(before) // 2

    def small_files() -> None:
        # Python ignores SIGXFSZ, so that a write beyond the limit fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    assert "cannot be written" in tpm.launch(preexec=small_files)
    assert tpm.wait() != 0
    assert state_file(tpm).read_bytes() == before
    with tpm:
        assert read_nv(tpm) == 0


def test_write_is_not_answered_when_the_store_fails_later(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        define_nv(tpm)
        assert tpm.process is not None
        with ESAPI(tpm.tcti) as esapi:
            handle = esapi.tr_from_tpmpublic(NV_INDEX)
            most = len(state_file(tpm).read_bytes()) // 2  # and more than the log takes
            resource.prlimit(tpm.process.pid, resource.RLIMIT_FSIZE, (most, most))
            with pytest.raises(TSS2_Exception, match="IO failure"):
                esapi.nv_write(handle, b"\1" * NV_BYTES, auth_handle=ESYS_TR.OWNER)
        assert tpm.wait() == StoreError.exit_status
        tpm.start()
        assert read_nv(tpm) == 0


def test_no_tpm_is_made_when_the_state_is_missing(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        define_nv(tpm)
    kept = state_file(tpm).rename(directory / "kept")
    for _ in range(2):
        assert "is missing" in tpm.launch()
        assert tpm.wait() == StateError.exit_status
        assert not state_file(tpm).exists()
    kept.rename(state_file(tpm))
    with tpm:
        assert read_nv(tpm) == 0


@pytest.mark.parametrize("marked", [True, False])
def test_state_is_refused_and_kept_when_damaged(directory: Path, marked: bool) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        define_nv(tpm)
    good = state_file(tpm).read_bytes()
    if not marked:
        (state_file(tpm).parent / "initialised").unlink()
    flips = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (0, 15, 16, 47, 48, len(good) - 1)]
    for damaged in [b"", good[:20], good[:48], good[:-1], good + b"\0", *flips]:
        state_file(tpm).write_bytes(damaged)
        assert "is damaged" in tpm.launch()
        assert tpm.wait() == StateError.exit_status
        assert state_file(tpm).read_bytes() == damaged
    state_file(tpm).write_bytes(good)
    with tpm:
        assert read_nv(tpm) == 0


def test_tpm_is_the_same_when_killed_between_manufacture_and_marker(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        define_nv(tpm)
    marker = state_file(tpm).parent / "initialised"
    marker.unlink()
    with tpm:
        assert read_nv(tpm) == 0
        assert marker.exists()


def test_second_process_is_refused_when_one_runs(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        second = EmbeddedTpmProcess(directory)
        assert "already serves" in second.launch()
        assert second.wait() == ConflictError.exit_status
        with PlatformTpm(tpm.tcti) as platform:
            assert platform.random(8)


def test_orderly_end_is_clean_when_asked(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        assert tpm.process is not None
        tpm.process.terminate()
        assert tpm.wait() == 0
        assert Path(f"{tpm.socket_path}").stat().st_mode & 0o777 == 0o600
        tpm.start()


def control(tpm: EmbeddedTpmProcess, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(f"{tpm.socket_path}.ctrl")
        sock.sendall(request)
        return sock.recv(4096)


def test_control_channel_refuses_all_but_what_a_tcti_needs(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm:
        assert control(tpm, encode_request(SetLocality(0))) == encode_reply(Command.SET_LOCALITY)
        assert control(tpm, encode_request(SetLocality(4))) == error_reply(Command.SET_LOCALITY, 0x3D)
        cancel = encode_request(Plain(Command.CANCEL_TPM_CMD))
        assert control(tpm, cancel) == encode_reply(Command.CANCEL_TPM_CMD)
        assert control(tpm, encode_request(Plain(Command.GET_CAPABILITY)))[:4] == bytes(4)
        for command in (Command.STOP, Command.SHUTDOWN, Command.STORE_VOLATILE, Command.HASH_START):
            assert control(tpm, encode_request(Plain(command))) == error_reply(command, 0xA)
        assert control(tpm, b"\0\0\0\xee")[:4] != bytes(4)
        with PlatformTpm(tpm.tcti) as platform:
            assert platform.random(8)


def test_other_clients_go_on_when_one_sends_garbage(directory: Path) -> None:
    with EmbeddedTpmProcess(directory) as tpm, PlatformTpm(tpm.tcti) as platform:
        for garbage in (b"\xff" * 100, b"\x80\x01\xff\xff\xff\xff", bytes.fromhex("0000000804") + b"\0" * 20):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(10)
                sock.connect(str(tpm.socket_path))
                sock.sendall(garbage)
                assert sock.recv(4096) == b""
            assert platform.random(8)


def test_keeper_starts_the_embedded_tpm_when_it_is_not_there(directory: Path, keepers: Keep, connect: Connect) -> None:
    keeper = keepers(KeeperProcess(directory, "embedded")).start()
    client = connect(keeper)
    status = client.status()
    assert status.kind is PlatformKind.EMBEDDED
    assert status.protection is Protection.UNPROTECTED
    assert "UNPROTECTED" in status.warnings[0]
    assert status.reachable
    pid = int((keeper.run_dir / "embedded-tpm" / "tpm.lock").read_text())
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"vtpm-embedded-tpm\0")
    assert os.getsid(pid) == pid


def test_keys_survive_when_keeper_and_embedded_tpm_are_killed(directory: Path, keepers: Keep, connect: Connect) -> None:
    keeper = keepers(KeeperProcess(directory, "embedded")).start()
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    made = client.new_key(vtpm_id)
    lock = keeper.run_dir / "embedded-tpm" / "tpm.lock"
    first_pid = int(lock.read_text())

    os.kill(keeper.pid, signal.SIGKILL)
    keeper.wait()
    keeper.start()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key
    assert int(lock.read_text()) == first_pid  # it has outlived the keeper

    keeper.stop_embedded()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key
    assert client.status().reachable  # the keeper has started it again
    assert int(lock.read_text()) != first_pid

    keeper.stop()
    keeper.start()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key


def test_keeper_refuses_when_the_embedded_tpms_state_is_gone(directory: Path, keepers: Keep, connect: Connect) -> None:
    keeper = keepers(KeeperProcess(directory, "embedded")).start()
    keeper.stop()
    root = keeper.root_file.read_bytes()
    state = keeper.state_dir / "embedded-tpm" / "state"
    state.unlink()
    assert keeper.run() == PlatformTpmError.exit_status
    assert "a new one is not made" in keeper.log
    # Even with every trace of the old TPM removed, a new one cannot pass for it.
    (state.parent / "initialised").unlink()
    assert "is not the one that the root key was sealed by" in connect(keeper.start()).status().locked
    assert keeper.root_file.read_bytes() == root


def test_embedded_tpm_ends_when_its_keeper_is_long_gone_and_it_is_told(directory: Path, keepers: Keep) -> None:
    keeper = keepers(KeeperProcess(directory, "embedded")).start()
    assert keeper.terminate() == 0
    pid = int((keeper.run_dir / "embedded-tpm" / "tpm.lock").read_text())
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)


def test_both_end_in_order_when_the_manager_asks(directory: Path, keepers: Keep, connect: Connect) -> None:
    keeper = keepers(KeeperProcess(directory, "embedded")).start()
    client, vtpm_id = connect(keeper), VtpmId(uuid4())
    made = client.new_key(vtpm_id)
    pidfd = os.pidfd_open(int((keeper.run_dir / "embedded-tpm" / "tpm.lock").read_text()))
    client.end()
    assert keeper.wait() == 0
    assert select.select([pidfd], [], [], 0)[0], "the embedded TPM still runs"
    os.close(pidfd)
    keeper.start()
    assert client.unwrap_key(vtpm_id, made.wrapped).key == made.key


def test_keeper_serves_another_user_when_started_in_roots_run_directory(directory: Path, keepers: Keep) -> None:
    is_root = os.geteuid() == 0
    manager_uid, keeper_uid = (1987313665, 1987313666) if is_root else (os.geteuid(), os.geteuid())
    keeper = keepers(
        KeeperProcess(
            directory,
            "embedded",
            *("--manager-uid", str(manager_uid), "--uid", str(keeper_uid), "--gid", str(keeper_uid)),
        )
    )
    keeper.run_dir.mkdir(mode=0o755)
    keeper.state_dir.mkdir(mode=0o700)
    os.chown(keeper.state_dir, keeper_uid, -1)
    code = """
import sys, uuid
from pathlib import Path
from vtpm.wire.keeper_client import KeeperClient
client = KeeperClient(Path(sys.argv[1]))
vtpm_id = uuid.uuid4()
made = client.new_key(vtpm_id)
print(client.unwrap_key(vtpm_id, made.wrapped).key == made.key, client.status().reachable)
"""
    for _ in range(2):
        keeper.start()
        assert run_as_other_user(code, [str(keeper.run_dir)], manager_uid).split() == ["True", "True"]
        socket_status = (keeper.run_dir / "keeper.sock").stat()
        assert (socket_status.st_uid, socket_status.st_mode & 0o777) == (manager_uid, 0o600)
        assert keeper.root_file.stat().st_uid == keeper_uid
        assert keeper.terminate() == 0
