"""The starter over a PCR in memory, killed at any moment: each kind of services is in the PCR once before it runs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm.config import Config
from vtpm.errors import AccessDeniedError, ConflictError, PlatformTpmError, UnavailableError
from vtpm.measurement.closure import Closure, measurement_of
from vtpm.measurement.record import CONTENTS_FILE, event_digest, predict, read_contents, read_record
from vtpm.starter import measure
from vtpm.starter.folder import prepare_folder
from vtpm.starter.pcr import KeeperPcr
from vtpm.wire.keeper import PcrState
from vtpm.wire.service_lock import ServiceLock

EMPTY = measurement_of({})
DIGESTS = [f"{number:064x}" for number in range(3)]


class Killed(Exception):
    """The starter's end."""


class MemoryPcr:
    """A PCR that the starter may be killed before or after it extends."""

    def __init__(self) -> None:
        self.value = bytes(32)
        self.resets = 1
        self.extended: list[bytes] = []
        self.kill = ""

    def reset(self) -> None:
        self.value, self.extended = bytes(32), []
        self.resets += 1

    def read(self) -> PcrState:
        return PcrState("sha256", 13, self.value, self.resets)

    def extend(self, digest: bytes) -> PcrState:
        if self.kill == "before":
            raise Killed
        self.value = hashlib.sha256(self.value + digest).digest()
        self.extended.append(digest)
        if self.kill == "after":
            raise Killed
        return self.read()

    def close(self) -> None:
        pass


def _start(pcr: MemoryPcr, folder: Path, digest: str) -> None:
    closure = Closure({}, {}, f"f{digest[-1]}")
    measure._settle(pcr, pcr.read(), folder, read_record(folder), closure, digest, measure.Asked.TPM)


STEPS = st.lists(st.tuples(st.sampled_from(DIGESTS), st.sampled_from(["", "before", "after", "reset"])), max_size=12)


@given(steps=STEPS)
def test_what_runs_is_in_the_pcr_once_when_starters_are_killed_at_any_moment(steps: list[tuple[str, str]]) -> None:
    with TemporaryDirectory() as name:
        folder, pcr = Path(name), MemoryPcr()
        for digest, fate in steps:
            if fate == "reset":
                pcr.reset()
            pcr.kill = fate
            try:
                _start(pcr, folder, digest)
            except Killed:
                continue
            assert pcr.extended.count(event_digest("sha256", digest)) == 1
            assert len(pcr.extended) == len(set(pcr.extended))
            record = read_record(folder)
            assert record is not None
            assert (record.running, record.doubt, record.extended) == (digest, "", True)
            assert predict("sha256", bytes(32), record.digests) == pcr.value


def test_start_fails_when_somebody_else_extends_at_the_same_moment(tmp_path: Path) -> None:
    class Shared(MemoryPcr):
        def extend(self, digest: bytes) -> PcrState:
            super().extend(bytes(32))
            return super().extend(digest)

    with pytest.raises(PlatformTpmError, match="extended by somebody else"):
        _start(Shared(), tmp_path, DIGESTS[0])
    record = read_record(tmp_path)
    assert record is not None
    assert not record.extended


def test_software_is_read_again_when_any_file_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Closure({}, {}, "f0")]
    monkeypatch.setattr(measure, "find_closure", lambda *_: found[0])
    _start(MemoryPcr(), tmp_path, DIGESTS[0])
    record = read_record(tmp_path)
    assert measure._digest(tmp_path, record)[1] == DIGESTS[0]
    assert measure._digest(tmp_path, None)[1] == EMPTY
    found[0] = Closure({}, {}, "f1")
    assert measure._digest(tmp_path, record)[1] == EMPTY
    assert read_contents(tmp_path) == {}


@pytest.mark.parametrize("content", ["[]", '{"x": 1}', '{"x": ["y", "zz"]}', "x"])
def test_all_files_are_read_when_what_was_read_before_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(measure, "find_closure", lambda *_: Closure({}, {}, "f1"))
    _start(MemoryPcr(), tmp_path, DIGESTS[0])
    (tmp_path / CONTENTS_FILE).write_text(content)
    assert measure._digest(tmp_path, read_record(tmp_path))[1] == EMPTY


def test_start_fails_when_files_change_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Closure({}, {}, "f0"), Closure({}, {}, "f1")])
    monkeypatch.setattr(measure, "find_closure", lambda *_: next(found))
    with pytest.raises(UnavailableError, match="changing"):
        measure._digest(tmp_path, None)


