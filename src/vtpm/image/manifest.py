"""What an image is: the manifest beside it, and its measurement. Pure and bounded; for builder, launcher, command line.

The measurement covers the kernel, the initramfs and the command line: all that the virtual machine runs. The list of
files tells a reader what is in the initramfs; nothing is decided by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from vtpm.errors import ImageError
from vtpm.tpm.types import Make

FORMAT = 1
KERNEL, INITRAMFS, MANIFEST = "vmlinuz", "initramfs", "manifest.json"
"""Names of an image's three files; the manifest cannot name others."""
IMAGE_NAMES = {Make.LIBTPMS: "vtpmd", Make.SWTPM: "swtpm"}
"""Name of the definition of each make's image, so of its file and of the folder that images of it are in."""
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_PART_BYTES = 64 * 1024 * 1024
"""Of kernel and initramfs, each."""
MAX_COMMAND_LINE_BYTES = 2047
"""Linux, COMMAND_LINE_SIZE on x86, without its final NUL."""
MAX_ENGINE_VERSION = 0xFFFFFF
_MAKE = "vtpm.make="
_MAX_FILES = 4096
_MAX_TEXT = 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """Kernel or initramfs: SHA-256 in hex, size in bytes, and where it comes from."""

    sha256: str
    size: int
    origin: str


@dataclass(frozen=True)
class ListedFile:
    """One file of the initramfs: absolute path, SHA-256 in hex, size in bytes, and where it comes from."""

    path: str
    sha256: str
    size: int
    origin: str


@dataclass(frozen=True)
class Manifest:
    """One image.

    Args:
        name: of its definition.
        kernel, initramfs: its parts.
        command_line: the kernel's, as measured.
        engine_version: of the engine inside, MAJOR<<16 | MINOR<<8 | MICRO: state that needs a later one is not for it.
        unpacked_bytes: of the initramfs in the machine's memory.
        built_with: tools that had a part in its bytes and are not pinned by the lock.
        files: what the initramfs holds.
    """

    name: str
    kernel: Part
    initramfs: Part
    command_line: str
    engine_version: int
    unpacked_bytes: int
    built_with: tuple[str, ...]
    files: tuple[ListedFile, ...]

    @property
    def measurement(self) -> str:
        """See `measure`."""
        return measure(self.kernel.sha256, self.initramfs.sha256, self.command_line)

    @property
    def make(self) -> Make:
        """Of the vTPMs that it runs; see `make_of`."""
        return make_of(self.command_line)


def make_of(command_line: str) -> Make:
    """Return the make that the kernel's command line names, where it is measured; the kernel itself passes it over.

    Raises:
        ValueError: it names more than one, or one that is not known.
    """
    named = {word.removeprefix(_MAKE) for word in command_line.split() if word.startswith(_MAKE)}
    if len(named) > 1:
        raise ValueError("the command line names more than one make")
    return Make(named.pop()) if named else Make.LIBTPMS


def measure(kernel_sha256: str, initramfs_sha256: str, command_line: str) -> str:
    """Return an image's measurement in hex: SHA-256 over a label and the three, each after its length (u32 big-endian).

    Args:
        kernel_sha256, initramfs_sha256: in hex; their 32 bytes are what counts.
        command_line: counted as UTF-8.
    """
    total = hashlib.sha256(b"vtpm image 1")
    for item in (bytes.fromhex(kernel_sha256), bytes.fromhex(initramfs_sha256), command_line.encode()):
        total.update(len(item).to_bytes(4, "big") + item)
    return total.hexdigest()


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as it stands beside an image: JSON with its measurement, the same bytes for the same one."""
    document = {"format": FORMAT, "measurement": manifest.measurement, **dataclasses.asdict(manifest)}
    return json.dumps(document, indent=1, sort_keys=True).encode("ascii") + b"\n"


def decode(data: bytes) -> Manifest:
    """Return the manifest in `data`.

    Raises:
        ImageError: it is too large, malformed, of another format, or its measurement is not that of its content.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ImageError(f"the image's {MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"the image's {MANIFEST} is no JSON") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ImageError(
            f"the image's {MANIFEST} is not of format {FORMAT}",
            next_step="Build the image with this version of vtpm: vtpm image build",
        )
    try:
        stated = document.pop("measurement")
        manifest = Manifest(
            name=_text(document.pop("name"), _NAME),
            kernel=_part(document.pop("kernel")),
            initramfs=_part(document.pop("initramfs")),
            command_line=_text(document.pop("command_line")),
            engine_version=_number(document.pop("engine_version"), MAX_ENGINE_VERSION),
            unpacked_bytes=_number(document.pop("unpacked_bytes"), 2**32),
            built_with=tuple(_text(item) for item in _list(document.pop("built_with"))),
            files=tuple(_file(item) for item in _list(document.pop("files"))),
        )
        make_of(manifest.command_line)
        command_line_bytes = len(manifest.command_line.encode())
    except KeyError as error:
        raise ImageError(f"the image's {MANIFEST} has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ImageError(f"the image's {MANIFEST} is malformed: {error}") from error
    if document:
        raise ImageError(f"the image's {MANIFEST} has more than it may: {_shown(min(document))}")
    if command_line_bytes > MAX_COMMAND_LINE_BYTES:
        raise ImageError(f"the image's {MANIFEST} is malformed: the command line is too long")
    if stated != manifest.measurement:
        raise ImageError(f"the image's {MANIFEST} has been changed: its measurement is not that of its content")
    return manifest


def _part(value: Any) -> Part:
    fields = _fields(value, {"sha256", "size", "origin"})
    return Part(_text(fields["sha256"], _SHA256), _number(fields["size"], MAX_PART_BYTES), _text(fields["origin"]))


def _file(value: Any) -> ListedFile:
    fields = _fields(value, {"path", "sha256", "size", "origin"})
    return ListedFile(
        _text(fields["path"]),
        _text(fields["sha256"], _SHA256),
        _number(fields["size"], MAX_PART_BYTES),
        _text(fields["origin"]),
    )


def _fields(value: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"not an object of {', '.join(sorted(names))}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_FILES:
        raise ValueError(f"not a list of at most {_MAX_FILES}")
    return value


def _text(value: Any, form: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or len(value) > max(_MAX_TEXT, MAX_COMMAND_LINE_BYTES) or not value.isprintable():
        raise ValueError("a text is missing, too long or not printable")
    if form is not None and not form.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not of the form that it must have")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"a number is missing or not from 0 to {most}")
    return value


def _shown(text: str) -> str:
    return repr(text[:64])
