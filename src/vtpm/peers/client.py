"""Says a message to a peer and takes its answer; see server for the form. Nothing is said before the peer has shown its
certificate, and nothing to anybody else."""

from __future__ import annotations

import asyncio
import ssl
from uuid import UUID

import httpx

from vtpm.errors import AccessDeniedError, ProtocolError, UnavailableError, VtpmError
from vtpm.peers.answers import MAX_ANSWER_BYTES, decode_answer
from vtpm.peers.book import Peer
from vtpm.peers.identity import HostIdentity, der_of
from vtpm.peers.server import CONTENT_TYPE, PATH
from vtpm.wire.service import error_of

CONNECT_S = 10.0
ANSWER_S = 90.0
"""How long a peer may take: quotes and anchors of a hardware TPM, and those before it in its queue."""
EXCHANGE_S = 120.0
"""How long all of it may take, whatever the peer sends meanwhile: what waits for it must not wait for ever."""
_ADD_THERE = "Add this host there, with what `vtpm peer certificate` prints here"
# X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
_OUT_OF_TIME = (9, 10)


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
        try:
            async with asyncio.timeout(EXCHANGE_S):
                answer = await self._said(peer, vtpm_id, message)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise UnavailableError(f"peer {peer.name} at {peer.url} did not answer in time") from error
        except (httpx.TransportError, OSError) as error:
            raise _failed(peer, error) from error
        try:
            return decode_answer(answer)
        except VtpmError as error:
            # Its words are shown to people here, who must see whose they are.
            raise error_of(error.code, f"peer {peer.name} answers: {error.message}", error.next_step) from error

    async def _said(self, peer: Peer, vtpm_id: UUID, message: bytes) -> bytes:
        context = await asyncio.to_thread(self._identity.client_context, peer.certificate)
        request = httpx.Request(
            "POST",
            f"{peer.url}{PATH}{vtpm_id}",
            content=message,
            headers={"Content-Type": CONTENT_TYPE},
            extensions={"timeout": httpx.Timeout(CONNECT_S, read=ANSWER_S).as_dict()},
        )
        # Without a client around it: cookies, redirects, proxies of the environment are none of ours, and a peer's
        # words do not go to the log.
        async with httpx.AsyncHTTPTransport(verify=context, http2=False, retries=0, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            try:
                _check_shown(response, peer)
                answer = await _read(response, peer)
            finally:
                await response.aclose()
        if response.status_code != httpx.codes.OK:
            raise ProtocolError(f"peer {peer.name} answers with HTTP {response.status_code}")
        return answer


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


def _failed(peer: Peer, error: Exception) -> AccessDeniedError | UnavailableError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            if cause.verify_code in _OUT_OF_TIME:
                return AccessDeniedError(
                    f"peer {peer.name} at {peer.url} shows a certificate out of its time: {cause.verify_message}",
                    next_step="Look at both hosts' clocks",
                )
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