def test_starter_ends_without_extending_when_a_manager_serves_already(tmp_path: Path) -> None:
    lock = ServiceLock(tmp_path, "manager")
    with pytest.raises(ConflictError, match="a manager already serves"):
        measure.measure_services(Config(tmp_path, tmp_path, platform_tpm="device:/dev/none"), tmp_path)
    lock.release()


FATES = ["never started", "killed before it extended", "killed after it extended", "measured", "other files"]


@pytest.mark.parametrize("served", [True, False], ids=["keeper hangs", "no keeper"])
@pytest.mark.parametrize("fate", FATES)
def test_services_start_only_if_they_were_seen_in_the_pcr_when_the_tpm_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str, served: bool
) -> None:
    monkeypatch.setenv("TSS2_LOG", "all+none")
    monkeypatch.setattr(measure, "MEASURE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(measure, "CHECK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(measure, "find_closure", lambda *_: Closure({}, {}, "other" if "other" in fate else "f0"))
    pcr = MemoryPcr()
    pcr.kill = fate.split()[1] if fate.startswith("killed") else ""
    if fate != "never started":
        with contextlib.suppress(Killed):
            _start(pcr, tmp_path, DIGESTS[0])
    config = Config(tmp_path, tmp_path, platform_tpm="device:/dev/none")
    keeper = ServiceLock(tmp_path, "keeper") if served else None
    try:
        if fate == "measured":
            asked = measure.measure_services(config, tmp_path)
            assert asked is (measure.Asked.KEEPER if served else measure.Asked.TPM)
        else:
            with pytest.raises((PlatformTpmError, UnavailableError)):
                measure.measure_services(config, tmp_path)
    finally:
        if keeper is not None:
            keeper.release()
    # Whatever came of it, nobody has the locks, and the next start finds what is in the PCR.
    ServiceLock(tmp_path, "manager").release()
    ServiceLock(tmp_path, "keeper").release()
    pcr.kill = ""
    _start(pcr, tmp_path, DIGESTS[0])
    assert pcr.extended == [event_digest("sha256", DIGESTS[0])]


def test_compiled_files_of_changed_modules_are_dropped_when_source_has_the_same_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    files = {name: tmp_path / f"{name}.py" for name in ("changed", "same")}
    compiled = {name: Path(importlib.util.cache_from_source(str(place))) for name, place in files.items()}
    for name, place in files.items():
        place.write_text("x = 1\n")
        os.utime(place, (1, 1))
        compiled[name].parent.mkdir(parents=True, exist_ok=True)
        compiled[name].write_bytes(b"compiled")
    found = [Closure(files, {}, "f0")]
    monkeypatch.setattr(measure, "find_closure", lambda *_: found[0])
    measure._digest(tmp_path, None)
    assert not any(place.exists() for place in compiled.values())  # nobody knows what they were compiled from
    _start(MemoryPcr(), tmp_path, DIGESTS[0])
    for place in compiled.values():
        place.write_bytes(b"compiled")
    files["changed"].write_text("x = 2\n")
    os.utime(files["changed"], (1, 1))
    found[0] = Closure(files, {}, "f1")
    measure._digest(tmp_path, read_record(tmp_path))
    assert (compiled["changed"].exists(), compiled["same"].exists()) == (False, True)


def test_keeper_is_refused_when_it_uses_another_pcr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pcr = KeeperPcr(Config(tmp_path, tmp_path, platform_tpm="x", services_pcr=12), 0.1)
    monkeypatch.setattr(pcr._client, "services_pcr", lambda: MemoryPcr().read())
    with pytest.raises(ConflictError, match="PCR 13 of sha256"):
        pcr.read()


def test_folder_is_this_boots_alone_and_refused_when_others_may_write_to_it(tmp_path: Path) -> None:
    stale = tmp_path / "services" / "another-boot"
    stale.mkdir(parents=True)
    (stale / "x").touch()
    cache = prepare_folder(tmp_path)
    assert prepare_folder(tmp_path) == cache
    assert list((tmp_path / "services").iterdir()) == [cache.parent]
    for folder in (cache, cache.parent, cache.parent.parent, tmp_path):
        folder.chmod(0o777)
        with pytest.raises(AccessDeniedError, match="may be written by others"):
            prepare_folder(tmp_path)
        folder.chmod(0o755)
    cache.rmdir()
    cache.symlink_to("/tmp")
    with pytest.raises(AccessDeniedError):
        prepare_folder(tmp_path)
