"""The command that QEMU gets: nothing of the user's lost, the vTPM added once, a foreign VM or TPM refused."""

from __future__ import annotations

import re
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.client.canned_manager import RUNNING, VM_UUID
from vtpm.cli.qemu_command import build_command, check_command, detaches, device_model, escape_value
from vtpm.errors import UsageError
from vtpm.tpm.types import TpmVersion

QEMU = "/usr/bin/qemu-system-x86_64"
UNBOUND = replace(RUNNING, vm_uuid=None)
OTHER_UUID = UUID(int=VM_UUID.int ^ 1)

# Words that say nothing of a TPM, a device or a uuid.
harmless = st.lists(
    st.text(min_size=1, max_size=12).filter(
        lambda word: word.lstrip("-") not in ("tpmdev", "uuid", "device", "smbios", "daemonize")
    ),
    max_size=8,
)
paths = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=40).map(lambda text: f"/{text}")


def values(argument: str) -> dict[str, str]:
    """Read properties as QEMU does (get_opt_name and get_opt_value of util/qemu-option.c), one character at a time."""
    items, current, index = [], "", 0
    while index < len(argument):
        if argument[index] == ",":
            if argument[index + 1 : index + 2] != ",":
                items.append(current)
                current = ""
                index += 1
                continue
            index += 1
        current += argument[index]
        index += 1
    items.append(current)
    return dict(item.split("=", 1) for item in items if "=" in item)


def option(command: list[str], name: str) -> str:
    """Return the argument of the last such option."""
    index = len(command) - 1 - command[::-1].index(name)
    return command[index + 1]


def test_everything_is_added_when_the_command_says_nothing_of_it() -> None:
    assert build_command([QEMU, "-m", "512"], RUNNING) == [
        *(QEMU, "-m", "512"),
        *("-chardev", f"socket,id=vtpm-chr0,path={RUNNING.control_socket}"),
        *("-tpmdev", "emulator,id=vtpm0,chardev=vtpm-chr0"),
        *("-device", "tpm-crb,tpmdev=vtpm0"),
        *("-uuid", str(VM_UUID)),
    ]


@given(harmless, paths)
def test_the_users_words_come_first_and_the_path_arrives_when_they_are_any(words: list[str], path: str) -> None:
    built = build_command([QEMU, *words], replace(RUNNING, control_socket=path))
    assert built[: len(words) + 1] == [QEMU, *words]
    assert len(built) == len(words) + 1 + 8
    assert values(option(built, "-chardev")) == {"id": "vtpm-chr0", "path": path}
    assert option(built, "-uuid") == str(VM_UUID)


@given(paths)
def test_an_escaped_value_is_read_as_it_was_when_qemu_reads_it(path: str) -> None:
    assert values(f"socket,path={escape_value(path)},id=x") == {"path": path, "id": "x"}


@given(harmless)
def test_the_built_command_is_refused_when_it_is_built_on_again(words: list[str]) -> None:
    with pytest.raises(UsageError, match="has a TPM already"):
        build_command(build_command([QEMU, *words], RUNNING), RUNNING)


@given(harmless, harmless, st.sampled_from(["-tpmdev", "--tpmdev"]))
def test_a_tpm_of_its_own_is_refused_when_it_is_anywhere(before: list[str], after: list[str], name: str) -> None:
    with pytest.raises(UsageError, match="has a TPM already"):
        check_command([QEMU, *before, name, "passthrough,id=t", *after], UNBOUND)
    with pytest.raises(UsageError, match="has a TPM already"):
        check_command([QEMU, *before, name], UNBOUND)


# The VM's uuid


@pytest.mark.parametrize(
    "words",
    [
        ["-uuid", str(VM_UUID)],
        ["--uuid", str(VM_UUID).upper()],
        ["-smbios", f"type=1,manufacturer=x,uuid={VM_UUID}"],
        ["-uuid", str(VM_UUID), "-smbios", f"type=1,uuid={VM_UUID}"],
    ],
)
def test_no_uuid_is_added_when_the_command_has_the_vms(words: list[str]) -> None:
    built = build_command([QEMU, *words], RUNNING)
    assert built[: len(words) + 1] == [QEMU, *words]
    assert "-uuid" not in built[len(words) + 1 :]


