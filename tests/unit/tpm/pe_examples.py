"""PE/COFF images built by hand and what Hypothesis makes of them. Test code; shares no code with the parser.

The digest is made of the pieces before they are put together, so it knows nothing of offsets.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace

from hypothesis import strategies as st

PE32, PE32_PLUS = 0x10B, 0x20B
_STANDARD_BYTES = {PE32: 96, PE32_PLUS: 112}


@dataclass(frozen=True)
class Pe:
    """An image and what may be wrong with it.

    Args:
        sections: content of each, in the file's order.
        table_order: in which order the section table lists them; empty for the file's.
        directories: number of data directories.
        trailing: what belongs to no section.
        certificates: the certificate table; empty for none.
        checksum: four bytes.
        stub: between DOS header and PE header.
        padding: between the section table and the end of the headers.
    """

    sections: tuple[bytes, ...] = (b"code" * 8, b"data" * 8)
    table_order: tuple[int, ...] = ()
    magic: int = PE32_PLUS
    directories: int = 16
    trailing: bytes = b""
    certificates: bytes = b""
    checksum: bytes = b"\0\0\0\0"
    stub: bytes = b"stub"
    padding: bytes = b"\0\0\0"
    claimed_directories: int | None = None
    claimed_sections: int | None = None
    claimed_headers_end: int | None = None
    claimed_certificates: tuple[int, int] | None = None
    section_shift: int = 0
    pe_signature: bytes = b"PE\0\0"

    def pieces(self) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """What is measured, checksum, measured, entry of the certificate table, measured."""
        pe_header = 64 + len(self.stub)
        optional_bytes = _STANDARD_BYTES[self.magic] + 8 * self.directories
        table = pe_header + 24 + optional_bytes
        headers_end = table + 40 * len(self.sections) + len(self.padding)
        body = b"".join(self.sections) + self.trailing
        claimed_end = headers_end if self.claimed_headers_end is None else self.claimed_headers_end
        listed = len(self.sections) if self.claimed_sections is None else self.claimed_sections

        dos = b"MZ" + bytes(58) + struct.pack("<I", pe_header) + self.stub
        coff = self.pe_signature + struct.pack("<HHIIIHH", 0x8664, listed, 0, 0, 0, optional_bytes, 0x22E)
        before = struct.pack("<H", self.magic) + bytes(58) + struct.pack("<I", claimed_end)
        count = self.directories if self.claimed_directories is None else self.claimed_directories
        after = bytes(_STANDARD_BYTES[self.magic] - 68 - 4) + struct.pack("<I", count)
        others = b"".join(struct.pack("<II", number, 8) for number in range(self.directories))
        place = (headers_end + len(body), len(self.certificates)) if self.certificates else (0, 0)
        entry = struct.pack("<II", *(self.claimed_certificates or place))
        rest = self._section_table(headers_end) + self.padding + body
        if self.directories > 4:
            return dos + coff + before, self.checksum, after + others[:32], entry, others[40:] + rest
        return dos + coff + before, self.checksum, after + others, b"", rest

    def image(self) -> bytes:
        return b"".join(self.pieces()) + self.certificates

    def digest(self, name: str) -> bytes:
        first, _, second, _, third = self.pieces()
        return hashlib.new(name, first + second + third).digest()

    def _section_table(self, start: int) -> bytes:
        rows = []
        for content in self.sections:
            pointer = start + self.section_shift if content else 0
            rows.append(struct.pack("<8sIIIIIIHHI", b".section", 0, 0, len(content), pointer, 0, 0, 0, 0, 0))
            start += len(content)
        return b"".join(rows[at] for at in self.table_order or range(len(rows)))


@st.composite
def images(draw: st.DrawFn) -> Pe:
    """Images that are taken: any number of sections in any order, signed or not."""
    sections = tuple(draw(st.lists(st.binary(max_size=12), max_size=5)))
    pe = Pe(
        sections=sections,
        table_order=tuple(draw(st.permutations(range(len(sections))))),
        magic=draw(st.sampled_from([PE32, PE32_PLUS])),
        directories=draw(st.integers(0, 16)),
        trailing=draw(st.binary(max_size=12)),
        checksum=draw(st.binary(min_size=4, max_size=4)),
        stub=draw(st.binary(max_size=12)),
        padding=draw(st.binary(max_size=12)),
    )
    # Without an entry for them there is no saying where certificates begin.
    return replace(pe, certificates=draw(st.binary(max_size=16))) if pe.directories > 4 else pe
