"""policy images, allow-image, retire-image and launches: what they ask of the manager, and what they print."""

from __future__ import annotations

import json

from tests.unit.cli.conftest import Cli
from tests.unit.client.canned_manager import IMAGE, LAUNCHES, CannedManager

MEASUREMENT = "cd" * 32


def test_images_are_listed_with_what_they_run(cli: Cli, manager: CannedManager) -> None:
    shown = cli("policy", "images")
    assert shown.status == 0
    for word in ("process", IMAGE.measurement, "first", "0.9.2", "allowed", "web1, web2"):
        assert word in shown.out
    manager.images[0].vtpms.clear()
    (listed,) = json.loads(cli("policy", "images", "--json").out)
    assert (listed["measurement"], listed["state"], listed["vtpms"]) == (IMAGE.measurement, "allowed", [])
    assert set(manager.methods()) == {"GET /v1/images"}


def test_image_is_allowed_with_its_label_and_warnings_go_to_stderr(cli: Cli, manager: CannedManager) -> None:
    done = cli("policy", "allow-image", MEASUREMENT, "--label", "next")
    assert done.status == 0
    assert done.out == f"process image {MEASUREMENT} (next) is allowed\n"
    assert "warning: its libtpms is old" in done.err
    assert manager.asked[-1].body == {"measurement": MEASUREMENT, "label": "next", "kind": None}
    done = cli("policy", "allow-image", MEASUREMENT, "--label", "next", "--kind", "qemu", "--json")
    assert json.loads(done.out)["image"]["kind"] == "qemu"
    assert "warning" in done.err
    assert manager.asked[-1].body["kind"] == "qemu"


def test_image_is_allowed_only_with_a_label_and_of_a_kind_that_exists(cli: Cli, manager: CannedManager) -> None:
    assert cli("policy", "allow-image", MEASUREMENT).status == 2
    assert cli("policy", "allow-image", MEASUREMENT, "--label", "x", "--kind", "floppy").status == 2
    assert manager.asked == []


def test_image_is_retired_when_told_so_twice(cli: Cli, manager: CannedManager) -> None:
    refused = cli("policy", "retire-image", MEASUREMENT)
    assert refused.status != 0
    assert "stays allowed" in refused.err
    assert manager.asked == []
    assert "is retired" in cli("policy", "retire-image", MEASUREMENT, "--yes").out
    assert json.loads(cli("policy", "retire-image", MEASUREMENT, "--yes", "--json").out)["state"] == "retired"


def test_launches_are_listed_with_gaps_and_doubts(cli: Cli) -> None:
    shown = cli("policy", "launches")
    assert shown.status == 0
    for word in ("sha256:12", LAUNCHES.value, LAUNCHES.log, "yes", "first", "dd" * 32, "something else extended it"):
        assert word in shown.out
    assert "warning: something else extended PCR 12" in shown.err
    listed = json.loads(cli("policy", "launches", "--json").out)
    assert listed["entries"][1] == {"kind": "", "measurement": "", "label": "", "held": "dd" * 32}
