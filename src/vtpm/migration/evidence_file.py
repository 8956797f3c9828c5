"""A host's evidence as an operator keeps it, to hold it against a policy. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from vtpm.errors import ProtocolError, UsageError
from vtpm.wire.evidence import MAX_BODY_BYTES
from vtpm.wire.service import MaxLength
from vtpm.wire.service_codec import codec_of

MAX_FILE_BYTES = 1024 * 1024
_FORM = "vtpm platform evidence"
_VERSION = 1


@dataclass(frozen=True)
class EvidenceFile:
    """See the module.

    Args:
        nonce: that the quote is over, 32 bytes.
        evidence: as wire.evidence encodes it.
        form, version: of the file.
    """

    nonce: Annotated[bytes, MaxLength(32)]
    evidence: Annotated[bytes, MaxLength(MAX_BODY_BYTES)]
    form: Annotated[str, MaxLength(64)] = _FORM
    version: int = _VERSION


def encode_evidence_file(content: EvidenceFile) -> bytes:
    """Return the file's content: JSON, bytes in base64."""
    return json.dumps(codec_of(EvidenceFile).encode(content), indent=1).encode("ascii") + b"\n"


def decode_evidence_file(data: bytes) -> EvidenceFile:
    """Read a file. Raises UsageError: it is none, or of another version."""
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ProtocolError(f"it has more than {MAX_FILE_BYTES} bytes")
        read: EvidenceFile = codec_of(EvidenceFile).decode(json.loads(data))
        if (read.form, read.version) != (_FORM, _VERSION):
            raise ProtocolError("it is of another form or version")
    except (ValueError, RecursionError, ProtocolError) as error:
        raise UsageError(
            f"the file has no evidence of a platform: {error}",
            next_step="Make one with `vtpm platform evidence --out FILE`",
        ) from error
    return read
