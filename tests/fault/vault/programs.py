"""Writers that the fault tests kill, trace and starve; run as `python -m tests.fault.vault.programs NAME …`.

They use the vault as a manager does, and say "ack" only after a future's result.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

from tests.support.anchor_file import AnchorFile
from tests.unit.vault.world import ENGINE, KEY, MAC_KEY, new_record
from vtpm.errors import NotFoundError, StoreError
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault import sqlite_file
from vtpm.vault.anchor import AnchorPolicy
from vtpm.vault.committer import Committer
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.vault import PermitGranted, Vault

VTPMS = 3
ACK = struct.Struct(">BQ")
LIMIT_S = 20.0


class Writer:
    """One vTPM, started as a manager would, whose state is a number many times over."""

    def __init__(self, committer: Committer, vault: Vault, name: str) -> None:
        self.vault, self.name = vault, name
        self.instance = InstanceId(uuid4())
        self.seq = 0
        run = committer.run

        def record_of(store: SqliteStore) -> VtpmId:
            try:
                return store.find_vtpm(name).id
            except NotFoundError:
                record = new_record(name)
                store.create_vtpm(record)
                return record.id

        self.id = run(record_of).result(LIMIT_S)
        old = run(lambda store: store.get_vtpm(self.id)).result(LIMIT_S).instance_id
        run(lambda store: store.bind_instance(self.id, self.instance, replaces=old)).result(LIMIT_S)
        vault.open_vtpm(self.id, KEY)
        loaded = vault.load(self.id, self.instance, ENGINE)
        self.permit, self.value = None, 0
        if isinstance(loaded, PermitGranted):
            self.permit = loaded.permit_id
        else:
            self.value = number_in(loaded[StateKind.PERMANENT])

    def save(self, value: int, *, patience_s: float = LIMIT_S, size_bytes: int = 20_000) -> None:
        self.seq += 1
        data = struct.pack(">Q", value) * (size_bytes // 8)
        permit, self.permit = self.permit, None
        future = self.vault.save(
            self.id, self.instance, self.seq, StateKind.PERMANENT, data, permit, patience_s=patience_s
        )
        future.result(LIMIT_S + patience_s)
        self.value = value


def number_in(data: bytes) -> int:
    """The number a state was written with; a state of two numbers is a torn one."""
    (value,) = struct.unpack_from(">Q", data)
    assert data == struct.pack(">Q", value) * (len(data) // 8)
    return value


def opened(folder: Path, count: int = VTPMS) -> tuple[Committer, Vault, list[Writer]]:
    keeper = AnchorFile(folder.with_name(f"{folder.name}.anchor"))
    committer = Committer(SqliteStore(folder, MAC_KEY, keeper), keeper, AnchorPolicy())
    vault = Vault(committer)
    return committer, vault, [Writer(committer, vault, f"web{number}") for number in range(count)]


def say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def write_until_killed(folder: Path, pipe: int) -> None:
    """Count up in each vTPM at once; each acknowledgement goes into the pipe."""
    _, _, writers = opened(folder)

    def count(index: int) -> None:
        while True:
            writers[index].save(writers[index].value + 1)
            os.write(pipe, ACK.pack(index, writers[index].value))

    threads = [threading.Thread(target=count, args=(index,)) for index in range(VTPMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kill_rounds(folder: str, rounds: str, seed: str) -> None:
    """Fork a writer, kill -9 it at a random moment, compare what is stored with what it acknowledged; many times."""
    chance = random.Random(int(seed))
    acknowledged = [0] * VTPMS
    total = after_acknowledgement = 0
    for _ in range(int(rounds)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            write_until_killed(Path(folder), writing)
            os._exit(1)
        os.close(writing)
        # Half the moments fall into opening, creating and the first saves, half into steady writing.
        steady = chance.random() < 0.5
        if steady:
            select.select([reading], [], [], LIMIT_S)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = b""
        while chunk := os.read(reading, 65536):
            content += chunk
        os.close(reading)
        for index, value in ACK.iter_unpack(content[: len(content) // ACK.size * ACK.size]):
            acknowledged[index] = max(acknowledged[index], value)
            total += 1
        after_acknowledgement += bool(content)
        committer, vault, writers = opened(Path(folder))
        stored = [writer.value for writer in writers]
        vault.close()
        committer.close()
        for kept, answered in zip(stored, acknowledged, strict=True):
            # One save of each may have become durable without being answered.
            assert answered <= kept <= answered + 1, (stored, acknowledged)
        acknowledged = stored
    say(json.dumps({"acknowledged": total, "rounds_with_acknowledgement": after_acknowledgement}))


def write_some(folder: str, count: str, synchronous: str) -> None:
    """Save a number of times, saying "begin" before and "ack" after each; for strace."""
    if synchronous != "as shipped":
        sqlite_file.SYNCHRONOUS = synchronous
    committer, vault, (writer,) = opened(Path(folder), 1)
    for value in range(1, int(count) + 1):
        say(f"begin {value}")
        try:
            writer.save(value, patience_s=0.4)
        except StoreError as error:
            say(f"failed {value} {error}")
        else:
            say(f"ack {value}")
    vault.close()
    committer.close()


def fill_disk(folder: str) -> None:
    """On a small file system of its own: fail on the full disk, then succeed when space comes within the patience."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M,mode=0700", "tmpfs", folder], check=True)
    filler = Path(folder, "filler")
    committer, vault, (writer,) = opened(Path(folder, "vault"), 1)
    writer.save(1)

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    fill()
    begin = time.monotonic()
    try:
        writer.save(2, patience_s=0.5, size_bytes=500_000)
        outcome = "acknowledged"
    except StoreError as error:
        outcome = f"StoreError {error}"
    failed_after_s = time.monotonic() - begin
    fill()
    freeing = threading.Timer(0.3, filler.unlink)
    freeing.start()
    begin = time.monotonic()
    writer.save(3, patience_s=10, size_bytes=500_000)
    succeeded_after_s = time.monotonic() - begin
    freeing.join()
    vault.close()
    committer.close()
    committer, vault, (writer,) = opened(Path(folder, "vault"), 1)
    vault.close()
    committer.close()
    say(
        json.dumps(
            {
                "outcome": outcome,
                "failed_after_s": failed_after_s,
                "succeeded_after_s": succeeded_after_s,
                "stored": writer.value,
            }
        )
    )


def limit_file_size(folder: str) -> None:
    """Under a limit on file sizes every growing write fails as on a broken device; then the limit goes."""
    committer, vault, (writer,) = opened(Path(folder), 1)
    writer.save(1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        writer.save(2, patience_s=0.3)
        outcome = "acknowledged"
    except StoreError as error:
        outcome = f"StoreError {error}"
    lifting = threading.Timer(0.3, resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard)))
    lifting.start()
    writer.save(3, patience_s=10)
    lifting.join()
    vault.close()
    committer.close()
    committer, vault, (writer,) = opened(Path(folder), 1)
    say(json.dumps({"outcome": outcome, "stored": writer.value}))
    vault.close()
    committer.close()


PROGRAMS = {program.__name__: program for program in (kill_rounds, write_some, fill_disk, limit_file_size)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
