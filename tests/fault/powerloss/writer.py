"""Runs in the guest: the real stores write on a dm-log-writes device, and every answer leaves a mark in its log.

`python -m tests.fault.powerloss.writer ROUNDS VARIANT…`: each variant has its own part of /dev/vda (file systems, made
by the host) and of /dev/vdb (logs). A variant takes one thing away that durability rests on.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.fault.powerloss.content import (
    DEVICE_SECTOR_BYTES,
    IMAGE_BYTES,
    LOG_BYTES,
    MAC_KEY,
    VTPM_NAMES,
    blob,
    vtpm_id,
)
from tests.fault.powerloss.device_mapper import DeviceMapper


def _stand_in(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


class _Derive:
    """In HKDF's place."""

    def __init__(self, *_: object) -> None:
        pass

    def derive(self, data: bytes) -> bytes:
        return hashlib.sha256(data).digest()


# Encryption and TPM have no part in durability, and their libraries are larger than the rest of the guest.
_stand_in("cryptography")
_stand_in("cryptography.exceptions", InvalidTag=ValueError, InvalidKey=ValueError)
_stand_in("cryptography.hazmat")
_stand_in("cryptography.hazmat.primitives", hashes=None)
_stand_in("cryptography.hazmat.primitives.hashes", SHA256=object)
_stand_in("cryptography.hazmat.primitives.hmac", HMAC=object)
_stand_in("cryptography.hazmat.primitives.ciphers")
_stand_in("cryptography.hazmat.primitives.ciphers.aead", AESGCM=object, AESGCMSIV=object)
_stand_in("cryptography.hazmat.primitives.kdf")
_stand_in("cryptography.hazmat.primitives.kdf.hkdf", HKDF=_Derive, HKDFExpand=_Derive)
_stand_in("vtpm.platform_tpm.platform_tpm", PlatformTpm=object)

from vtpm import durable_file  # noqa: E402
from vtpm.embedded_tpm import store as embedded  # noqa: E402
from vtpm.keeper import root_key  # noqa: E402
from vtpm.platform_tpm.pcrs import PcrSelection  # noqa: E402
from vtpm.platform_tpm.root_policy import PcrSet  # noqa: E402
from vtpm.platform_tpm.sealed_blob import IndexRef, SealedBlob  # noqa: E402
from vtpm.secret import Secret  # noqa: E402
from vtpm.tpm.types import InstanceId, StateKind, TpmVersion, VtpmId  # noqa: E402
from vtpm.vault import sqlite_file  # noqa: E402
from vtpm.vault.anchor import Anchoring, AnchorPolicy  # noqa: E402
from vtpm.vault.committer import Committer  # noqa: E402
from vtpm.vault.records import DomainKind, SaveRequest, VtpmRecord  # noqa: E402
from vtpm.vault.root_record import NOTHING_ANCHORED, AnchorValue  # noqa: E402
from vtpm.vault.sqlite_store import SqliteStore  # noqa: E402

LIMIT_S = 60.0
TPM_WRITE_S = 0.02
"""What a hardware TPM takes is more; long enough for a commit beside it."""
INTERVAL_S = 0.15
Mark = Callable[[str], None]


_COUNTS = Anchoring.counts


class OsWithout:
    """The module os for one module under test, whose fsync leaves out files or directories."""

    def __init__(self, left_out: Callable[[int], bool]) -> None:
        self._left_out = left_out

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        if not self._left_out(os.fstat(fd).st_mode):
            os.fsync(fd)


def mutate(variant: str) -> None:
    """Take away what the variant names, as `store-what`; `interval` takes nothing away."""
    modules: dict[str, Any] = {"vault": sqlite_file, "embedded": embedded, "root": durable_file}
    left_out = {"files": stat.S_ISREG, "directories": stat.S_ISDIR}
    for module in modules.values():
        module.os = os
    sqlite_file.SYNCHRONOUS = "FULL"
    Anchoring.counts = _COUNTS  # type: ignore[method-assign]
    store, _, what = variant.partition("-")
    if variant == "anchor-late":
        Anchoring.counts = lambda *_: True  # type: ignore[assignment, method-assign]
    elif what in left_out:
        modules[store].os = OsWithout(left_out[what])
    elif what:
        sqlite_file.SYNCHRONOUS = what


@dataclass(frozen=True)
class Opened:
    """As OpenedRoot."""

    root: Secret
    opened_by: PcrSet


class PlainTpm:
    """Seals by writing down; see _stand_in."""

    tcti = "none"

    def random(self, size: int) -> bytes:
        return os.urandom(size)

    def pcr_set(self, label: str, selection: PcrSelection) -> PcrSet:
        return PcrSet(label, selection, (bytes(32),) * len(selection.indexes))

    def seal_root(
        self, root: Secret, first: PcrSet, save: Callable[[SealedBlob], None], **_rules: object
    ) -> SealedBlob:
        name = b"\0\x0b" + bytes(32)
        index = IndexRef(0x01815650, name)
        blob = SealedBlob(name, name, index, index, ((first,),), b"public", root.reveal()).signed(root)
        save(blob)
        return blob

    def unseal_root(self, sealed: SealedBlob) -> Opened:
        return Opened(Secret(sealed.private), sealed.lists[0][0])

    def discard(self, sealed: SealedBlob) -> None:
        pass


