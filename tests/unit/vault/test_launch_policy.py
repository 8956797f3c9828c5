"""The launch policy: who may run, what the root record stands for of it, and its bounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vtpm.errors import AccessDeniedError, ConflictError, NotFoundError, StateError, UsageError
from vtpm.vault.launch_policy import (
    MAX_IMAGES,
    ImageState,
    LaunchImage,
    NewImages,
    admit,
    check_engine,
    check_image,
    find,
    policy_leaf,
    retired,
    with_image,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
IMAGE = LaunchImage("process", "ab" * 32, "first", 0x000902, ImageState.ALLOWED, NOW)
OTHER = replace(IMAGE, measurement="cd" * 32, label="second")
QEMU = replace(IMAGE, kind="qemu")
VECTORS = Path(__file__).parents[2] / "vectors" / "state" / "launch-policy-v1.json"


def vectors() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(VECTORS.read_text())
    return found


def image_in(row: dict[str, Any]) -> LaunchImage:
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=row["changed_at_us"])
    return LaunchImage(
        row["kind"], row["measurement"], row["label"], row["engine_version"], ImageState(row["state"]), when
    )


def independent_leaf(rows: list[dict[str, Any]]) -> bytes:
    """The leaf, straight from docs/state-format.md."""
    if not rows:
        return bytes(32)
    entry = b""
    values: list[bytes | int] = [b"vtpm launch policy v1", len(rows)]
    for row in rows:
        values += [row["kind"].encode(), bytes.fromhex(row["measurement"]), row["label"].encode()]
        values += [row["engine_version"], row["state"].encode(), row["changed_at_us"]]
    for value in values:
        data = value if isinstance(value, bytes) else value.to_bytes(8, "big")
        entry += len(data).to_bytes(4, "big") + data
    return hashlib.sha256(b"\0" + entry).digest()


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_leaf_is_that_of_an_independent_reader_when_the_vector_is_frozen(vector: dict[str, Any]) -> None:
    images = [image_in(row) for row in vector["images"]]
    assert policy_leaf(images).hex() == independent_leaf(vector["images"]).hex() == vector["leaf"]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "qemu"},
        {"measurement": "cd" * 32},
        {"label": "other"},
        {"engine_version": 0},
        {"state": ImageState.RETIRED},
        {"changed_at": NOW + timedelta(microseconds=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_leaf_is_another_when_a_field_is(change: dict[str, Any]) -> None:
    changed = replace(IMAGE, **change)
    assert len({policy_leaf([]), policy_leaf([IMAGE]), policy_leaf([changed]), policy_leaf([IMAGE, changed])}) == 4


def test_new_image_is_let_in_or_refused_as_the_host_is_set() -> None:
    assert admit([], IMAGE, NewImages.REFUSE) == IMAGE
    assert admit([replace(QEMU, measurement=OTHER.measurement)], IMAGE, NewImages.REFUSE) == IMAGE
    assert admit([OTHER], IMAGE, NewImages.ALLOW) == IMAGE
    assert admit([IMAGE], replace(IMAGE, label="again"), NewImages.REFUSE) is None
    with pytest.raises(AccessDeniedError, match="is new, and not allowed") as refused:
        admit([OTHER], IMAGE, NewImages.REFUSE)
    assert f"vtpm policy allow-image {IMAGE.measurement}" in refused.value.next_step


@pytest.mark.parametrize("new", NewImages)
@pytest.mark.parametrize("state", ImageState)
@pytest.mark.parametrize(("known", "asked"), [("qemu", "qemu-swtpm"), ("qemu-swtpm", "qemu"), ("process", "qemu")])
def test_image_of_one_make_runs_no_vtpm_of_another_whatever_the_host_is_set_to(
    known: str, asked: str, state: ImageState, new: NewImages
) -> None:
    image = replace(IMAGE, kind=known, state=state)
    own = replace(OTHER, kind=asked)
    with pytest.raises(AccessDeniedError, match=f"is for vTPMs of the kind {known}; it runs none of the kind {asked},"):
        admit([own, image], replace(IMAGE, kind=asked), new)
    assert admit([own, image], own, new) is None


@pytest.mark.parametrize("new", NewImages)
def test_retired_image_never_runs_whatever_the_host_is_set_to(new: NewImages) -> None:
    gone = retired([OTHER, IMAGE], "process", IMAGE.measurement, NOW)
    assert gone.state is ImageState.RETIRED
    with pytest.raises(AccessDeniedError, match=r"\(first\) is retired"):
        admit([gone, OTHER], IMAGE, new)
    # A kind all of whose images were retired is no new kind.
    if new is NewImages.REFUSE:
        with pytest.raises(AccessDeniedError, match="is new"):
            admit([gone], OTHER, new)


def test_retirement_is_refused_when_the_image_is_not_known() -> None:
    with pytest.raises(NotFoundError):
        retired([QEMU], "process", IMAGE.measurement, NOW)
    assert find([QEMU], "qemu", QEMU.measurement) == QEMU


def test_list_is_in_order_and_bounded_when_images_are_put_into_it() -> None:
    assert with_image([OTHER], IMAGE) == [IMAGE, OTHER]
    again = replace(IMAGE, label="renamed")
    assert with_image([IMAGE, QEMU], again) == [again, QEMU]
    full = [replace(IMAGE, measurement=f"{number:064x}") for number in range(MAX_IMAGES)]
    assert len(with_image(full, replace(full[0], label="renamed"))) == MAX_IMAGES
    with pytest.raises(ConflictError, match=f"{MAX_IMAGES} images"):
        with_image(full, IMAGE)


def test_older_engine_is_refused_by_name_when_state_needs_a_newer_one() -> None:
    check_engine("web1", 0x000902, IMAGE)
    check_engine("web1", 0x000A00, replace(IMAGE, engine_version=0))
    with pytest.raises(StateError, match=r"web1 has state that needs libtpms 0\.10\.0; .* has 0\.9\.2"):
        check_engine("web1", 0x000A00, IMAGE)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Process"},
        {"kind": ""},
        {"measurement": "ab" * 31},
        {"measurement": "AB" * 32},
        {"label": "x" * 65},
        {"label": "a\nb"},
        {"engine_version": -1},
        {"engine_version": 1 << 32},
    ],
    ids=str,
)
def test_image_is_refused_when_a_field_is_out_of_its_bounds(change: dict[str, Any]) -> None:
    check_image(IMAGE)
    with pytest.raises(UsageError):
        check_image(replace(IMAGE, **change))
