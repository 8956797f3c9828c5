"""A host shows what its own policy names, believes what policy and authorities take, and reads both anew each time."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.migration.evidence_examples import IMAGE, LAUNCHES, PCRS, POLICY, SERVICES
from tests.unit.tpm.attest_examples import KEY, NONCE, attest, public_area, quote_body, sign
from vtpm.config import Config
from vtpm.errors import AttestationError, ConflictError, NotFoundError, ProtocolError, StateError, UsageError
from vtpm.manager.attester import PlatformAttester
from vtpm.manager.enrolled import Enrolled, keep
from vtpm.manager.measured import services_of_boot
from vtpm.measurement.record import Record, boot_dir, write_record
from vtpm.migration.certificates import PlatformKind, certify, new_authority
from vtpm.migration.policy import parse_policy, print_policy
from vtpm.tpm.attest import read_signing_key
from vtpm.tpm.launch_log import encode
from vtpm.wire.keeper import LaunchEntry, LaunchState, QuotedPcrs
from vtpm.wire.keeper_client import KeeperClient

NOW = datetime.now(UTC)
AUTHORITY_KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = new_authority("test", AUTHORITY_KEY, NOW)


class Keeper:
    """A keeper whose platform's key and PCRs a test holds."""

    def __init__(self) -> None:
        self.pcrs = dict(PCRS)
        self.key = KEY
        self.over = lambda extra: extra
        self.selection = "sha256:0,2,7,13"
        self.services: int | None = 13

    def quote(self, extra: bytes, bank: str, pcrs: tuple[int, ...]) -> QuotedPcrs:
        assert bank == "sha256"
        values = {index: self.pcrs.get(index, bytes(32)) for index in pcrs}
        signed = attest(quote_body(values), extra=self.over(extra))
        return QuotedPcrs(signed, sign(signed, self.key), tuple(values.values()), encode(LAUNCHES))

    def policy(self) -> SimpleNamespace:
        return SimpleNamespace(selection=self.selection)

    def services_pcr(self) -> SimpleNamespace:
        if self.services is None:
            raise ConflictError("the keeper was started without a PCR for the services")
        return SimpleNamespace(pcr=self.services)

    def launches(self) -> LaunchState:
        return LaunchState(
            "sha256", 12, "", "", (LaunchEntry("qemu", IMAGE, ""), LaunchEntry("", "", "00")), True, "", ""
        )


class Host:
    """An attester, with what it reads."""

    def __init__(self, folder: Path, name: str = "host-b", kind: PlatformKind = PlatformKind.HARDWARE) -> None:
        self.keeper = Keeper()
        self.policy, self.authorities = folder / "policy.toml", folder / "authorities"
        self.policy.write_text(print_policy(POLICY))
        self.authorities.mkdir()
        (self.authorities / "test.pem").write_bytes(AUTHORITY.public_bytes(Encoding.PEM))
        certificate = certify(AUTHORITY, AUTHORITY_KEY, name, kind, read_signing_key(public_area()), NOW)
        keep(folder, Enrolled(certificate.public_bytes(Encoding.DER), public_area()))
        self.services: tuple[bytes, ...] = SERVICES
        self.folder = folder
        self.attester = PlatformAttester(
            cast(KeeperClient, self.keeper), folder, lambda: self.services, self.policy, self.authorities
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_evidence_is_believed_by_a_host_of_the_same_policy(host: Host) -> None:
    said = host.attester.verify(host.attester.evidence(NONCE), NONCE)
    assert (said.name, said.kind) == ("host-b", PlatformKind.HARDWARE)
    fresh, again = host.attester.fresh(), host.attester.fresh()
    assert fresh.nonce != again.nonce
    assert host.attester.verify(fresh.evidence, fresh.nonce) == said
    with pytest.raises(AttestationError, match="a replay"):
        host.attester.verify(fresh.evidence, again.nonce)
    with pytest.raises(ProtocolError):
        host.attester.verify(b"no evidence", NONCE)


def test_policy_and_authorities_hold_from_the_next_use_on_when_they_are_changed(host: Host) -> None:
    shown = host.attester.evidence(NONCE)
    host.policy.write_text(print_policy(dataclasses.replace(POLICY, services=frozenset({bytes(32)}))))
    with pytest.raises(AttestationError, match="services in this boot that policy does not allow"):
        host.attester.verify(shown, NONCE)
    host.policy.write_text(print_policy(POLICY))
    other = new_authority("other", ec.generate_private_key(ec.SECP256R1()), NOW)
    (host.authorities / "test.pem").write_bytes(other.public_bytes(Encoding.PEM))
    with pytest.raises(AttestationError, match="no enrolment authority"):
        host.attester.verify(shown, NONCE)


def test_nobody_is_believed_when_policy_or_authorities_are_not_there(host: Host) -> None:
    shown = host.attester.evidence(NONCE)
    (host.authorities / "test.pem").unlink()
    with pytest.raises(UsageError, match="of enrolment authorities has 0 files"):
        host.attester.verify(shown, NONCE)
    host.policy.unlink()
    for ask in (lambda: host.attester.verify(shown, NONCE), lambda: host.attester.evidence(NONCE)):
        with pytest.raises(NotFoundError, match="no platform policy"):
            ask()


def test_there_is_no_evidence_when_the_platform_is_not_enrolled(host: Host) -> None:
    (host.folder / "enrolled.json").unlink()
    for ask in (lambda: host.attester.evidence(NONCE), lambda: host.attester.own_policy([])):
        with pytest.raises(NotFoundError, match="not enrolled"):
            ask()


def test_there_is_no_evidence_when_the_tpm_is_another_than_was_enrolled(host: Host) -> None:
    host.keeper.key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ConflictError, match="another attestation key than was enrolled"):
        host.attester.evidence(NONCE)


