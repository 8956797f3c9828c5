"""A platform's certificate is asked for and kept by administrators alone, and what is kept is read back or refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.migration.test_enrolment import activated
from tests.unit.tpm.attest_examples import public_area
from tests.unit.tpm.ek_examples import endorsement_area
from vtpm.errors import AccessDeniedError, AttestationError, NotFoundError, StateError, UsageError, VtpmError
from vtpm.manager.access import Caller
from vtpm.manager.attester import PlatformAttester
from vtpm.manager.enrolled import FILE, kept
from vtpm.manager.enrolment import EnrolmentService
from vtpm.migration.certificates import PlatformKind, new_authority
from vtpm.migration.enrolment import SealedCertificate, certify_request, decode_request, encode_file
from vtpm.migration.evidence_file import EvidenceFile, decode_evidence_file
from vtpm.vault.records import Event
from vtpm.wire.api_platform import KeepCertificate, NewEnrolment
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper import PlatformIdentity
from vtpm.wire.keeper import PlatformKind as KeeperKind
from vtpm.wire.keeper_client import KeeperClient

ROOT, USER = Caller(uid=0, gid=0, is_admin=True), Caller(uid=1000, gid=1000, is_admin=False)
IMAGES = [("process", "process image")]
NOW = datetime.now(UTC)
KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = new_authority("test", KEY, NOW)


class Keeper:
    """A keeper whose platform's keys a test holds."""

    def __init__(self) -> None:
        self.attestation = public_area()

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(kind=KeeperKind.HARDWARE)

    def identity(self) -> PlatformIdentity:
        return PlatformIdentity(endorsement_area(), self.attestation, b"certificate")

    def activate(self, credential: bytes, encrypted_secret: bytes) -> bytes:
        return activated(SealedCertificate(credential, encrypted_secret, b""))


class Showing:
    """What shows the platform; it says with what it was asked."""

    def fresh(self) -> EvidenceFile:
        return EvidenceFile(bytes(32), b"evidence")

    def own_policy(self, images: list[tuple[str, str]]) -> str:
        return repr(images)


class Enrolling:
    """The service, its events and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keeper = Keeper()
        self.events: list[Event] = []
        self.service = EnrolmentService(
            folder,
            cast(KeeperClient, self.keeper),
            CallThreads("enrolment", 1),
            self._note,
            cast(PlatformAttester, Showing()),
            self._images,
        )

    async def _images(self, _caller: Caller) -> list[tuple[str, str]]:
        return IMAGES

    async def _note(self, event: Event) -> None:
        self.events.append(event)

    def sealed(self, name: str = "host-b") -> str:
        made = asyncio.run(self.service.request(NewEnrolment(name), ROOT))
        asked = decode_request(made.request.encode())
        assert (asked.name, asked.kind, asked.endorsement_certificate) == (name, PlatformKind.HARDWARE, b"certificate")
        return encode_file(certify_request(AUTHORITY, KEY, asked, PlatformKind.HARDWARE, NOW)).decode()

    def accept(self, sealed: str) -> Any:
        return asyncio.run(self.service.accept(KeepCertificate(sealed), ROOT))


@pytest.fixture
def enrolling(tmp_path: Path) -> Enrolling:
    return Enrolling(tmp_path)


def test_certificate_is_kept_and_shown_when_it_is_of_this_platform(enrolling: Enrolling) -> None:
    with pytest.raises(NotFoundError, match="not enrolled"):
        asyncio.run(enrolling.service.show(ROOT))
    shown = enrolling.accept(enrolling.sealed())
    assert (shown.name, shown.kind, shown.authority) == ("host-b", "hardware", "test")
    assert asyncio.run(enrolling.service.show(ROOT)) == shown
    assert kept(enrolling.folder).shown() == shown
    assert enrolling.accept(enrolling.sealed("host-c")).name == "host-c"
    assert [event.kind for event in enrolling.events] == [
        "platform_enrolment_requested",
        "platform_enrol_asked",
        "platform_enrolled",
    ] * 2


def test_nothing_is_kept_when_the_certificate_is_of_another_key(enrolling: Enrolling) -> None:
    sealed = enrolling.sealed()
    enrolling.keeper.attestation = public_area(KEY)
    with pytest.raises(AttestationError, match="another platform's"):
        enrolling.accept(sealed)
    assert not list(enrolling.folder.iterdir())
    assert [event.kind for event in enrolling.events] == ["platform_enrolment_requested"]


def test_failure_is_noted_when_the_certificate_cannot_be_kept(enrolling: Enrolling) -> None:
    sealed = enrolling.sealed()
    (enrolling.folder / FILE).mkdir()
    (enrolling.folder / FILE / "in the way").touch()
    with pytest.raises(VtpmError, match="cannot be written"):
        enrolling.accept(sealed)
    assert enrolling.events[-1].kind == "platform_enrol_failed"


def test_name_is_refused_before_the_keeper_is_asked(enrolling: Enrolling) -> None:
    for name in ("", "n" * 65, "two\nlines"):
        with pytest.raises(UsageError, match="printable"):
            asyncio.run(enrolling.service.request(NewEnrolment(name), ROOT))
    assert not enrolling.events


def test_evidence_and_policy_are_files_of_what_this_platform_is(enrolling: Enrolling) -> None:
    file = asyncio.run(enrolling.service.evidence(ROOT)).content
    assert decode_evidence_file(file.encode()) == EvidenceFile(bytes(32), b"evidence")
    assert asyncio.run(enrolling.service.policy(ROOT)).content == repr(IMAGES)


Ask = Callable[[EnrolmentService], Coroutine[Any, Any, Any]]


@pytest.mark.parametrize(
    "ask",
    [
        lambda service: service.request(NewEnrolment("host-b"), USER),
        lambda service: service.accept(KeepCertificate("{}"), USER),
        lambda service: service.show(USER),
        lambda service: service.evidence(USER),
        lambda service: service.policy(USER),
    ],
    ids=["request", "accept", "show", "evidence", "policy"],
)
def test_refused_when_no_administrator_asks(enrolling: Enrolling, ask: Ask) -> None:
    with pytest.raises(AccessDeniedError):
        asyncio.run(ask(enrolling.service))
    assert not enrolling.events


@pytest.mark.parametrize("change", [{"version": 2}, {"attestation_key": ""}, {"certificate": "AAAA"}, {"more": 1}])
def test_kept_file_is_refused_when_it_is_damaged(enrolling: Enrolling, change: dict[str, object]) -> None:
    enrolling.accept(enrolling.sealed())
    path = enrolling.folder / FILE
    whole = path.read_text()
    for damaged in (json.dumps(json.loads(whole) | change), whole[:-1], "[" * 5000, " " * (16 * 1024 + 1)):
        path.write_text(damaged)
        with pytest.raises(StateError, match="is damaged") as refused:
            kept(enrolling.folder)
        assert "vtpm platform enroll" in refused.value.next_step
    path.write_text(whole)
    assert dataclasses.asdict(kept(enrolling.folder).shown())["name"] == "host-b"
