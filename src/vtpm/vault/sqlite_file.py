"""The SQLite file of a vault: made, checked and opened; docs/state-format.md, "SQLite store".

Knows files, pragmas and the schema, and what errors of SQLite mean to a caller; no operation of a store.
Imported by sqlite_anchored alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from vtpm.errors import StateError, StoreError

DATABASE_NAME = "vtpm.db"
APPLICATION_ID = 0x7674706D
SCHEMA_VERSION = 5
POLICY_SCHEMA = """
CREATE TABLE launch_image (
    kind TEXT NOT NULL,
    measurement TEXT NOT NULL,
    label TEXT NOT NULL,
    engine_version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('allowed', 'retired')),
    changed_at_us INTEGER NOT NULL,
    PRIMARY KEY (kind, measurement)
) STRICT
"""
"""What version 2 has not; a store of version 2 gets it with its first image."""
HOLDINGS_SCHEMA = """
CREATE TABLE holding (
    vtpm_id BLOB PRIMARY KEY CHECK (length(vtpm_id) = 16),
    name TEXT NOT NULL,
    standing TEXT NOT NULL CHECK (standing IN ('absent', 'held', 'frozen', 'moved', 'inert')),
    epoch INTEGER NOT NULL CHECK (epoch >= 0),
    migration_id BLOB NOT NULL,
    peer TEXT NOT NULL,
    digest BLOB NOT NULL,
    mode INTEGER NOT NULL CHECK (mode BETWEEN 1 AND 3),
    adopted BLOB NOT NULL
) STRICT
"""
"""What versions before 5 have not; a store of theirs gets it with the first move of a vTPM."""
DOMAINS_OF_3 = frozenset({"process", "qemu", "xen"})
"""What versions 2 and 3 have as `domain`; a store of theirs becomes one of this version with its first other vTPM."""
SYNCHRONOUS = "FULL"
"""Each commit flushes the write-ahead log before it returns; what "answered means durable" rests on."""

_UNANCHORED_SCHEMA = 1
_WITHOUT_POLICY = 2
_WITHOUT_MAKES = 3
_WITHOUT_HOLDINGS = 4
_FILE_MAGIC = b"SQLite format 3\0"
_FILE_HEADER_BYTES = 100
_APPLICATION_ID_OFFSET = 68
_WAL_LIMIT_BYTES = 8 * 1024 * 1024
_COPY_BYTES = 1024 * 1024

# What may pass: a full disk, a device that failed for a moment, somebody's lock, a read-only file system.
_TRANSIENT_CODES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    }
)
# SQLITE_ERROR: the SQL does not fit the tables, which are then not those that this program made.
_DAMAGE_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})

_SCHEMA = """
CREATE TABLE vault_schema (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL
) STRICT;
CREATE TABLE root (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    record BLOB NOT NULL
) STRICT;
CREATE TABLE vtpm (
    id BLOB PRIMARY KEY CHECK (length(id) = 16),
    slot INTEGER NOT NULL UNIQUE CHECK (slot BETWEEN 0 AND 1048575),
    name TEXT NOT NULL UNIQUE,
    owner_uid INTEGER NOT NULL,
    owner_gid INTEGER NOT NULL,
    vm_uuid BLOB CHECK (length(vm_uuid) = 16),
    tpm_version TEXT NOT NULL,
    domain TEXT NOT NULL,
    created_at_us INTEGER NOT NULL,
    epoch INTEGER NOT NULL CHECK (epoch >= 1),
    lifecycle TEXT NOT NULL,
    permit_state TEXT NOT NULL DEFAULT 'open',
    permit_id BLOB CHECK (length(permit_id) = 16),
    wrapped_key BLOB,
    state_version INTEGER NOT NULL DEFAULT 0,
    instance_id BLOB UNIQUE CHECK (length(instance_id) = 16),
    engine_version INTEGER NOT NULL DEFAULT 0,
    CHECK (permit_state IN ('open', 'issued', 'consumed')),
    CHECK ((permit_state = 'open') = (permit_id IS NULL))
) STRICT;
CREATE TABLE state (
    vtpm_id BLOB NOT NULL REFERENCES vtpm (id) ON DELETE CASCADE,
    kind INTEGER NOT NULL CHECK (kind BETWEEN 1 AND 3),
    version INTEGER NOT NULL CHECK (version >= 1),
    epoch INTEGER NOT NULL,
    digest BLOB NOT NULL CHECK (length(digest) = 32),
    envelope BLOB NOT NULL,
    PRIMARY KEY (vtpm_id, kind)
) STRICT;
CREATE TABLE save_mark (
    vtpm_id BLOB PRIMARY KEY REFERENCES vtpm (id) ON DELETE CASCADE,
    instance_id BLOB NOT NULL CHECK (length(instance_id) = 16),
    seq INTEGER NOT NULL,
    digest BLOB NOT NULL CHECK (length(digest) = 32),
    version INTEGER NOT NULL
) STRICT;
CREATE TABLE event (
    event_id INTEGER PRIMARY KEY,
    time_us INTEGER NOT NULL,
    actor_uid INTEGER,
    kind TEXT NOT NULL,
    vtpm_name TEXT,
    vtpm_id BLOB,
    detail TEXT NOT NULL,
    head BLOB NOT NULL CHECK (length(head) = 32)
) STRICT;
"""


_SELECT_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"
# Holds nothing of its own, so it belongs to no schema version: a database that lacks it gets it when it is opened.
_OWNER_INDEX = "CREATE INDEX IF NOT EXISTS vtpm_by_owner ON vtpm (owner_uid, name)"


@contextlib.contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into those a store raises; others are bugs and pass."""
    try:
        yield
    except sqlite3.Error as error:
        # Errors of Python's module itself carry no code; the operational one says that a text is not UTF-8.
        unnamed = sqlite3.SQLITE_CORRUPT if isinstance(error, sqlite3.OperationalError) else 0
        code = getattr(error, "sqlite_errorcode", unnamed) & 0xFF
        if code in _TRANSIENT_CODES:
            raise StoreError(
                f"{path}: {error} ({getattr(error, 'sqlite_errorname', '')}); nothing was acknowledged",
                next_step="Check free space, permissions and the health of the disk.",
            ) from error
        if code in _DAMAGE_CODES:
            raise damaged(path, str(error)) from error
        raise
    except UnicodeDecodeError as error:
        # Python's module cannot even show what SQLite found in the schema.
        raise damaged(path, "it holds text that is none") from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; nothing was acknowledged") from error


