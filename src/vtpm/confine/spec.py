"""What the launcher tells the confinement program: who the instance is, what it runs, and its limits.

Pure; for the launcher, `spawn` and `steps`. Travels as one JSON object, bounded and read strictly: a field
that is missing, unknown, doubled or out of range is refused. It holds no secret, though it is kept out of
arguments.
"""

from __future__ import annotations

import enum
import json
import os.path
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from vtpm.errors import ConfinementError

MAX_SPEC_BYTES = 32 * 1024
MAX_DESCRIPTORS = 1024
MAX_ID = 2**31 - 1
MEBIBYTE = 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


class UserNamespace(enum.StrEnum):
    """Which user namespace the instance lives in."""

    HOST = "host"
    """The launcher is root: the instance gets a uid of its own in the launcher's user namespace."""
    OWN = "own"
    """The launcher is an ordinary user: a user namespace in which that user's uid alone is mapped."""


class AllowList(enum.StrEnum):
    """Which list of system calls is put on; see `policy`."""

    VTPMD = "vtpmd"
    RELAY = "relay"
    OWN = "own"
    """None: the program that the target executes brings a filter of its own. The lists forbid execve."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of one instance. Defaults suit a vtpmd."""

    memory_bytes: int = 256 * MEBIBYTE
    """Address space and data (RLIMIT_AS, RLIMIT_DATA)."""
    file_bytes: int = 0
    """How far a write may reach in a memfd that the target made (RLIMIT_FSIZE); there are no other files."""
    open_files: int = 64
    """One more than the highest descriptor (RLIMIT_NOFILE)."""
    processes: int = 16
    """Threads of the instance's uid (RLIMIT_NPROC)."""


_LIMIT_RANGES = {
    "memory_bytes": (32 * MEBIBYTE, 1 << 40),
    "file_bytes": (0, 64 * MEBIBYTE),
    "open_files": (8, MAX_DESCRIPTORS),
    "processes": (1, 4096),
}


@dataclass(frozen=True)
class Root:
    """What an instance sees of the host's files: nothing by default.

    Args:
        read_only: absolute paths of folders and device files that are there, read-only; a symbolic link is there as a
            link. For a program that the target executes.
        proc: whether /proc is there, of its own PID namespace alone.
    """

    read_only: tuple[str, ...] = ()
    proc: bool = False


@dataclass(frozen=True)
class ConfinementSpec:
    """Everything that the confinement program is told. Checked when made, so that one that exists is
    well-formed.

    Args:
        name: the vTPM's, for the process title: 1 to 64 of A-Z a-z 0-9 _ . - beginning with a letter or
            digit.
        uid: that the instance runs as, not 0; with UserNamespace.OWN the launcher's own.
        gid: likewise.
        target: "module:function". The module is imported before the lock-down. function(spec, keep_fds) is
            called when all but the seccomp filter is in force, may make threads, memfds and epoll objects,
            and returns a callable without arguments that serves and returns the exit status.
        import_paths: absolute folders that go behind the standard library in the import path.
        keep_fds: descriptors (3 and up) that the instance keeps, besides 0, 1, 2.
        hold_fd: the one of them whose hang-up means that the launcher is gone.
        user_namespace: see UserNamespace.
        limits: see Limits.
        program: what `ps` shows before the name.
        root: see Root.
        allow_list: see AllowList.
        target_args: a JSON object for the target, not looked at here.
    Raises:
        ConfinementError: a field is out of its range; the message names it.
    """

    name: str
    uid: int
    gid: int
    target: str
    import_paths: tuple[str, ...]
    keep_fds: tuple[int, ...]
    hold_fd: int
    user_namespace: UserNamespace
    limits: Limits = field(default_factory=Limits)
    program: str = "vtpmd"
    root: Root = field(default_factory=Root)
    allow_list: AllowList = AllowList.VTPMD
    target_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(isinstance(self.name, str) and bool(_NAME.fullmatch(self.name)), "name", "1 to 64 of A-Za-z0-9_.-")
        for name, value in (("uid", self.uid), ("gid", self.gid)):
            _require(_is_int(value, 1, MAX_ID), name, "a number above 0: an instance never runs as root")
        _require(
            isinstance(self.target, str) and bool(_TARGET.fullmatch(self.target)),
            "target",
            "of the form module:function",
        )
        _require(bool(self.import_paths) and all(map(_is_plain_path, self.import_paths)), "import_paths",
                 "absolute paths without . or .. in them")  # fmt: skip
        for name, (least, most) in _LIMIT_RANGES.items():
            _require(_is_int(getattr(self.limits, name), least, most), f"limits.{name}", f"{least} to {most}")
        _require(
            all(_is_int(fd, 3, self.limits.open_files - 1) for fd in self.keep_fds)
            and len(set(self.keep_fds)) == len(self.keep_fds),
            "keep_fds",
            "different numbers from 3 up, below limits.open_files",
        )
        _require(
            _is_int(self.hold_fd, 3, MAX_DESCRIPTORS) and self.hold_fd in self.keep_fds,
            "hold_fd",
            "one of keep_fds",
        )
        _require(isinstance(self.user_namespace, UserNamespace), "user_namespace", "host or own")
        _require(isinstance(self.program, str) and bool(_NAME.fullmatch(self.program)), "program", "as name")
        _require(
            all(map(_is_plain_path, self.root.read_only)), "root.read_only", "absolute paths without . or .. in them"
        )
        _require(isinstance(self.root.proc, bool), "root.proc", "true or false")
        _require(isinstance(self.allow_list, AllowList), "allow_list", "vtpmd, relay or own")
        _require(isinstance(self.target_args, Mapping), "target_args", "a JSON object")


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_plain_path(path: object) -> bool:
    return (
        isinstance(path, str)
        and path.startswith("/")
        and not path.startswith("//")
        and path == os.path.normpath(path)
        and "\0" not in path
    )


