"""What a guest must be able to do with its vTPM 2.0, asked of its kernel and of tpm2-tools inside it.

Says nothing about who runs the TPM: `exercise` takes a machine whose control socket may be vtpmd's or another
make's. Every function raises AssertionError (GuestError among them) when the TPM does not do what it must.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.guest.guest import Guest, GuestConfig, Reboot

EVENT_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
FIRMWARE_PCRS = frozenset(range(8))
"""What firmware of either kind extends: at least a separator each."""
FREE_PCR = 14
"""Extended by neither firmware nor kernel here, and not resettable short of a reset of the machine."""
NV_INDEX = 0x0150_0016
KEY_HANDLE = 0x8101_0016
_PCR_LINE = re.compile(r"^\s*(\d+)\s*: 0x([0-9a-fA-F]+)$", re.MULTILINE)

Pcrs = dict[int, str]
"""PCR number -> value in lower-case hex."""


@dataclass(frozen=True)
class Traces:
    """What a boot left in the TPM's permanent state."""

    nv_hex: str
    key_name: str


def driver_version(guest: Guest) -> str:
    """Major version of the TPM that the guest's kernel drives: "2" or "1"."""
    return guest.check("test -c /dev/tpm0 && cat /sys/class/tpm/tpm0/tpm_version_major")


def read_pcrs(guest: Guest, bank: str = "sha256") -> Pcrs:
    """All PCRs of a bank, read by tpm2_pcrread in the guest."""
    return _pcrs(guest.check(f"tpm2_pcrread {bank}"))


def replayed_pcrs(guest: Guest, bank: str = "sha256", log: str = EVENT_LOG) -> Pcrs:
    """The PCR values that the guest's event log leads to, as tpm2_eventlog computes them."""
    # "pcrs:" ends the report; a bank is indented by two, its PCRs by four.
    return _pcrs(guest.check(f"tpm2_eventlog {log} | sed -n '/^pcrs:/,$p' | sed -n '/^  {bank}:/,/^  [a-z]/p'"))


def check_event_log(guest: Guest, pcrs: Pcrs, bank: str = "sha256", log: str = EVENT_LOG) -> Pcrs:
    """The event log covers the firmware's PCRs and replays to exactly the values that the TPM holds."""
    replayed = replayed_pcrs(guest, bank, log)
    missing = FIRMWARE_PCRS - replayed.keys()
    assert not missing, f"the event log says nothing of PCRs {sorted(missing)}"
    held = {number: pcrs[number] for number in replayed}
    assert replayed == held, f"the event log replays to {replayed}, the TPM holds {held}"
    return replayed


def check_extend(guest: Guest) -> None:
    """Extending FREE_PCR gives H(old || digest), and nothing else changes."""
    before = read_pcrs(guest)
    digest = secrets.token_bytes(32)
    guest.check(f"tpm2_pcrextend {FREE_PCR}:sha256={digest.hex()}")
    expected = hashlib.sha256(bytes.fromhex(before[FREE_PCR]) + digest).hexdigest()
    assert read_pcrs(guest) == before | {FREE_PCR: expected}