def damaged(path: Path, cause: str) -> StateError:
    """Return the error for a database that must not be used."""
    return StateError(
        f"{path} is damaged or not this program's: {cause}",
        next_step="It was left as it is. Restore it from a backup, or keep it as evidence.",
    )


def lock_directory(directory: Path) -> int:
    """Make the directory if need be, check it and lock it for this process.

    Returns:
        Its descriptor; the lock lasts until that is closed.
    Raises:
        StateError: it is not a directory of this user alone.
        StoreError: another process has the lock, or the file system failed.
    """
    with translated_errors(directory):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise StateError(f"{directory} is not a directory") from error
            raise
        try:
            _check_private(directory, os.fstat(fd))
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise StoreError(
                f"{directory} is in use by another process", next_step="Stop the other manager first."
            ) from error
        except BaseException:
            os.close(fd)
            raise
    return fd


def open_database(
    directory: Path, first_record: Callable[[], bytes], verify: Callable[[sqlite3.Connection], None] | None = None
) -> sqlite3.Connection:
    """Open the vault's database in a locked directory, making it if it was never there.

    Args:
        first_record: called when there is none; returns the root record to begin with, or raises.
        verify: given the content to read, whose pages are sound, before anything is changed; raises if it is refused.
    Raises:
        StateError: damaged, another application's, of another schema, or as `verify` does; no file was changed.
        StoreError: it cannot be reached at the moment.
    """
    path = directory / DATABASE_NAME
    with translated_errors(path):
        if not path.is_symlink() and not path.exists():
            _create(directory, first_record)
        # At each opening: whoever made the file, its log or the directory may have been killed before these.
        _fsync_directory(directory)
        _fsync_directory(directory.parent)
        _check_file(path)
        if verify is not None:
            with _view(path) as view:
                _check_schema(view, path)
                _check_pages(view, path)
                verify(view)
        # The first name of the file just made, or made by one who was killed here.
        path.with_name(f"{DATABASE_NAME}.new").unlink(missing_ok=True)
        _rewrite_log(path)
        db = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=0,
        )
        try:
            _configure(db, path)
            _check_schema(db, path)
            db.execute(_OWNER_INDEX)
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def _view(path: Path) -> Iterator[sqlite3.Connection]:
    """Give the content of file and log to read, and leave both as they are.

    Whoever closes a database with a log moves the log's pages into the file, and would so change what is evidence. So
    the file is read by another name, under which SQLite cannot write it and finds a copy of the log.
    """
    view = path.with_name(f"{DATABASE_NAME}.check")
    _remove_view(view)
    try:
        os.link(path, view)
        _copy_log(path, view)
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(view))}?mode=ro", uri=True, isolation_level=None, timeout=0)
        ) as db:
            (journal_mode,) = db.execute("PRAGMA journal_mode").fetchone()
            if journal_mode != "wal":
                raise damaged(path, f"its journal mode is {journal_mode}")
            _distrust(db)
            yield db
    finally:
        _remove_view(view)


