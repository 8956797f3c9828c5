"""The control channel of a real vtpmd beside Debian's swtpm: the same answers, but for the ones listed here."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fuzz.control_driver import QEMU_PADDING, ControlClient, Exchange, ask_all, debian_swtpm, differences
from tests.support.host import Host
from vtpm.tpm.types import StateKind
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Plain,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
)

BAD_ORDINAL = 0x00A
WITHOUT_POWER = {
    # swtpm answers all of these with TPM_BAD_ORDINAL while it is not initialised.
    Command.GET_TPMESTABLISHED: (0x000, "cloud-hypervisor asks before INIT"),
    Command.CANCEL_TPM_CMD: (0x000, "nothing runs, so nothing is left to cancel"),
    Command.STORE_VOLATILE: (0x009, "says that it failed, not that it is unknown"),
    Command.HASH_START: (0x026, "TPM_INVALID_POSTINIT: known, but not now"),
    Command.HASH_DATA: (0x026, "TPM_INVALID_POSTINIT: known, but not now"),
    Command.HASH_END: (0x026, "TPM_INVALID_POSTINIT: known, but not now"),
    Command.RESET_TPMESTABLISHED: (0x026, "TPM_INVALID_POSTINIT: known, but not now"),
    Command.LOCK_STORAGE: (0x000, "says that a guest goes on; where none was leaving, there is nothing to do"),
}
ALWAYS = {
    Command.GET_STATEBLOB: (0x009, "hands out nothing that the manager has not sealed for one other host"),
}
SEQUENCES_TRIED = 60
MOST_REQUESTS = 12


def _permitted(ours: Exchange, theirs: Exchange) -> bool:
    command, result = ours.request.command, ours.reply.result
    if command in ALWAYS:
        return result == ALWAYS[command][0]
    if command is Command.SET_DATAFD:
        # Without a descriptor: a failure here, TPM_BAD_PARAMETER there.
        return (result, theirs.reply.result) == (0x009, 0x003)
    return command in WITHOUT_POWER and (theirs.reply.result, result) == (BAD_ORDINAL, WITHOUT_POWER[command][0])


def _unexplained(ours: Sequence[Exchange], theirs: Sequence[Exchange]) -> list[str]:
    return [
        line
        for pair in zip(ours, theirs, strict=True)
        if not _permitted(*pair)
        for line in differences({"": [pair[0]]}, {"": [pair[1]]})
    ]


@pytest.fixture(scope="module")
def vtpmd() -> Iterator[Path]:
    with Host() as host, host.client() as client:
        client.create("differential")
        yield Path(client.start("differential").control_socket)


@pytest.mark.parametrize("padding", [b"", QEMU_PADDING], ids=["as swtpm_ioctl sends", "as qemu sends"])
def test_vtpmd_answers_as_swtpm_when_asked_every_command(vtpmd: Path, padding: bytes) -> None:
    with debian_swtpm() as swtpm:
        ours, theirs = ask_all(vtpmd, padding), ask_all(swtpm, padding)
    for name in theirs:
        assert _unexplained(ours[name], theirs[name]) == [], name
        for exchange in ours[name]:
            assert exchange.reads == 1


def test_every_listed_difference_is_one_when_asked(vtpmd: Path) -> None:
    with debian_swtpm() as swtpm:
        ours, theirs = ask_all(vtpmd), ask_all(swtpm)
    differ = {
        pair[0].request.command
        for name in theirs
        for pair in zip(ours[name], theirs[name], strict=True)
        if differences({"": [pair[0]]}, {"": [pair[1]]})
    }
    assert differ == {*WITHOUT_POWER, *ALWAYS, Command.SET_DATAFD}


def _request(rng: random.Random) -> Request:
    size = rng.choice([0, 1, 1000, 2048, 3968, 4096, 5000, 2**32 - 1])
    return rng.choice(
        [
            *map(Plain, (Command.STOP, Command.GET_CAPABILITY, Command.GET_CONFIG, Command.GET_TPMESTABLISHED)),
            *map(Plain, (Command.HASH_START, Command.HASH_END, Command.CANCEL_TPM_CMD, Command.STORE_VOLATILE)),
            Init(rng.choice([0, 1])),
            HashData(rng.randbytes(rng.randrange(200))),
            SetLocality(rng.randrange(5)),
            ResetEstablished(rng.randrange(5)),
            SetBufferSize(size),
            GetInfo(rng.randrange(8), rng.choice([0, 1, 1 << 20])),
            GetStateBlob(1, rng.choice(list(StateKind)), rng.randrange(20)),
            SetStateBlob(0, StateKind.SAVESTATE, b""),
            LockStorage(rng.randrange(3)),
        ]
    )


def test_vtpmd_answers_as_swtpm_when_requests_come_in_any_order(vtpmd: Path) -> None:
    seed = int(os.environ.get("VTPM_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"seed {seed}")
    rng = random.Random(seed)
    with debian_swtpm() as swtpm:
        for _ in range(SEQUENCES_TRIED):
            # Both begin alike: powered off, with no state of the last sequence.
            requests = [Plain(Command.STOP), Init(1), *(_request(rng) for _ in range(rng.randint(1, MOST_REQUESTS)))]
            padding = rng.choice([b"", QEMU_PADDING])
            with ControlClient(vtpmd) as left, ControlClient(swtpm) as right:
                ours = [left.ask(request, padding) for request in requests]
                theirs = [right.ask(request, padding) for request in requests]
            assert _unexplained(ours, theirs) == [], [exchange.request for exchange in ours]
