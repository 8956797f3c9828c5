"""What an image is made of: a definition, written by hand, and a lock, written by `vtpm image lock`. For the builder.

Both are TOML. The definition names packages, modules and the kernel's command line; the lock has each package's version
and hash.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtpm.errors import UsageError
from vtpm.image.manifest import IMAGE_NAMES
from vtpm.tpm.types import Make

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# Debian policy 5.6.1, 5.6.12: they become words of commands, so nothing else is taken.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]+")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+~:-]*")
_PROGRAM = re.compile(r"usr/bin/[A-Za-z0-9_.+-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def definition_file(make: Make) -> Path:
    """Return the file of this version's definition of a make's image."""
    return Path(__file__).with_name(f"{IMAGE_NAMES[make]}.toml")


def lock_file(make: Make) -> Path:
    """Return the file of this version's lock of a make's image."""
    return Path(__file__).with_name(f"{IMAGE_NAMES[make]}.lock.toml")


DEFINITION_FILE = definition_file(Make.LIBTPMS)
LOCK_FILE = lock_file(Make.LIBTPMS)


@dataclass(frozen=True)
class Definition:
    """An image's definition; packages with the reason for each, programs beside the interpreter by their files."""

    name: str
    entry: str
    command_line: str
    kernel: str
    kernel_modules: tuple[str, ...]
    programs: tuple[str, ...]
    stdlib: frozenset[str]
    left_out: tuple[str, ...]
    packages: Mapping[str, str]
    build_packages: Mapping[str, str]


@dataclass(frozen=True)
class Package:
    """One pinned Debian package: SHA-256 of the file in hex, size in bytes."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def origin(self) -> str:
        """As it stands in manifests."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Lock:
    """An image's pinned packages by name; `kernel` is one of them."""

    kernel: str
    packages: Mapping[str, Package]


def read_definition(path: Path = DEFINITION_FILE) -> Definition:
    """Return a definition.

    One that is `based_on` another in the same folder has all of that, its own words in place of the other's, and its
    own lists and packages beside the other's.

    Raises:
        UsageError: the file cannot be read or is malformed.
    """
    document = _read(path)
    try:
        if "based_on" in document:
            base = _text(document.pop("based_on"), _NAME)
            document = _merged(_read(path.with_name(f"{base}.toml")), document)
        definition = Definition(
            name=_text(document.pop("name"), _NAME),
            entry=_text(document.pop("entry"), _MODULE),
            command_line=_text(document.pop("command_line")),
            kernel=_text(document.pop("kernel"), _PACKAGE),
            kernel_modules=_texts(document.pop("kernel_modules"), re.compile(r"\w+")),
            programs=_texts(document.pop("programs", []), _PROGRAM),
            stdlib=frozenset(_texts(document.pop("stdlib"), _MODULE)),
            left_out=_texts(document.pop("left_out"), _MODULE),
            packages=_packages(document.pop("packages")),
            build_packages=_packages(document.pop("build_packages")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no definition of an image: {error}") from error
    if document:
        raise UsageError(f"{path} is no definition of an image: it has {min(document)!r}, which means nothing")
    return definition


def read_lock(path: Path = LOCK_FILE) -> Lock:
    """Return a lock.

    Raises:
        UsageError: the file cannot be read or is malformed.
    """
    document = _read(path)
    try:
        found = [
            Package(
                _text(item["name"], _PACKAGE),
                _text(item["version"], _VERSION),
                _text(item["sha256"], _SHA256),
                int(item["size"]),
            )
            for item in document["package"]
        ]
        lock = Lock(_text(document["kernel"], _PACKAGE), {package.name: package for package in found})
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no lock of an image: {error}", next_step="Renew it: vtpm image lock") from error
    if lock.kernel not in lock.packages:
        raise UsageError(f"{path} does not pin the kernel {lock.kernel}", next_step="Renew it: vtpm image lock")
    return lock


def encode_lock(lock: Lock) -> str:
    """Return the lock as TOML, packages in the order of their names."""
    lines = ["# Written by `vtpm image lock`.", f"kernel = {json.dumps(lock.kernel)}"]
    for _, package in sorted(lock.packages.items()):
        lines += ["", "[[package]]"]
        lines += [f"{key} = {json.dumps(getattr(package, key))}" for key in ("name", "version", "sha256", "size")]
    return "\n".join(lines) + "\n"


def locked(definition: Definition, lock: Lock) -> tuple[Package, ...]:
    """Return what the lock pins of the definition's packages, the kernel first.

    Raises:
        UsageError: the lock does not pin one of them.
    """
    names = [lock.kernel, *definition.packages, *definition.build_packages]
    missing = [name for name in names if name not in lock.packages]
    if missing:
        raise UsageError(f"the lock does not pin {', '.join(missing)}", next_step="Renew it: vtpm image lock")
    return tuple(lock.packages[name] for name in names)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = {**base, **own}
    for name in base.keys() & own.keys():
        if isinstance(base[name], list) and isinstance(own[name], list):
            merged[name] = base[name] + own[name]
        elif isinstance(base[name], dict) and isinstance(own[name], dict):
            merged[name] = {**base[name], **own[name]}
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}") from error


def _packages(value: Any) -> dict[str, str]:
    return {_text(name, _PACKAGE): _text(reason) for name, reason in dict(value).items()}


def _texts(value: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return tuple(_text(item, form) for item in value)


def _text(value: Any, form: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value.isascii():
        raise ValueError(f"{value!r} is no printable text")
    if form is not None and not form.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form that it must have")
    return value
