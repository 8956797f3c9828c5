"""Says a message to a peer and takes its answer; see server for the form. Nothing is said before the peer has shown its
certificate, and nothing to anybody else."""

from __future__ import annotations

import asyncio
import ssl
from uuid import UUID

import httpx

from vtpm.errors import AccessDeniedError, ProtocolError, UnavailableError
from vtpm.peers.answers import MAX_ANSWER_BYTES, decode_answer
from vtpm.peers.book import Peer
from vtpm.peers.identity import HostIdentity, der_of
from vtpm.peers.server import CONTENT_TYPE, PATH

CONNECT_S = 10.0
ANSWER_S = 90.0
"""How long a peer may take: quotes and anchors of a hardware TPM, and those before it in its queue."""
_ADD_THERE = "Add this host there, with what `vtpm peer certificate` prints here"


class PeerClient:
    """See the module.

    Args:
        identity: this host's.
    """

    def __init__(self, identity: HostIdentity) -> None:
        self._identity = identity

    async def exchange(self, peer: Peer, vtpm_id: UUID, message: bytes) -> list[bytes]:
        """Say a message about a vTPM, and return those that the peer answers.

        Raises:
            UnavailableError: the peer cannot be reached, or gave no answer: nobody knows if the message arrived.
            AccessDeniedError: it shows another certificate than the one in the book, or does not take ours.
            ProtocolError: its answer is malformed.
            VtpmError: what it answers.
        """
        context = await asyncio.to_thread(self._identity.client_context, peer.certificate)
        # Proxies and certificates of the environment are none of ours.
        transport = httpx.AsyncHTTPTransport(verify=context, http2=False, retries=0, trust_env=False)
        timeout = httpx.Timeout(CONNECT_S, read=ANSWER_S)
        async with httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False) as client:
            try:
                async with client.stream(
                    "POST", f"{peer.url}{PATH}{vtpm_id}", content=message, headers={"Content-Type": CONTENT_TYPE}
                ) as response:
                    _check_shown(response, peer)
                    answer = await _read(response, peer)
            except httpx.TimeoutException as error:
                raise UnavailableError(f"peer {peer.name} at {peer.url} did not answer in time") from error
            except httpx.TransportError as error:
                raise _failed(peer, error) from error
        if response.status_code != httpx.codes.OK:
            raise ProtocolError(f"peer {peer.name} answers with HTTP {response.status_code}")
        return decode_answer(answer)


def _check_shown(response: httpx.Response, peer: Peer) -> None:
    tls = response.extensions["network_stream"].get_extra_info("ssl_object")
    if tls is None or tls.getpeercert(binary_form=True) != der_of(peer.certificate):
        raise AccessDeniedError(f"peer {peer.name} at {peer.url} shows another certificate than the one in the book")


async def _read(response: httpx.Response, peer: Peer) -> bytes:
    answer = bytearray()
    # Raw, so that no content encoding can make much of little.
    async for chunk in response.aiter_raw():
        answer += chunk
        if len(answer) > MAX_ANSWER_BYTES:
            raise ProtocolError(f"peer {peer.name} answers with over {MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


def _failed(peer: Peer, error: httpx.TransportError) -> AccessDeniedError | UnavailableError | ProtocolError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return AccessDeniedError(
                f"peer {peer.name} at {peer.url} shows another certificate than the one in the book",
                next_step=f"If it was set up anew, add it again with the certificate that it prints: {peer.name}",
            )
        if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
            return AccessDeniedError(
                f"peer {peer.name} at {peer.url} does not take this host's certificate",
                next_step=_ADD_THERE,
            )
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, httpx.ConnectError):
        # Whether it heard who this is, its last word may be lost with the connection.
        return UnavailableError(
            f"peer {peer.name} at {peer.url} broke the connection off", next_step=f"If it does so again: {_ADD_THERE}"
        )
    return UnavailableError(f"peer {peer.name} at {peer.url} cannot be reached: {error}")