@pytest.mark.parametrize(
    "words",
    [
        ["-uuid", str(OTHER_UUID)],
        ["--uuid", str(OTHER_UUID)],
        ["-uuid", "no-uuid"],
        ["-uuid", ""],
        ["-uuid"],
        ["-uuid", str(VM_UUID), "-uuid", str(OTHER_UUID)],
        ["-uuid", str(OTHER_UUID), "-uuid", str(VM_UUID)],
        ["-smbios", f"type=1,uuid={OTHER_UUID}"],
        ["-smbios", f"uuid={OTHER_UUID},serial=a,,b,type=1"],
        ["-uuid", str(VM_UUID), "-smbios", f"type=1,uuid={OTHER_UUID}"],
    ],
)
def test_another_vms_uuid_is_refused_when_the_vtpm_belongs_to_one(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"web1 belongs to the VM {VM_UUID}"):
        check_command([QEMU, *words], RUNNING)
    # A vTPM that belongs to no VM in particular takes any.
    built = build_command([QEMU, *words], UNBOUND)
    assert built[: len(words) + 1] == [QEMU, *words]
    assert "-uuid" not in built[len(words) + 1 :]


def test_no_uuid_is_taken_from_other_smbios_tables_when_they_have_one() -> None:
    built = build_command([QEMU, "-smbios", f"type=2,uuid={OTHER_UUID}"], RUNNING)
    assert option(built, "-uuid") == str(VM_UUID)


def test_no_uuid_is_added_when_the_vtpm_belongs_to_no_vm() -> None:
    assert "-uuid" not in build_command([QEMU], UNBOUND)


# The device


@pytest.mark.parametrize(
    ("program", "version", "model"),
    [
        ("qemu-system-x86_64", TpmVersion.V2_0, "tpm-crb"),
        ("qemu-system-x86_64", TpmVersion.V1_2, "tpm-tis"),
        ("/opt/q/qemu-system-i386", TpmVersion.V2_0, "tpm-crb"),
        ("/usr/bin/kvm", TpmVersion.V2_0, "tpm-crb"),
        ("/usr/libexec/qemu-kvm", TpmVersion.V1_2, "tpm-tis"),
        ("qemu-system-aarch64", TpmVersion.V2_0, "tpm-tis-device"),
        ("qemu-system-riscv64", TpmVersion.V2_0, "tpm-tis-device"),
        ("qemu-system-ppc64", TpmVersion.V2_0, "tpm-spapr"),
    ],
)
def test_the_device_fits_the_machine_when_the_user_names_none(program: str, version: TpmVersion, model: str) -> None:
    assert device_model(program, version) == model
    built = build_command([program], replace(UNBOUND, tpm_version=version))
    assert built[-2:] == ["-device", f"{model},tpmdev=vtpm0"]


@pytest.mark.parametrize(
    "device",
    [
        "tpm-tis,tpmdev=vtpm0",
        "tpm-tis,ppi=off,tpmdev=vtpm0",
        "driver=tpm-tis,tpmdev=vtpm0",
        '{"driver": "tpm-tis", "ppi": false, "tpmdev": "vtpm0"}',
    ],
)
def test_the_users_device_is_kept_when_it_uses_the_back_end(device: str) -> None:
    built = build_command([QEMU, "-device", device], UNBOUND)
    assert built.count("-device") == 1
    assert option(built, "-tpmdev") == "emulator,id=vtpm0,chardev=vtpm-chr0"


@pytest.mark.parametrize("device", ["tpm-tis", "tpm-crb,tpmdev=tpm0", '{"driver": "tpm-crb", "tpmdev": "x"}'])
def test_the_users_device_is_refused_when_it_uses_another_back_end(device: str) -> None:
    with pytest.raises(UsageError, match="-device tpm-") as caught:
        check_command([QEMU, "-device", device], UNBOUND)
    assert "tpmdev=vtpm0" in caught.value.next_step


@pytest.mark.parametrize("device", ["virtio-net,id=tpm-crb", "{", "{}", "", "x,,tpm-tis,tpmdev=y", "help"])
def test_other_devices_are_let_be_when_they_are_no_tpm(device: str) -> None:
    built = build_command([QEMU, "-device", device], UNBOUND)
    assert built[-1] == "tpm-crb,tpmdev=vtpm0"


def test_the_ids_need_no_escape_when_they_stand_in_properties() -> None:
    built = build_command([QEMU], UNBOUND)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", text) for text in ("vtpm0", values(option(built, "-tpmdev"))["id"]))


@pytest.mark.parametrize(
    ("words", "expected"), [(["-daemonize"], True), (["-m", "1", "--daemonize"], True), (["-S"], False)]
)
def test_a_command_detaches_when_it_is_told_to(words: list[str], expected: bool) -> None:
    assert detaches([QEMU, *words]) is expected