def _remove_view(view: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        view.with_name(view.name + suffix).unlink(missing_ok=True)


def _copy_log(path: Path, view: Path) -> None:
    try:
        source = os.open(path.with_name(f"{path.name}-wal"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(source, "rb") as log, view.with_name(f"{view.name}-wal").open("xb") as copy:
        while chunk := log.read(_COPY_BYTES):
            copy.write(chunk)


def _create(directory: Path, first_record: Callable[[], bytes]) -> None:
    """Make a complete database under another name, then give it its own: an unfinished one is never found.

    The names are not on the disk yet when this returns.
    """
    path = directory / DATABASE_NAME
    log = path.with_name(f"{DATABASE_NAME}-wal")
    if log.exists():
        raise StateError(f"{path} is missing although {log} is there", next_step="Restore both, or move both away.")
    record = first_record()
    draft = path.with_name(f"{DATABASE_NAME}.new")
    for suffix in ("", "-journal", "-wal", "-shm"):
        draft.with_name(draft.name + suffix).unlink(missing_ok=True)
    # SQLite gives its own side files the mode of the database.
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(f"BEGIN; {_SCHEMA}{POLICY_SCHEMA};{HOLDINGS_SCHEMA};")
        db.execute(_OWNER_INDEX)
        db.execute("INSERT INTO vault_schema (one, version) VALUES (1, ?)", (SCHEMA_VERSION,))
        db.execute("INSERT INTO root (one, record) VALUES (1, ?)", (record,))
        db.execute("COMMIT")
    if draft.with_name(f"{draft.name}-wal").exists():
        raise StoreError(f"{draft} could not be completed; nothing was acknowledged")
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    # A link refuses to replace what is there, which a rename does not.
    os.link(draft, path)


def _check_file(path: Path) -> None:
    """Refuse a foreign or damaged file before SQLite touches it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise damaged(path, "it is a symbolic link") from error
        raise
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise damaged(path, "it is not a regular file")
        _check_private(path, info)
        header = file.read(_FILE_HEADER_BYTES)
    if len(header) < _FILE_HEADER_BYTES or not header.startswith(_FILE_MAGIC):
        raise damaged(path, "it does not begin as a database does")
    application_id = int.from_bytes(header[_APPLICATION_ID_OFFSET : _APPLICATION_ID_OFFSET + 4], "big")
    if application_id != APPLICATION_ID:
        raise damaged(path, f"its application id is {application_id:#x}, not {APPLICATION_ID:#x}")
    # With a log, a checkpoint may have been cut short, and the log makes the file whole again.
    expected_bytes = _page_bytes(header) * int.from_bytes(header[28:32], "big")
    if info.st_size != expected_bytes and _is_empty(path.with_name(f"{path.name}-wal")):
        raise damaged(path, f"it has {info.st_size} bytes, its header says {expected_bytes}")


def _page_bytes(header: bytes) -> int:
    # 1 stands for 65536: SQLite file format, "Page Size".
    size = int.from_bytes(header[16:18], "big")
    return 65536 if size == 1 else size


def _is_empty(log: Path) -> bool:
    return not log.exists() or log.stat().st_size == 0


def _rewrite_log(path: Path) -> None:
    """Write the log's bytes again and flush them, before SQLite builds on them.

    After a flush that failed, a kernel may hold pages that are not on disk and yet count as clean. Whoever
    reads them as committed and appends to them would lose its own commits with them at a power loss.
    """
    log = path.with_name(f"{path.name}-wal")
    try:
        fd = os.open(log, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(fd, "r+b", buffering=0) as file:
        offset = 0
        while chunk := os.pread(fd, _COPY_BYTES, offset):
            offset += os.pwrite(fd, chunk, offset)
        os.fsync(file.fileno())


def _configure(db: sqlite3.Connection, path: Path) -> None:
    # Exclusive locking comes first: then the index of the log is in memory and no shared file exists.
    db.execute("PRAGMA locking_mode=EXCLUSIVE")
    (journal_mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
    if journal_mode != "wal":
        raise damaged(path, f"its journal mode is {journal_mode}")
    db.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    db.execute("PRAGMA foreign_keys=ON")
    db.execute("PRAGMA secure_delete=ON")
    _distrust(db)
    db.execute("PRAGMA temp_store=MEMORY")
    # In KiB: rows and indexes of some 10,000 vTPMs, so that a save of one finds them in memory.
    db.execute("PRAGMA cache_size=-16384")
    db.execute(f"PRAGMA journal_size_limit={_WAL_LIMIT_BYTES}")


def _distrust(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA trusted_schema=OFF")
    db.execute("PRAGMA cell_size_check=ON")


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'vault_schema'").fetchone() is None:
        raise damaged(path, "it has no table vault_schema")
    row = db.execute("SELECT version FROM vault_schema").fetchone()
    version = row[0] if row else 0
    if version > SCHEMA_VERSION:
        raise StateError(
            f"{path} has schema version {version}; this program knows {SCHEMA_VERSION}",
            next_step="Use the newer program; nothing was changed.",
        )
    if version == _UNANCHORED_SCHEMA:
        raise StateError(
            f"{path} has schema version {version}, of a time before the first release; this program reads"
            f" {_WITHOUT_POLICY} to {SCHEMA_VERSION}",
            next_step="Use the program that wrote it, or move its directory away and begin anew.",
        )
    if version not in (_WITHOUT_POLICY, _WITHOUT_MAKES, _WITHOUT_HOLDINGS, SCHEMA_VERSION):
        raise damaged(path, f"its schema version is {version}")
    _check_made_here(db, path, version)


def _check_made_here(db: sqlite3.Connection, path: Path, version: int) -> None:
    """Refuse what the root record does not cover and SQLite obeys: a trigger's rows would be signed as our own."""
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.executescript(_SCHEMA + ("" if version == _WITHOUT_POLICY else f"{POLICY_SCHEMA};"))
        if version == SCHEMA_VERSION:
            made.executescript(HOLDINGS_SCHEMA)
        least = set(made.execute(_SELECT_SCHEMA))
        made.execute(_OWNER_INDEX)
        most = set(made.execute(_SELECT_SCHEMA))
    if not least <= set(db.execute(_SELECT_SCHEMA)) <= most:
        raise damaged(path, "its schema is not the one that it was made with")


def _check_pages(db: sqlite3.Connection, path: Path) -> None:
    (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise damaged(path, verdict)


def _check_private(path: Path, info: os.stat_result) -> None:
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise StateError(
            f"{path} belongs to uid {info.st_uid} and mode {stat.S_IMODE(info.st_mode):04o}, open to others",
            next_step="Give it to the manager's user and take all rights from group and others.",
        )


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
