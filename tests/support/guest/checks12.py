"""What a guest must be able to do with its vTPM 1.2: raw commands through /dev/tpm0 and the kernel's files.

Debian's only tools for TPM 1.2 need an owned TPM and a daemon; six commands by hand need neither.
Source: TPM Main Part 3 Commands, revision 116: TPM_Extend, TPM_NV_DefineSpace, TPM_NV_WriteValue,
TPM_NV_ReadValue; Part 2 Structures: TPM_NV_DATA_PUBLIC.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.support.guest.checks import FREE_PCR, Pcrs, check_event_log, driver_version
from tests.support.guest.guest import Guest, GuestConfig, Reboot

NV_INDEX = 0x0000_1016
_NV_BYTES = 32
_TAG_REQUEST = 0x00C1
_TAG_RESPONSE = 0x00C4
_ORDINAL_EXTEND = 0x14
_ORDINAL_NV_DEFINE_SPACE = 0xCC
_ORDINAL_NV_WRITE_VALUE = 0xCD
_ORDINAL_NV_READ_VALUE = 0xCF
# TPM_PCR_INFO_SHORT that binds to no PCR: no PCR of 24 selected, every locality, no digest.
_NO_PCRS = struct.pack(">H3sB20s", 3, bytes(3), 0x1F, bytes(20))
# TPM_NV_PER_OWNERWRITE; the owner is not asked while the TPM is not NV-locked, as it leaves its maker.
_NV_PERMISSIONS = 0x0000_0002


def transmit(guest: Guest, ordinal: int, body: bytes) -> bytes:
    """Send one command without authorisation to /dev/tpm0; returns what follows the response's header.

    Raises:
        AssertionError: the response is malformed or its return code is not TPM_SUCCESS.
    """
    command = struct.pack(">HII", _TAG_REQUEST, 10 + len(body), ordinal) + body
    answer = guest.check(
        f"""exec 4<>/dev/tpm0
        echo {command.hex()} | xxd -r -p >&4
        dd bs=4096 count=1 <&4 2> /dev/null | xxd -p | tr -d '\\n'"""
    )
    response = bytes.fromhex(answer)
    tag, size, code = struct.unpack_from(">HII", response)
    assert (tag, size) == (_TAG_RESPONSE, len(response)), f"malformed response to {ordinal:#x}: {answer}"
    assert code == 0, f"command {ordinal:#x} failed with {code:#x}"
    return response[10:]


def read_pcrs(guest: Guest) -> Pcrs:
    """All 24 PCRs as the kernel's sysfs file tells them."""
    lines = re.findall(r"^PCR-(\d+): ([0-9A-F ]+)$", guest.check("cat /sys/class/tpm/tpm0/pcrs"), re.MULTILINE)
    return {int(number): value.replace(" ", "").lower() for number, value in lines}


def check_extend(guest: Guest) -> None:
    """Extending FREE_PCR gives SHA-1(old || digest), and nothing else changes."""
    before = read_pcrs(guest)
    digest = secrets.token_bytes(20)
    answer = transmit(guest, _ORDINAL_EXTEND, struct.pack(">I", FREE_PCR) + digest)
    expected = hashlib.sha1(bytes.fromhex(before[FREE_PCR]) + digest).hexdigest()
    assert answer.hex() == expected
    assert read_pcrs(guest) == before | {FREE_PCR: expected}


def write_nv(guest: Guest, value: bytes) -> None:
    """Define NV_INDEX, 32 bytes, and write it."""
    public = b"".join(
        (
            struct.pack(">HI", 0x0018, NV_INDEX),  # TPM_TAG_NV_DATA_PUBLIC
            _NO_PCRS * 2,  # for reading and for writing
            struct.pack(">HI", 0x0017, _NV_PERMISSIONS),  # TPM_TAG_NV_ATTRIBUTES
            struct.pack(">BBBI", 0, 0, 0, _NV_BYTES),
        )
    )
    transmit(guest, _ORDINAL_NV_DEFINE_SPACE, public + bytes(20))
    transmit(guest, _ORDINAL_NV_WRITE_VALUE, struct.pack(">III", NV_INDEX, 0, len(value)) + value)


def read_nv(guest: Guest) -> bytes:
    """What NV_INDEX holds."""
    answer = transmit(guest, _ORDINAL_NV_READ_VALUE, struct.pack(">III", NV_INDEX, 0, _NV_BYTES))
    return answer[4:]


def check_fresh_pcrs(guest: Guest) -> Pcrs:
    """After a boot: FREE_PCR is zero, and the event log replays to the firmware's PCRs. Returns all PCRs."""
    pcrs = read_pcrs(guest)
    assert len(pcrs) == 24
    assert set(pcrs[FREE_PCR]) == {"0"}, f"PCR {FREE_PCR} outlived the boot: {pcrs[FREE_PCR]}"
    check_event_log(guest, pcrs, "sha1")
    return pcrs


def exercise(
    config: GuestConfig,
    work_folder: Path,
    *,
    reboots: tuple[Reboot, ...] = (Reboot.ORDERLY,),
    power_cycle: Callable[[], Path] | None = None,
) -> Pcrs:
    """The whole path of a guest with a TPM 1.2; arguments as `checks.exercise`, the model is TIS."""
    value = secrets.token_bytes(_NV_BYTES)
    with Guest(config, work_folder) as guest:
        assert driver_version(guest) == "1"
        pcrs = check_fresh_pcrs(guest)
        check_extend(guest)
        write_nv(guest, value)
        assert read_nv(guest) == value
        for how in reboots:
            guest.reboot(how)
            pcrs = check_fresh_pcrs(guest)
            assert read_nv(guest) == value
            check_extend(guest)
        guest.power_off()
    if power_cycle is not None:
        with Guest(replace(config, tpm_control_socket=power_cycle()), work_folder) as guest:
            pcrs = check_fresh_pcrs(guest)
            assert read_nv(guest) == value
            guest.power_off()
    return pcrs