class MarkedAnchor:
    """The platform TPM, which is on no disk. Between two marks a value may be anchored already or not."""

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._value = NOTHING_ANCHORED

    def read(self) -> AnchorValue:
        return self._value

    def write(self, value: AnchorValue) -> None:
        words = f"{value.version}:{value.digest.hex()}"
        self._mark(f"anchoring={words}")
        time.sleep(TPM_WRITE_S)
        self._mark(f"anchor={words}")
        self._value = value


def write(folder: Path, rounds: int, policy: AnchorPolicy, mark: Mark) -> None:
    """Use the three stores in turn; each answer is marked before the next write begins."""
    tpm: Any = PlainTpm()
    none: Any = None
    keeper = MarkedAnchor(mark)
    store = SqliteStore(folder / "vault", Secret(MAC_KEY), keeper)
    mark("vault=1")
    committer = Committer(store, keeper, policy)
    tpm_store = embedded.EmbeddedStore(folder / "embedded")
    permits = {name: _begin(committer, name, mark) for name in VTPM_NAMES}
    for version in range(1, rounds + 1):
        if version % 4 == 1:
            (folder / f"root-{version}").mkdir()
            _settle(folder)
            new = root_key.NewRoot(PcrSelection.parse("sha256:0"), none)
            root = root_key.open_root_key(folder / f"root-{version}", tpm, new)
            mark(f"root-{version}={hashlib.sha256(root.secret.reveal()).hexdigest()}")
        tpm_store.save(StateKind.PERMANENT, blob("embedded", version))
        mark(f"embedded={version}")
        if version == 1:
            tpm_store.mark_initialised()
            mark("initialised=1")
        futures = {}
        for name in VTPM_NAMES:
            data, own = blob(name, version), VtpmId(vtpm_id(name))
            if futures:
                # While the one before is on its way to the platform TPM.
                time.sleep(TPM_WRITE_S / 2)
            futures[name] = committer.submit(
                SaveRequest(
                    own, InstanceId(UUID(int=own.int ^ 1)), version, hashlib.sha256(data).digest(),
                    StateKind.PERMANENT, 1, version, data, permits[name] if version == 1 else None,
                ),
                patience_s=LIMIT_S,
            )  # fmt: skip
        for name, future in futures.items():
            future.result(LIMIT_S)
            mark(f"state.{name}={version}")
    committer.close()


def _begin(committer: Committer, name: str, mark: Mark) -> bytes:
    """Make a vTPM as the manager does, up to its permit."""
    own = VtpmId(vtpm_id(name))
    instance = InstanceId(UUID(int=own.int ^ 1))
    record = VtpmRecord(
        id=own, name=name, owner_uid=0, owner_gid=0, vm_uuid=None, tpm_version=TpmVersion.V2_0,
        domain=DomainKind.PROCESS, created_at=datetime(2026, 1, 1, tzinfo=UTC), wrapped_key=b"wrapped",
    )  # fmt: skip
    committer.run(lambda store: store.create_vtpm(record)).result(LIMIT_S)
    mark(f"record.{name}=1")
    committer.run(lambda store: store.bind_instance(own, instance)).result(LIMIT_S)
    mark(f"bound.{name}=1")
    permit = committer.run(lambda store: store.issue_permit(own, instance, 0x902)).result(LIMIT_S)
    committer.run(lambda store: store.load_state(own, instance, 0x902)).result(LIMIT_S)
    mark(f"permit.{name}=1")
    return permit


def _settle(folder: Path) -> None:
    # The folder is not the keeper's own work.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def run(mapper: DeviceMapper, index: int, variant: str, rounds: int) -> None:
    """Write on one logged file system. What is still only in memory at the end reaches the log with no flush."""
    image, log = IMAGE_BYTES // DEVICE_SECTOR_BYTES, LOG_BYTES // DEVICE_SECTOR_BYTES
    data_node = mapper.create("data", image, "linear", f"/dev/vda {index * image}")
    log_node = mapper.create("log", log, "linear", f"/dev/vdb {index * log}")
    node = mapper.create("logged", image, "log-writes", f"{data_node} {log_node}")
    folder = Path("/mnt/disk")
    folder.mkdir(parents=True, exist_ok=True)
    # A legal file system that hides as little as it can: no flush on rename, no commit by the clock.
    options = "noauto_da_alloc,data=ordered,commit=900"
    subprocess.run(["mount", "-t", "ext4", "-o", options, node, folder], check=True, timeout=LIMIT_S)
    mutate(variant)
    policy = AnchorPolicy(INTERVAL_S if variant == "interval" else None)
    write(folder, rounds, policy, lambda words: mapper.message("logged", f"mark {words}"))
    mapper.message("logged", "mark end=1")
    subprocess.run(["umount", folder], check=True, timeout=LIMIT_S)
    for name in ("logged", "log", "data"):
        mapper.remove(name)


def main() -> None:
    Path("/proc/sys/vm/dirty_writeback_centisecs").write_text("0")
    mapper = DeviceMapper()
    rounds = int(sys.argv[1])
    for index, variant in enumerate(sys.argv[2:]):
        run(mapper, index, variant, rounds)
        print("wrote", variant)


if __name__ == "__main__":
    main()
