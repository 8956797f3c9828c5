"""Which image a virtual machine's domain opens: the newest of its own make, and none that is of another."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest

from tests.unit.image.examples import EXAMPLE, write_image
from vtpm.domains.accelerator import TCG
from vtpm.domains.qemu import QemuDomain, newest_image
from vtpm.errors import ImageError, NotFoundError
from vtpm.image.manifest import Manifest
from vtpm.tpm.types import Make

FOREIGN = dataclasses.replace(EXAMPLE, name="swtpm", command_line=f"{EXAMPLE.command_line} vtpm.make=swtpm")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_image(tmp_path)
    write_image(tmp_path, FOREIGN)
    return tmp_path


def prepared(images: Path, make: Make) -> QemuDomain:
    domain = QemuDomain(images, TCG, 96, make)
    asyncio.run(domain.prepare())
    return domain


def test_each_make_opens_its_own_image_whichever_was_built_last(images: Path) -> None:
    for built_last in (EXAMPLE, FOREIGN):
        os.utime(images / built_last.name / built_last.measurement)
        assert prepared(images, Make.LIBTPMS).measurement == EXAMPLE.measurement
        assert prepared(images, Make.SWTPM).measurement == FOREIGN.measurement


def test_newest_of_a_makes_images_is_opened_when_there_are_more(images: Path) -> None:
    newer = write_image(images, dataclasses.replace(FOREIGN, command_line=f"{FOREIGN.command_line} quiet"))
    os.utime(newer, (2e9, 2e9))
    assert newest_image(images, Make.SWTPM) == newer


@pytest.mark.parametrize(("make", "other"), [(Make.LIBTPMS, FOREIGN), (Make.SWTPM, EXAMPLE)], ids=["libtpms", "swtpm"])
def test_image_of_another_make_is_refused_where_one_of_this_make_should_be(
    images: Path, make: Make, other: Manifest
) -> None:
    domain = prepared(images, make)
    before = domain.measurement
    # In the other's place, and in its words all that is not measured.
    own = EXAMPLE if make is Make.LIBTPMS else FOREIGN
    put = write_image(images, dataclasses.replace(other, name=own.name))
    os.utime(put, (2e9, 2e9))
    with pytest.raises(ImageError, match=f"is of the make {other.make}; a vTPM of the make {make}"):
        asyncio.run(domain.prepare())
    assert domain.measurement == before


@pytest.mark.parametrize("make", Make)
def test_start_says_how_to_build_when_there_is_no_image_of_the_make(tmp_path: Path, make: Make) -> None:
    write_image(tmp_path, EXAMPLE if make is Make.SWTPM else FOREIGN)
    with pytest.raises(NotFoundError, match=f"no image of a virtual machine for vTPMs of the make {make}") as refused:
        newest_image(tmp_path, make)
    assert refused.value.next_step == f"Build one: vtpm image build --make {make}"
