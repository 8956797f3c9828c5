"""Enrolment of this host's platform, as administrators ask for it: a request goes out, a certificate is kept.

The keeper opens what the authority has sealed; it is looked at here, and kept only if it is of this platform's very
key. Each change leaves an audit event. The manager's alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from vtpm.manager.access import Caller
from vtpm.manager.attester import PlatformAttester
from vtpm.manager.enrolled import Enrolled, keep, kept
from vtpm.manager.noted import Note, host_event, noted
from vtpm.migration.certificates import PlatformKind, check_name
from vtpm.migration.enrolment import (
    EnrolmentRequest,
    decode_sealed,
    encode_file,
    endorsement_fingerprint,
    open_sealed,
)
from vtpm.migration.evidence_file import encode_evidence_file
from vtpm.wire.api_platform import EnrolledPlatform, Enrolment, KeepCertificate, NewEnrolment, PlatformFile
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper_client import KeeperClient


class EnrolmentService:
    """See the module.

    Args:
        folder: takes the certificate.
        keeper: asked in one of the threads, for it blocks.
        threads: of these calls alone.
        note: appends to the audit log.
        attester: shows what this platform is.
        images: says which images may run vTPMs here, by kind and measurement.
    """

    def __init__(
        self,
        folder: Path,
        keeper: KeeperClient,
        threads: CallThreads,
        note: Note,
        attester: PlatformAttester,
        images: Callable[[Caller], Awaitable[Sequence[tuple[str, str]]]],
    ) -> None:
        self._folder = folder
        self._keeper = keeper
        self._threads = threads
        self._note = note
        self._attester = attester
        self._images = images

    async def request(self, wanted: NewEnrolment, caller: Caller) -> Enrolment:
        """Return a request to an authority; changes nothing here, and may be made again."""
        caller.require_admin("enrol the platform")
        check_name(wanted.name)
        request = await self._threads.run(self._request, wanted.name)
        made = Enrolment(
            request.name, request.kind.value, endorsement_fingerprint(request), encode_file(request).decode("ascii")
        )
        await self._note(host_event(caller, "platform_enrolment_requested", name=made.name, tpm=made.kind, ek=made.ek))
        return made

    async def accept(self, given: KeepCertificate, caller: Caller) -> EnrolledPlatform:
        """Keep a certificate that an authority has sealed for this platform, in the place of an earlier one.

        Raises:
            UsageError: the file is none.
            AttestationError: it is another platform's, or was changed.
            StoreError: it is not durable.
        """
        caller.require_admin("enrol the platform")
        enrolled = await self._threads.run(self._opened, given.certificate)
        shown = enrolled.shown()
        detail = {"name": shown.name, "tpm": shown.kind, "key": shown.key, "authority": shown.authority}
        async with noted(self._note, caller, "platform_enrol", "platform_enrolled", **detail):
            await self._threads.run(keep, self._folder, enrolled)
        return shown

    async def show(self, caller: Caller) -> EnrolledPlatform:
        """Return as what this platform is enrolled. Raises NotFoundError: it is not."""
        caller.require_admin("see as what the platform is enrolled")
        return (await self._threads.run(kept, self._folder)).shown()

    async def evidence(self, caller: Caller) -> PlatformFile:
        """Return this platform's evidence, fresh, as a file. Raises as PlatformAttester.evidence."""
        caller.require_admin("see the platform's evidence")
        return PlatformFile(encode_evidence_file(await self._threads.run(self._attester.fresh)).decode("ascii"))

    async def policy(self, caller: Caller) -> PlatformFile:
        """Return the file of a policy that this platform passes now. Raises as PlatformAttester.own_policy."""
        caller.require_admin("see what the platform is")
        return PlatformFile(await self._threads.run(self._attester.own_policy, await self._images(caller)))

    # -- in the threads ----------------------------------------------------------------------------------------------
    def _request(self, name: str) -> EnrolmentRequest:
        known, kind = self._keeper.identity(), PlatformKind(self._keeper.status().kind.value)
        return EnrolmentRequest(name, kind, known.endorsement, known.certificate, known.attestation)

    def _opened(self, file: str) -> Enrolled:
        sealed = decode_sealed(file.encode())
        key = self._keeper.identity().attestation
        secret = self._keeper.activate(sealed.credential, sealed.encrypted_secret)
        certificate, _ = open_sealed(sealed, secret, key)
        return Enrolled(certificate, key)
