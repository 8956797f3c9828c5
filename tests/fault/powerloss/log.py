"""Reads a log of dm-log-writes and says in which states a power loss may leave the disk. Pure, but for reading.

Format: Documentation/admin-guide/device-mapper/log-writes.rst. The kernel logs a write when a completed flush (or its
own FUA) made it durable, and a mark at once: so the entries before a mark are all that was surely on the disk then.
"""

from __future__ import annotations

import enum
import random
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

SECTOR_BYTES = 512
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC = 0x6A736677736872


class Flag(enum.IntFlag):
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True)
class Entry:
    """One entry; `sector` counts SECTOR_BYTES, `data` is a mark's text too."""

    sector: int
    count: int
    flags: Flag
    data: bytes


@dataclass(frozen=True)
class State:
    """A disk that a power loss may leave, and the marks that had been made by then.

    Args:
        marks: all of them that were made while the disk was so.
        anchors: every value that the platform TPM may have had meanwhile; "" for none.
        boundary: number of flush boundaries before it.
        subset: whether some of the writes that were under way are in it.
        position: of the entry that ended it.
    """

    disk: bytes
    marks: Mapping[str, str]
    anchors: tuple[str, ...]
    boundary: int
    subset: bool
    position: int


@dataclass(frozen=True)
class Answer:
    """A save that was answered, and what the platform TPM surely had by then."""

    position: int
    name: str
    version: int
    anchor: str


def read_log(file: BinaryIO, offset: int) -> list[Entry]:
    """All entries of the log that begins at this byte."""
    file.seek(offset)
    magic, version, count, sector_bytes = _SUPER.unpack(file.read(_SUPER.size))
    if (magic, version, sector_bytes) != (_MAGIC, 1, SECTOR_BYTES):
        raise ValueError(f"no log of dm-log-writes: {magic:#x}, version {version}, sectors of {sector_bytes} bytes")
    position = offset + SECTOR_BYTES
    entries = []
    for _ in range(count):
        file.seek(position)
        head = file.read(SECTOR_BYTES)
        sector, sectors, raw_flags, data_bytes = _ENTRY.unpack_from(head)
        flags = Flag(raw_flags)
        position += SECTOR_BYTES
        if Flag.MARK in flags:
            data = head[_ENTRY.size : _ENTRY.size + data_bytes]
        elif Flag.DISCARD in flags:
            data = b""
        else:
            data = file.read(sectors * SECTOR_BYTES)
            position += sectors * SECTOR_BYTES
        entries.append(Entry(sector, sectors, flags, data))
    return entries


def states(base: bytes, entries: list[Entry], chance: random.Random, subsets: int) -> Iterator[State]:
    """Every state at a flush boundary, and `subsets` random ones of what was under way at each."""
    disk = bytearray(base)
    marks: dict[str, str] = {}
    # What the platform TPM has since the last flush: first what it had then.
    anchors = [""]
    under_way: list[Entry] = []
    boundary = 0
    for position, entry in enumerate(entries):
        if Flag.MARK in entry.flags:
            name, value = _mark(entry)
            if name == "end":
                yield State(bytes(disk), dict(marks), tuple(anchors), boundary, False, position)
                return
            if name == "anchoring":
                anchors.append(value)
            marks[name] = value
            continue
        if entry.flags & (Flag.FLUSH | Flag.FUA):
            yield State(bytes(disk), dict(marks), tuple(anchors), boundary, False, position)
            for _ in range(subsets if under_way else 0):
                partial = bytearray(disk)
                for write in under_way:
                    if chance.random() < 0.5:
                        _apply(partial, write)
                yield State(bytes(partial), dict(marks), tuple(anchors), boundary, True, position)
            for write in (*under_way, entry):
                _apply(disk, write)
            under_way.clear()
            boundary += 1
            # A write to the TPM that is under way may have come to pass or not.
            anchors = list(dict.fromkeys((marks.get("anchor", ""), marks.get("anchoring", ""))))
        elif entry.count:
            under_way.append(entry)
    raise ValueError("the log ends before its last mark")


def anchorings(entries: list[Entry]) -> list[tuple[int, str]]:
    """Every value that was anchored, with the position of its mark."""
    marks = ((position, *_mark(entry)) for position, entry in enumerate(entries) if Flag.MARK in entry.flags)
    return [(position, value) for position, name, value in marks if name == "anchor"]


def answers(entries: list[Entry]) -> list[Answer]:
    """Every save that was answered."""
    anchor, found = "", []
    for position, entry in enumerate(entries):
        if Flag.MARK in entry.flags:
            name, value = _mark(entry)
            if name == "anchor":
                anchor = value
            elif name.startswith("state."):
                found.append(Answer(position, name.removeprefix("state."), int(value), anchor))
    return found


def _mark(entry: Entry) -> tuple[str, str]:
    name, _, value = entry.data.rstrip(b"\0").decode().partition("=")
    return name, value


def _apply(disk: bytearray, entry: Entry) -> None:
    start = entry.sector * SECTOR_BYTES
    # What a discarded sector reads as is the disk's own choice; this one zeroes it.
    data = entry.data if Flag.DISCARD not in entry.flags else bytes(entry.count * SECTOR_BYTES)
    disk[start : start + len(data)] = data
