"""The keeper's part of attestation: who the platform is, quotes with what they are over, credentials opened.

What the attestation key signs is what the TPM says of itself; whoever may ask the keeper may have it quoted, over any
qualifying data. For the keeper alone; blocking.
"""

from __future__ import annotations

from vtpm.errors import AttestationError, PlatformTpmError, UsageError
from vtpm.keeper.custody import Custody
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.attest import read_quote
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import encode
from vtpm.wire.keeper import ActivatedSecret, Credential, PlatformIdentity, QuoteArgs, QuotedPcrs

TRIES = 5
"""How often PCRs that were extended between being read and being quoted are read again."""


class Attesting:
    """See the module.

    Args:
        custody: the root key, which has to be open, and the platform TPM.
    """

    def __init__(self, custody: Custody) -> None:
        self._custody = custody

    def identity(self) -> PlatformIdentity:
        """Return the platform's keys. Raises as KeeperClient.identity."""

        def ask(tpm: PlatformTpm) -> PlatformIdentity:
            known = tpm.identity()
            return PlatformIdentity(known.endorsement, known.attestation, tpm.endorsement_certificate())

        return self._custody.ask(ask)

    def quote(self, args: QuoteArgs) -> QuotedPcrs:
        """Return a quote with the values that it is over. Raises as KeeperClient.quote."""
        if args.bank not in list(PcrBank):
            raise UsageError(f"PCRs of the bank {args.bank!r} are not quoted", next_step="Use the bank sha256")
        selection = PcrSelection(PcrBank(args.bank), args.pcrs)
        launches = self._custody.launches_of_open_root()

        def ask(tpm: PlatformTpm) -> QuotedPcrs:
            for _ in range(TRIES):
                # Nothing is launched meanwhile: the keeper does one thing at a time with the TPM.
                log = encode(launches.shown(tpm))
                values = tpm.pcr_values(selection)
                signed = tpm.quote(selection, args.extra)
                try:
                    read_quote(signed.attest).require_values(HashAlgorithm(args.bank), values)
                except AttestationError:
                    continue
                return QuotedPcrs(signed.attest, signed.signature, tuple(values[i] for i in args.pcrs), log)
            raise PlatformTpmError(
                f"the PCRs {selection} of the platform TPM change all the time",
                next_step="Find out what extends them, or take such PCRs out of the platform policy",
            )

        return self._custody.ask(ask)

    def activate(self, args: Credential) -> ActivatedSecret:
        """Return what a credential held. Raises as KeeperClient.activate."""
        secret = self._custody.ask(lambda tpm: tpm.activate(args.credential, args.encrypted_secret))
        return ActivatedSecret(secret.reveal())
