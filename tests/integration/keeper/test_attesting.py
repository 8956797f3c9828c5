"""The keeper's part of attestation with a real TPM: identity, quotes over what it launched, credentials."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.test_platform_tpm_attestation import SECRET, credential_for
from tests.integration.keeper.conftest import Connect
from tests.support.processes import KeeperProcess
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import AttestationError, PlatformTpmError, ProtocolError, UsageError
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.attest import read_quote, read_signing_key, verify_signature
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Launch, decode

pytestmark = pytest.mark.timeout(60)
Keep = Callable[[KeeperProcess], KeeperProcess]
EXTRA = bytes(range(32))
MEASUREMENT = "ab" * 32
CERTIFICATE_INDEX = "0x01C0000A"


def started(directory: Path, swtpm: SwtpmPlatform, keepers: Keep) -> KeeperProcess:
    return keepers(KeeperProcess(directory, swtpm.tcti, "--launch-pcr", "12")).start()


def put_certificate(swtpm: SwtpmPlatform, content: bytes, directory: Path) -> None:
    """Lay it where a manufacturer does, in an index that everybody may read."""
    file = directory / "certificate"
    file.write_bytes(content)
    size = ["-s", str(len(content)), "-a", "ppwrite|ppread|ownerread|authread|no_da|platformcreate"]
    for command in (
        ["tpm2_nvdefine", CERTIFICATE_INDEX, "-C", "p", *size],
        ["tpm2_nvwrite", CERTIFICATE_INDEX, "-C", "p", "-i", str(file)],
    ):
        subprocess.run([command[0], "-T", swtpm.tcti, *command[1:]], check=True, capture_output=True, timeout=20)


def test_quote_is_over_what_was_launched_when_asked_for(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    client = connect(started(directory, swtpm, keepers))
    client.measure_launch("process", MEASUREMENT)
    known = client.identity()
    assert known.certificate == b""
    key = read_signing_key(known.attestation)
    key.require_attestation_key()
    quoted = client.quote(EXTRA, "sha256", (0, 7, 12))
    verify_signature(key, quoted.attest, quoted.signature)
    quote = read_quote(quoted.attest)
    assert quote.extra == EXTRA
    values = dict(zip((0, 7, 12), quoted.values, strict=True))
    quote.require_values(HashAlgorithm.SHA256, values)
    log = decode(quoted.launch_log, HashAlgorithm.SHA256, 12)
    assert log.measured == {Launch("process", MEASUREMENT)}
    assert (log.value, log.reset_count, any(log.start)) == (values[12], quote.reset_count, False)
    for bank, pcrs in (("sha1", (0,)), ("sha256", (7, 0)), ("sha256", ())):
        with pytest.raises(UsageError):
            client.quote(EXTRA, bank, pcrs)
    with pytest.raises(ProtocolError, match="32 bytes, this has 31"):
        client.quote(EXTRA[1:], "sha256", (0,))


def test_credential_opens_when_it_is_for_this_platform(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    keeper = started(directory, swtpm, keepers)
    client = connect(keeper)
    known = client.identity()
    name = read_signing_key(known.attestation).name
    assert client.activate(*credential_for(known.endorsement, name)) == SECRET
    with pytest.raises(AttestationError, match="another platform or another key"):
        client.activate(*credential_for(known.endorsement, b"\x00\x0b" + bytes(32)))
    assert SECRET.hex() not in keeper.log


@pytest.mark.parametrize("filling", [0, 700])
def test_identity_has_the_manufacturers_certificate_when_the_tpm_has_one(
    directory: Path, swtpm: SwtpmPlatform, filling: int
) -> None:
    content = b"\x30\x82\x04\xb0" + bytes(index % 251 for index in range(0x4B0))
    put_certificate(swtpm, content + b"\xff" * filling, directory)
    with PlatformTpm(swtpm.tcti) as tpm:
        assert tpm.endorsement_certificate() == content


@pytest.mark.parametrize("content", [b"\x30\x82\x04\xb0" + bytes(1000), bytes(1000), b"\x30\x03\x02\x01\x00"])
def test_certificate_is_none_when_what_lies_there_is_no_certificate(
    directory: Path, swtpm: SwtpmPlatform, content: bytes
) -> None:
    put_certificate(swtpm, content, directory)
    with PlatformTpm(swtpm.tcti) as tpm:
        assert tpm.endorsement_certificate() == b""


def test_certificate_is_none_when_the_index_is_not_for_everybody_or_was_never_written(swtpm: SwtpmPlatform) -> None:
    define = ["tpm2_nvdefine", "-T", swtpm.tcti, CERTIFICATE_INDEX, "-C", "o", "-s", "800", "-a"]
    subprocess.run([*define, "ownerwrite|ownerread|authread"], check=True, capture_output=True, timeout=20)
    with PlatformTpm(swtpm.tcti) as tpm:
        assert tpm.endorsement_certificate() == b""
    undefine = ["tpm2_nvundefine", "-T", swtpm.tcti, CERTIFICATE_INDEX, "-C", "o"]
    subprocess.run(undefine, check=True, capture_output=True, timeout=20)
    subprocess.run([*define, "ownerwrite|ownerread"], check=True, capture_output=True, timeout=20)
    with PlatformTpm(swtpm.tcti) as tpm:
        assert tpm.endorsement_certificate() == b""


def test_nothing_is_proven_when_the_root_key_is_locked(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    keeper = started(directory, swtpm, keepers)
    keeper.terminate()
    swtpm.reboot("other firmware")
    client = connect(keeper.start())
    for ask in (client.identity, lambda: client.quote(EXTRA, "sha256", (0,)), lambda: client.activate(b"", b"")):
        with pytest.raises(PlatformTpmError):
            ask()
