"""Part of the manager's API that is about who the platform is, as data; see vtpm.wire.api. For manager and client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NewEnrolment:
    """Under which name the platform is to be certified."""

    name: str


@dataclass(frozen=True)
class Enrolment:
    """A request to an enrolment authority.

    Args:
        name: that was asked for.
        kind: hardware or embedded, as the platform says itself.
        ek: SHA-256 over the endorsement key's TPMT_PUBLIC, in hex.
        request: the file for `vtpm authority certify`.
    """

    name: str
    kind: str
    ek: str
    request: str


@dataclass(frozen=True)
class KeepCertificate:
    """The file that `vtpm authority certify` has made."""

    certificate: str


@dataclass(frozen=True)
class EnrolledPlatform:
    """As what this platform is enrolled.

    Args:
        name: under which its peers know it.
        kind: hardware or embedded, as the authority says.
        key: Name of its attestation key, in hex.
        valid_until: of its certificate, ISO 8601 in UTC.
        authority: name of who has certified it.
    """

    name: str
    kind: str
    key: str
    valid_until: str
    authority: str


@dataclass(frozen=True)
class PlatformFile:
    """A file about this platform: its evidence, or a policy that it passes."""

    content: str
