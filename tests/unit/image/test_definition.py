"""Definitions and locks: the ones that ship fit together, malformed ones are refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from vtpm.errors import UsageError
from vtpm.image.definition import (
    DEFINITION_FILE,
    Lock,
    Package,
    definition_file,
    encode_lock,
    lock_file,
    locked,
    read_definition,
    read_lock,
)
from vtpm.image.manifest import IMAGE_NAMES, make_of
from vtpm.tpm.types import Make

KERNEL = Package("linux-image-1", "6.1.1-1", "a" * 64, 5)


def test_shipped_lock_pins_every_package_when_read_with_the_shipped_definition() -> None:
    pinned = locked(read_definition(), read_lock())
    assert pinned[0].name.startswith("linux-image-")
    assert pinned[0].name.endswith("-cloud-amd64")
    assert len(pinned) == len(set(pinned)) == len(read_lock().packages)


def test_shipped_definition_has_no_shell_and_no_network_when_read() -> None:
    definition = read_definition()
    assert not {"busybox", "busybox-static", "dash", "bash"} & set(definition.packages)
    assert not [name for name in definition.kernel_modules if "net" in name]


def test_lock_comes_back_when_written(tmp_path: Path) -> None:
    lock = Lock(KERNEL.name, {KERNEL.name: KERNEL, "b": Package("bb", "1:2~3+b1", "b" * 64, 6)})
    path = tmp_path / "lock.toml"
    path.write_text(encode_lock(lock))
    assert read_lock(path) == Lock(KERNEL.name, {KERNEL.name: KERNEL, "bb": lock.packages["b"]})


def test_lock_is_refused_when_it_does_not_pin_its_kernel(tmp_path: Path) -> None:
    path = tmp_path / "lock.toml"
    path.write_text(encode_lock(Lock("linux-image-2", {KERNEL.name: KERNEL})))
    with pytest.raises(UsageError, match="linux-image-2"):
        read_lock(path)


def test_packages_are_named_when_the_lock_does_not_pin_them() -> None:
    with pytest.raises(UsageError, match="libtpms0"):
        locked(read_definition(), Lock(KERNEL.name, {KERNEL.name: KERNEL}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("linux-image-1", "-oDebug=1"),
        ("6.1.1-1", "1 2"),
        ("6.1.1-1", "-1"),
        ("a" * 64, "A" * 64),
        ("size = 5", "size = 'x'"),
        ("sha256", "sha1"),
        ("[[package]]", "[package]"),
        ("kernel", "karnel"),
        ("kernel =", "kernel"),
    ],
)
def test_lock_is_refused_when_malformed(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "lock.toml"
    path.write_text(encode_lock(Lock(KERNEL.name, {KERNEL.name: KERNEL})).replace(old, new))
    with pytest.raises(UsageError, match=r"lock\.toml"):
        read_lock(path)


@pytest.mark.parametrize("key", sorted(tomllib.loads(DEFINITION_FILE.read_text())))
@pytest.mark.parametrize("value", [5, ["a b"], {"A": "x"}], ids=str)
def test_definition_is_refused_when_a_value_is_of_another_form(tmp_path: Path, key: str, value: object) -> None:
    text = DEFINITION_FILE.read_text()
    document = tomllib.loads(text)
    document[key] = value
    path = tmp_path / "definition.toml"
    # Good enough a writer: every string in these documents is printable ASCII.
    flat = {name: item for name, item in document.items() if not isinstance(item, dict)}
    tables = {name: item for name, item in document.items() if isinstance(item, dict)}
    lines = [f"{name} = {item!r}" for name, item in flat.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{word!r} = {reason!r}" for word, reason in table.items())]
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="no definition"):
        read_definition(path)


def test_definition_is_refused_when_it_has_a_key_that_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "definition.toml"
    path.write_text("shell = true\n" + DEFINITION_FILE.read_text())
    with pytest.raises(UsageError, match="'shell'"):
        read_definition(path)


def test_definition_is_refused_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_definition(tmp_path / "none")


@pytest.mark.parametrize("make", Make)
def test_every_make_has_a_definition_a_lock_and_images_that_say_so(make: Make) -> None:
    definition = read_definition(definition_file(make))
    assert definition.name == IMAGE_NAMES[make]
    assert make_of(definition.command_line) is make
    assert locked(definition, read_lock(lock_file(make)))


def test_definition_has_all_of_that_which_it_is_based_on_and_its_own() -> None:
    base, foreign = read_definition(), read_definition(definition_file(Make.SWTPM))
    assert (foreign.kernel, foreign.kernel_modules, foreign.left_out) == (
        base.kernel, base.kernel_modules, base.left_out
    )  # fmt: skip
    assert base.programs == () and foreign.programs == ("usr/bin/swtpm",)
    assert foreign.stdlib - base.stdlib == {"signal"}
    assert foreign.packages.items() > base.packages.items()
    assert foreign.build_packages == base.build_packages
    assert foreign.command_line == f"{base.command_line} vtpm.make=swtpm"


@pytest.mark.parametrize(
    "line", ['based_on = "none"', 'based_on = "../vtpmd"', "based_on = 5", 'programs = ["/bin/sh"]']
)
def test_definition_is_refused_when_its_base_or_a_program_is_not_one(tmp_path: Path, line: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f"{line}\n{DEFINITION_FILE.read_text()}")
    with pytest.raises(UsageError):
        read_definition(path)