def test_there_is_no_evidence_when_something_else_was_quoted(host: Host) -> None:
    host.keeper.over = lambda _extra: bytes(32)
    with pytest.raises(AttestationError, match="something else than was asked for"):
        host.attester.evidence(NONCE)


# -- a policy of its own ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(PlatformKind))
def test_own_policy_is_one_that_the_host_passes(tmp_path: Path, kind: PlatformKind) -> None:
    host = Host(tmp_path, kind=kind)
    process = "55" * 32
    text = host.attester.own_policy([("process", process), ("process", IMAGE)])
    policy = parse_policy(text.encode())
    assert policy.pcrs == {index: frozenset({PCRS[index]}) for index in (0, 7)}  # 2 holds zeros
    assert policy.images == {"process": {process, IMAGE}, "qemu": {IMAGE}}
    assert policy.embedded is (kind is PlatformKind.EMBEDDED)
    host.policy.write_text(text)
    assert host.attester.verify(host.attester.evidence(NONCE), NONCE).kind is kind


def test_own_policy_leaves_out_what_proves_nothing_about_a_boot(host: Host) -> None:
    host.keeper.selection = "sha256:0,7,12,13,16,23"
    host.keeper.pcrs |= {16: b"d" * 32, 23: b"a" * 32}
    assert set(parse_policy(host.attester.own_policy([]).encode()).pcrs) == {0, 7}


def test_there_is_no_own_policy_when_nothing_tells_one_boot_from_another(host: Host) -> None:
    host.keeper.selection = "sha256:2,12"
    with pytest.raises(ConflictError, match="no policy tells one boot from another"):
        host.attester.own_policy([])
    host.keeper.selection = "sha256:12"
    with pytest.raises(ConflictError, match="no policy tells one boot from another"):
        host.attester.own_policy([])


def test_own_policy_is_one_without_measurements_when_only_an_embedded_tpm_is_there(tmp_path: Path) -> None:
    host = Host(tmp_path, kind=PlatformKind.EMBEDDED)
    host.services, host.keeper.services, host.keeper.selection = (), None, "sha256:2,12"
    host.keeper.pcrs[13] = bytes(32)
    host.policy.write_text(host.attester.own_policy([("process", IMAGE)]))
    assert host.attester.verify(host.attester.evidence(NONCE), NONCE).kind is PlatformKind.EMBEDDED


def test_there_is_no_own_policy_when_the_services_are_not_measured(host: Host) -> None:
    host.services, host.keeper.services = (), None
    with pytest.raises(ConflictError, match="services of this host are not measured"):
        host.attester.own_policy([])


# -- services --------------------------------------------------------------------------------------------------------
def recorded(folder: Path, **changes: Any) -> Config:
    config = Config(folder / "state", folder / "run", platform_tpm="device:/dev/tpmrm0")
    place = boot_dir(config.run_dir)
    place.mkdir(parents=True)
    digests = tuple(value.hex() for value in SERVICES)
    record = Record("sha256", 13, 3, bytes(32), digests, digests[1], "", (), "", True)
    write_record(place, dataclasses.replace(record, **changes))
    return config


def test_services_are_all_of_this_boot_when_they_are_recorded(tmp_path: Path) -> None:
    assert services_of_boot(recorded(tmp_path)) == SERVICES


def test_services_are_none_when_they_are_not_measured(tmp_path: Path) -> None:
    config = recorded(tmp_path)
    assert services_of_boot(dataclasses.replace(config, services_pcr=0)) == ()
    assert services_of_boot(dataclasses.replace(config, platform_tpm="embedded")) == ()


def test_services_are_not_known_when_the_record_is_gone_or_the_pcr_was_not_seen_to_have_them(tmp_path: Path) -> None:
    config = recorded(tmp_path, extended=False)
    with pytest.raises(StateError, match="is not known"):
        services_of_boot(config)
    (boot_dir(config.run_dir) / "record.json").unlink()
    with pytest.raises(StateError, match="is not known"):
        services_of_boot(config)
