"""Peers in the manager's API, as data. For manager and client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AddPeer:
    """A host that vTPMs may move to and come from.

    Args:
        name: of its platform, as its enrolment certificate has it.
        url: https://HOST:PORT.
        certificate: PEM; what `vtpm peer certificate` prints there.
    """

    name: str
    url: str
    certificate: str


@dataclass(frozen=True)
class PeerInfo:
    """A peer as it is listed; fingerprint is the SHA-256 of its certificate's DER, in hex."""

    name: str
    url: str
    fingerprint: str


@dataclass(frozen=True)
class HostCertificate:
    """This host's own certificate, PEM."""

    certificate: str