def _require(holds: bool, name: str, form: str) -> None:
    if not holds:
        raise ConfinementError(f"the confinement spec's field {name} must be {form}")


def encode_spec(spec: ConfinementSpec) -> bytes:
    """Return the spec as JSON, at most MAX_SPEC_BYTES; raise ConfinementError if it is longer or not JSON."""
    try:
        encoded = json.dumps(asdict(spec), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ConfinementError(f"the confinement spec of {spec.name} cannot be written as JSON: {error}") from error
    if len(encoded) > MAX_SPEC_BYTES:
        raise ConfinementError(
            f"the confinement spec of {spec.name} has {len(encoded)} bytes, at most {MAX_SPEC_BYTES} go"
        )
    return encoded


def decode_spec(encoded: bytes) -> ConfinementSpec:
    """Read a spec.

    Args:
        encoded: the whole JSON object.
    Raises:
        ConfinementError: it is not exactly of the form that encode_spec writes.
    """
    if len(encoded) > MAX_SPEC_BYTES:
        raise ConfinementError(f"the confinement spec is longer than {MAX_SPEC_BYTES} bytes")
    try:
        content = json.loads(encoded, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfinementError("the confinement spec is not JSON") from error
    members = _members(content, {f.name for f in fields(ConfinementSpec)}, "the confinement spec")
    members["limits"] = Limits(
        **_members(members["limits"], {f.name for f in fields(Limits)}, "the confinement spec's field limits")
    )
    root = _members(members["root"], {f.name for f in fields(Root)}, "the confinement spec's field root")
    _require(isinstance(root["read_only"], list), "root.read_only", "a list")
    members["root"] = Root(tuple(root["read_only"]), root["proc"])
    for name in ("import_paths", "keep_fds"):
        _require(isinstance(members[name], list), name, "a list")
        members[name] = tuple(members[name])
    _require(members["user_namespace"] in list(UserNamespace), "user_namespace", "host or own")
    members["user_namespace"] = UserNamespace(members["user_namespace"])
    _require(members["allow_list"] in list(AllowList), "allow_list", "vtpmd, relay or own")
    members["allow_list"] = AllowList(members["allow_list"])
    return ConfinementSpec(**members)


def _members(content: object, names: set[str], what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfinementError(f"{what} is not a JSON object")
    if unknown := set(content) - names:
        raise ConfinementError(f"{what} has unknown fields: {', '.join(sorted(unknown))[:200]}")
    if missing := names - set(content):
        raise ConfinementError(f"{what} lacks fields: {', '.join(sorted(missing))}")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ConfinementError("the confinement spec has a field twice")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ConfinementError(f"the confinement spec has {name}, which is not JSON")