def check_resume(guest: Guest, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Suspended to RAM and woken, the guest finds its PCRs as they were, in a TPM that was resumed and not reset.

    Args:
        meanwhile: called while it is suspended.
    """
    check_extend(guest)
    pcrs, (resets, restarts) = read_pcrs(guest), _counts(guest)
    guest.suspend(meanwhile)
    assert read_pcrs(guest) == pcrs
    assert _counts(guest) == (resets, restarts + 1), "it was not a TPM resume (TPM 2.0 Part 1, 12.2.3)"
    check_extend(guest)


def leave_traces(guest: Guest) -> Traces:
    """Make a persistent attestation key and write an NV index; fails if either is there already."""
    nv_hex = secrets.token_hex(32)
    guest.check(
        f"""set -e
        attributes='ownerread|ownerwrite|authread|authwrite|no_da'
        tpm2_nvdefine -C o -s 32 -a "$attributes" {NV_INDEX:#x} > /dev/null
        echo {nv_hex} | xxd -r -p | tpm2_nvwrite -C o -i - {NV_INDEX:#x}
        common='fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted'
        tpm2_createprimary -Q -C o -G ecc -a "$common|decrypt" -c /tmp/primary
        cd /tmp
        tpm2_create -Q -C primary -G ecc256:ecdsa-sha256:null -a "$common|sign" -u k.pub -r k.priv
        tpm2_load -Q -C primary -u k.pub -r k.priv -c k
        tpm2_evictcontrol -Q -C o -c k {KEY_HANDLE:#x}""",
        timeout_s=60,
    )
    traces = Traces(nv_hex, _key_name(guest))
    check_traces(guest, traces)
    return traces


def check_traces(guest: Guest, traces: Traces) -> None:
    """The NV index holds what was written; the persistent key is the same and signs a quote that verifies."""
    nv_hex = guest.check(f"tpm2_nvread -C o -s 32 {NV_INDEX:#x} | xxd -p | tr -d '\\n'")
    assert nv_hex == traces.nv_hex, f"NV index {NV_INDEX:#x} holds {nv_hex}, {traces.nv_hex} was written"
    assert _key_name(guest) == traces.key_name, "another key is at the persistent handle"
    check_quote(guest)


def check_quote(guest: Guest) -> None:
    """The persistent key quotes the firmware's PCRs over a nonce; a quote under another nonce is refused."""
    nonce, other = secrets.token_hex(16), secrets.token_hex(16)
    guest.check(
        f"""set -e
        tpm2_readpublic -Q -c {KEY_HANDLE:#x} -f pem -o /tmp/ak.pem
        tpm2_quote -Q -c {KEY_HANDLE:#x} -l sha256:0,1,2,3,4,5,6,7 -q {nonce} -m /tmp/q -s /tmp/s -o /tmp/p
        verify="tpm2_checkquote -Q -u /tmp/ak.pem -m /tmp/q -s /tmp/s -f /tmp/p -g sha256"
        $verify -q {nonce}
        if $verify -q {other} 2> /dev/null; then echo 'verifies under another nonce'; exit 1; fi""",
        timeout_s=60,
    )


def check_fresh_pcrs(guest: Guest) -> Pcrs:
    """After a boot: FREE_PCR is zero, the event log replays to the firmware's PCRs. Returns all of sha256."""
    pcrs = read_pcrs(guest)
    assert set(pcrs[FREE_PCR]) == {"0"}, f"PCR {FREE_PCR} outlived the boot: {pcrs[FREE_PCR]}"
    check_event_log(guest, pcrs)
    return pcrs


def exercise(
    config: GuestConfig,
    work_folder: Path,
    *,
    reboots: tuple[Reboot, ...] = (Reboot.ORDERLY,),
    power_cycle: Callable[[], Path] | None = None,
) -> Pcrs:
    """The whole path of a guest with a TPM 2.0: boot, measure, extend, leave traces, boot again, find them.

    Args:
        config: a machine with a vTPM that has neither NV_INDEX nor KEY_HANDLE yet.
        work_folder: logs and UEFI variables.
        reboots: ways to boot again, one after the other.
        power_cycle: None, or called when the guest was powered off after the reboots; returns the control
            socket for a last boot, which may be another one than before.
    Returns:
        The sha256 PCRs of the last boot.
    """
    with Guest(config, work_folder) as guest:
        assert driver_version(guest) == "2"
        if config.uuid is not None:
            assert guest.check("cat /sys/class/dmi/id/product_uuid") == str(config.uuid)
        pcrs = check_fresh_pcrs(guest)
        check_extend(guest)
        traces = leave_traces(guest)
        for how in reboots:
            guest.reboot(how)
            pcrs = check_fresh_pcrs(guest)
            check_traces(guest, traces)
            check_extend(guest)
        guest.power_off()
    if power_cycle is not None:
        with Guest(replace(config, tpm_control_socket=power_cycle()), work_folder) as guest:
            pcrs = check_fresh_pcrs(guest)
            check_traces(guest, traces)
            guest.power_off()
    return pcrs


def _counts(guest: Guest) -> tuple[int, int]:
    """The TPM's resets, and its resumes and restarts since the last one."""
    report = guest.check("tpm2_readclock")
    found = re.search(r"reset_count: (\d+)\s+restart_count: (\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def _key_name(guest: Guest) -> str:
    report = guest.check(f"tpm2_readpublic -c {KEY_HANDLE:#x}")
    match = re.search(r"^name: ([0-9a-f]+)$", report, re.MULTILINE)
    assert match, f"tpm2_readpublic names no key:\n{report}"
    return match[1]


def _pcrs(report: str) -> Pcrs:
    return {int(number): value.lower() for number, value in _PCR_LINE.findall(report)}
