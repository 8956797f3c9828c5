"""The record of what was measured, held against the PCR: nothing twice, nothing never, nothing on its word alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from vtpm.errors import AccessDeniedError, ConflictError, ProtocolError, UnavailableError
from vtpm.measurement.record import (
    MAX_DIGESTS,
    RECORD_FILE,
    Extension,
    Library,
    Record,
    boot_dir,
    event_digest,
    plan,
    predict,
    read_record,
    write_record,
)

OLD, NEW = "aa" * 32, "bb" * 32
START = bytes(32)


def _record(*digests: str, start: bytes = START) -> Record:
    return Record(
        "sha256", 13, 7, start, digests, digests[-1], "f1", (Library("library/l", "/lib/l"),), "", extended=True
    )


def _now(value: bytes, running: str) -> Record:
    return replace(_record(running, start=value), fingerprint="f2", extended=False)


def test_value_is_what_the_tpm_computes() -> None:
    event = hashlib.sha256(f"vtpm services 1 {OLD}".encode()).digest()
    assert event_digest("sha256", OLD) == event
    assert predict("sha256", START, (OLD,)) == hashlib.sha256(START + event).digest()
    event = hashlib.sha384(f"vtpm services 1 {OLD}".encode()).digest()
    assert predict("sha384", bytes(48), (OLD,)) == hashlib.sha384(bytes(48) + event).digest()


def test_services_are_extended_when_none_were_in_this_boot() -> None:
    now = _now(b"\1" * 32, OLD)
    assert plan(None, now, served=False) == (now, Extension.NEEDED)


@pytest.mark.parametrize("bank", ["sha256", "sha384"])
def test_services_are_extended_and_doubt_is_said_when_the_record_is_gone(bank: str) -> None:
    start = bytes(hashlib.new(bank).digest_size)
    once = replace(_now(predict(bank, start, (OLD,)), OLD), bank=bank)
    for now, served in ((once, False), (replace(once, start=start), True)):
        kept, extension = plan(None, now, served=served)
        assert extension is Extension.NEEDED
        assert kept == replace(now, doubt=kept.doubt)
        assert "the record of this boot is gone" in kept.doubt


def test_nothing_is_extended_when_the_same_services_were() -> None:
    before = _record(OLD)
    kept, extension = plan(before, _now(before.value(), OLD), served=True)
    assert extension is Extension.DONE
    assert kept == replace(before, fingerprint="f2")


def test_services_are_extended_after_the_others_when_they_were_upgraded() -> None:
    before = _record(OLD)
    kept, extension = plan(before, _now(before.value(), NEW), served=True)
    assert (kept.start, kept.digests, kept.running, extension) == (START, (OLD, NEW), NEW, Extension.NEEDED)


def test_nothing_is_extended_when_an_upgrade_was_undone_in_the_same_boot() -> None:
    before = _record(OLD, NEW)
    kept, extension = plan(before, _now(before.value(), OLD), served=True)
    assert (kept.digests, kept.running, extension) == ((OLD, NEW), OLD, Extension.DONE)


@pytest.mark.parametrize("running", [OLD, NEW])
def test_last_entry_does_not_count_when_it_was_not_extended(running: str) -> None:
    first = _record(OLD)
    assert plan(first, _now(START, running), served=True) == (_now(START, running), Extension.NEEDED)
    second = _record(OLD, NEW)
    kept, extension = plan(second, _now(second.value(1), running), served=True)
    assert kept.digests == ((OLD,) if running == OLD else (OLD, NEW))
    assert extension is (Extension.DONE if running == OLD else Extension.NEEDED)


@pytest.mark.parametrize("field", [{"reset_count": 6}, {"pcr": 12}, {"bank": "sha384"}])
def test_record_does_not_count_when_it_is_of_another_pcr_or_boot(field: dict[str, object]) -> None:
    before = replace(_record(OLD), **field)  # type: ignore[arg-type]
    now = _now(before.value()[:32], OLD)
    assert plan(before, now, served=True) == (now, Extension.NEEDED)


def test_services_are_extended_and_doubt_is_said_when_the_pcr_holds_something_else() -> None:
    kept, extension = plan(_record(OLD), _now(b"\1" * 32, OLD), served=True)
    assert extension is Extension.NEEDED
    assert (kept.start, kept.digests) == (b"\1" * 32, (OLD,))
    assert "PCR 13 held what the record of this boot does not account for" in kept.doubt
    # It stays said for the rest of the boot.
    again, extension = plan(kept, _now(kept.value(), OLD), served=True)
    assert (again.doubt, extension) == (kept.doubt, Extension.DONE)


def test_plan_is_refused_when_the_record_would_grow_without_end() -> None:
    before = _record(*(f"{number:064x}" for number in range(MAX_DIGESTS)))
    with pytest.raises(ConflictError, match="Reboot"):
        plan(before, _now(before.value(), NEW), served=True)


def test_record_is_the_same_when_read_back(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    for record in (_record(OLD), _record(OLD, NEW)):
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]
    assert (tmp_path / RECORD_FILE).stat().st_mode & 0o777 == 0o644
    with pytest.raises(UnavailableError):
        write_record(tmp_path / "gone", _record(OLD))


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b"x" * 300_000], ids=range(5))
def test_record_is_refused_when_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(ProtocolError, match="record of measurements"):
        read_record(tmp_path)


def test_record_is_refused_when_others_could_have_written_it(tmp_path: Path) -> None:
    write_record(tmp_path, _record(OLD))
    (tmp_path / RECORD_FILE).chmod(0o666)
    with pytest.raises(AccessDeniedError):
        read_record(tmp_path)
    (tmp_path / RECORD_FILE).rename(tmp_path / "real")
    (tmp_path / RECORD_FILE).symlink_to(tmp_path / "real")
    with pytest.raises(UnavailableError):
        read_record(tmp_path)


def test_folder_of_a_boot_has_a_name_that_nobody_knew_before_it() -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot_dir(Path("/run/vtpm")) == Path("/run/vtpm/services") / boot_id
