"""Which software may run vTPMs on this host: the list, its rules, and what the root record stands for of it.

Pure. Imported by the stores and the manager. docs/state-format.md, "Launch policy".
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vtpm.errors import AccessDeniedError, ConflictError, NotFoundError, StateError, UsageError
from vtpm.vault.entries import microseconds, number_field, octets_field
from vtpm.vault.merkle import EMPTY_LEAF, leaf_hash
from vtpm.vault.records import MAX_ENGINE_VERSION

MAX_IMAGES = 1024
MAX_LABEL_CHARS = 64
_LABEL = b"vtpm launch policy v1"
_KIND = re.compile(r"[a-z][a-z0-9-]{0,15}")
_MEASUREMENT = re.compile(r"[0-9a-f]{64}")


class ImageState(enum.StrEnum):
    """Whether an image may run vTPMs."""

    ALLOWED = "allowed"
    RETIRED = "retired"


@dataclass(frozen=True)
class LaunchImage:
    """All that one domain runs, as one thing that is allowed or not.

    Args:
        kind: of domain.
        measurement: SHA-256 over it, in hex; with the kind, what it is known by.
        label: a name for people.
        engine_version: of the engine in it, MAJOR<<16 | MINOR<<8 | MICRO; 0: not known.
        changed_at: when it came to be in this state; with a time zone.
    """

    kind: str
    measurement: str
    label: str
    engine_version: int
    state: ImageState
    changed_at: datetime


class NewImages(enum.StrEnum):
    """What becomes of an image that was never seen."""

    ALLOW = "allow"
    REFUSE = "refuse"
    """But for the first of each kind, which a host must have."""


def check_image(image: LaunchImage) -> None:
    """Raise UsageError unless the image's fields are within their bounds."""
    if not _KIND.fullmatch(image.kind):
        raise UsageError(f"{image.kind[:32]!r} is no kind of domain")
    if not _MEASUREMENT.fullmatch(image.measurement):
        raise UsageError(
            f"{image.measurement[:80]!r} is no measurement", next_step="Give all 64 hexadecimal digits, in lower case"
        )
    if len(image.label) > MAX_LABEL_CHARS or not image.label.isprintable():
        raise UsageError(f"a label has at most {MAX_LABEL_CHARS} printable characters")
    if not 0 <= image.engine_version <= MAX_ENGINE_VERSION:
        raise UsageError(f"{image.engine_version} is no version of an engine")


def find(images: Iterable[LaunchImage], kind: str, measurement: str) -> LaunchImage | None:
    """Return the image in a list, or None."""
    return next((found for found in images if (found.kind, found.measurement) == (kind, measurement)), None)


def check_kind(images: Iterable[LaunchImage], kind: str, measurement: str) -> None:
    """Raise AccessDeniedError when an image is known as one of another kind: it runs another make, or elsewhere."""
    other = next((known.kind for known in images if known.measurement == measurement and known.kind != kind), None)
    if other is not None:
        raise AccessDeniedError(
            f"the image {measurement} is for vTPMs of the kind {other}; it runs none of the kind {kind}, and gets the"
            " state of none",
            next_step="Put back an image of the vTPM's own kind: vtpm image build, with its --make",
        )


def with_image(images: Sequence[LaunchImage], image: LaunchImage) -> list[LaunchImage]:
    """Return the list with an image, in the place of what it had for it. Raises ConflictError: there are MAX_IMAGES."""
    others = [found for found in images if (found.kind, found.measurement) != (image.kind, image.measurement)]
    if len(others) == MAX_IMAGES:
        raise ConflictError(f"{MAX_IMAGES} images are known to this host, which is the most")
    return sorted([*others, image], key=lambda found: (found.kind, found.measurement))


def retired(images: Sequence[LaunchImage], kind: str, measurement: str, now: datetime) -> LaunchImage:
    """Return an image as it is once it is retired. Raises NotFoundError: it is not in the list."""
    image = find(images, kind, measurement)
    if image is None:
        raise NotFoundError(
            f"there is no {kind} image {measurement[:80]}", next_step="See `vtpm policy images`, and give all of it"
        )
    return replace(image, state=ImageState.RETIRED, changed_at=now)


def admit(images: Sequence[LaunchImage], image: LaunchImage, new: NewImages) -> LaunchImage | None:
    """Decide whether an image may run.

    Args:
        image: as it would be if it were allowed now.
    Returns:
        The image if it is to be put in the list first, None when it is there and allowed.
    Raises:
        AccessDeniedError: it is retired, of another kind, or new and nobody has allowed it.
    """
    check_kind(images, image.kind, image.measurement)
    found = find(images, image.kind, image.measurement)
    if found is not None and found.state is ImageState.ALLOWED:
        return None
    how = f"Allow it with `vtpm policy allow-image {image.measurement} --label LABEL`, if you know where it comes from"
    if found is not None:
        raise AccessDeniedError(f"the {image.kind} image {image.measurement} ({found.label}) is retired", next_step=how)
    if new is NewImages.REFUSE and any(known.kind == image.kind for known in images):
        raise AccessDeniedError(f"the {image.kind} image {image.measurement} is new, and not allowed", next_step=how)
    return image


def check_engine(name: str, needs: int, image: LaunchImage) -> None:
    """Raise StateError when an image's engine, if it is known, is older than what a vTPM's state needs.

    Args:
        name: the vTPM's.
        needs: least engine version that reads all of its state.
    """
    if image.engine_version and image.engine_version < needs:
        raise StateError(
            f"vTPM {name} has state that needs libtpms {version_text(needs)}; the {image.kind} image"
            f" {image.measurement} has {version_text(image.engine_version)}",
            next_step="Go back to the newer image, or install one that is not older",
        )


def version_text(version: int) -> str:
    """Return an engine version as people write it."""
    return f"{version >> 16}.{version >> 8 & 0xFF}.{version & 0xFF}"


def policy_leaf(images: Sequence[LaunchImage]) -> bytes:
    """Return what stands for the list in the tree; that of an empty list is the empty leaf.

    Args:
        images: by kind and measurement, ascending.
    """
    if not images:
        return EMPTY_LEAF
    fields = [octets_field(_LABEL), number_field(len(images))]
    for image in images:
        fields += [
            octets_field(image.kind.encode()),
            octets_field(bytes.fromhex(image.measurement)),
            octets_field(image.label.encode()),
            number_field(image.engine_version),
            octets_field(image.state.encode()),
            number_field(microseconds(image.changed_at)),
        ]
    return leaf_hash(b"".join(fields))
