"""Authenticode digest of a PE/COFF image: what UEFI firmware measures into PCR 4 for an application that it starts.

Pure; may be imported by everyone. For kernels with an EFI stub, unified kernel images, shim, GRUB, systemd-boot. No
signature is looked at: the digest leaves out exactly what signing changes (the checksum, the certificate table and its
place in the header), so that an image has the same digest before and after, if it did not have to be padded to
a multiple of eight bytes.

Measured is what the firmware loads, which need not be a file as it is: QEMU (7.2 was seen) writes into the header of
a kernel that it gets with `-kernel`, so the digest of that file is not in the log.

Source: Microsoft, Windows Authenticode Portable Executable Signature Format, version 1.0 (2008), "Calculating the PE
Image Hash"; Microsoft Portable Executable and Common Object File Format Specification, revision 8.3. That this is
measured: TCG PC Client Platform Firmware Profile, version 1.05, revision 23, section 3.3.4.5 (PCR 4). C:
DxeTpm2MeasureBootLib, MeasurePeImageAndExtend (EDK II).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from vtpm.errors import UsageError
from vtpm.tpm.hash_algorithms import HashAlgorithm, refuse_sha1

MAX_IMAGE_BYTES = 1 << 30

MAX_SECTIONS = 96
"""Bound of the Windows loader; a unified kernel image has about a dozen."""

_DOS_HEADER_BYTES = 64
_PE_SIGNATURE = b"PE\0\0"
_COFF_HEADER = struct.Struct("<HHIIIHH")
_DATA_DIRECTORY_COUNT = {0x10B: 92, 0x20B: 108}
"""Magic of PE32 and PE32+ -> where in the optional header NumberOfRvaAndSizes is; the directories follow it."""
_SIZE_OF_HEADERS = 60
_CHECKSUM = 64
_CHECKSUM_BYTES = 4
_MAX_DIRECTORIES = 16
_DIRECTORY_BYTES = 8
_CERTIFICATE_TABLE = 4
_SECTION_HEADER_BYTES = 40
_SIZE_AND_POINTER = 16

_Image = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts are that are left out, as offsets into the file.

    Args:
        checksum: of the optional header's CheckSum.
        certificate_entry: of the data directory entry of the certificate table; None when there is no such entry.
        certificates: where the certificate table begins, or the end of the file.
    """

    checksum: int
    certificate_entry: int | None
    certificates: int


def authenticode_digest(image: _Image, algorithm: HashAlgorithm) -> bytes:
    """Return the Authenticode digest of an image.

    Only images without holes are taken: headers, then sections one after the other, then what belongs to no section,
    then the certificate table, which ends the file. All that linkers and `ukify` make are so; of others, firmware
    and signing tools each make a digest of their own.

    Args:
        image: the whole file, at most MAX_IMAGE_BYTES; a memoryview of a mapped file is not copied.
        algorithm: of the PCR bank; not SHA-1.
    Raises:
        UsageError: SHA-1 was asked for, or the file is no such image; the message says why.
    """
    refuse_sha1(algorithm)
    if len(image) > MAX_IMAGE_BYTES:
        raise UsageError(f"the EFI image has {len(image)} bytes; at most {MAX_IMAGE_BYTES} are read")
    with memoryview(image).cast("B") as view:
        layout = _layout(view)
        digest = hashlib.new(algorithm)
        digest.update(view[: layout.checksum])
        start = layout.checksum + _CHECKSUM_BYTES
        if layout.certificate_entry is not None:
            digest.update(view[start : layout.certificate_entry])
            start = layout.certificate_entry + _DIRECTORY_BYTES
        digest.update(view[start : layout.certificates])
        return digest.digest()


def _layout(image: memoryview) -> _Layout:
    if len(image) < _DOS_HEADER_BYTES or bytes(image[:2]) != b"MZ":
        raise _refusal("it does not begin with a DOS header")
    (pe_header,) = struct.unpack_from("<I", image, _DOS_HEADER_BYTES - 4)
    optional_header = pe_header + len(_PE_SIGNATURE) + _COFF_HEADER.size
    if optional_header > len(image) or bytes(image[pe_header : pe_header + len(_PE_SIGNATURE)]) != _PE_SIGNATURE:
        raise _refusal("its DOS header leads to no PE header")
    _, section_count, *_, optional_bytes, _ = _COFF_HEADER.unpack_from(image, pe_header + len(_PE_SIGNATURE))
    section_table = optional_header + optional_bytes
    if section_table > len(image):
        raise _refusal("its optional header is cut off")
    directory_count, directories = _directories(image, optional_header, optional_bytes)
    headers_end = _u32(image, optional_header + _SIZE_OF_HEADERS)
    if section_count > MAX_SECTIONS:
        raise _refusal(f"it has {section_count} sections; at most {MAX_SECTIONS} are read")
    if not section_table + section_count * _SECTION_HEADER_BYTES <= headers_end <= len(image):
        raise _refusal("its headers do not end where they say")
    sections_end = _sections_end(image, section_table, section_count, headers_end)
    certificate_entry, certificates = None, len(image)
    if directory_count > _CERTIFICATE_TABLE:
        certificate_entry = directories + _CERTIFICATE_TABLE * _DIRECTORY_BYTES
        offset, size = struct.unpack_from("<II", image, certificate_entry)
        if size:
            if offset < sections_end or offset + size != len(image):
                raise _refusal("its certificate table is not at its end")
            certificates = offset
    return _Layout(optional_header + _CHECKSUM, certificate_entry, certificates)


def _directories(image: memoryview, optional_header: int, optional_bytes: int) -> tuple[int, int]:
    """Return how many data directories there are, and the offset of the first."""
    magic = int.from_bytes(image[optional_header : optional_header + min(2, optional_bytes)], "little")
    if magic not in _DATA_DIRECTORY_COUNT:
        raise _refusal(f"its optional header is neither PE32 nor PE32+ (0x{magic:x})")
    directories = _DATA_DIRECTORY_COUNT[magic] + 4
    if optional_bytes < directories:
        raise _refusal("its optional header is too small")
    count = _u32(image, optional_header + _DATA_DIRECTORY_COUNT[magic])
    # The firmware's loader asks for equality too.
    if count > _MAX_DIRECTORIES or optional_bytes != directories + count * _DIRECTORY_BYTES:
        raise _refusal(f"its optional header does not hold the {count} data directories that it announces")
    return count, optional_header + directories


def _sections_end(image: memoryview, section_table: int, section_count: int, headers_end: int) -> int:
    """Return where the last section ends, after seeing that each begins where the one before it ends."""
    places = []
    for index in range(section_count):
        header = section_table + index * _SECTION_HEADER_BYTES
        size, pointer = struct.unpack_from("<II", image, header + _SIZE_AND_POINTER)
        if size:
            places.append((pointer, size))
    end = headers_end
    for pointer, size in sorted(places):
        if pointer != end:
            raise _refusal(f"its section at offset {pointer} does not begin where the part before it ends, at {end}")
        end = pointer + size
    if end > len(image):
        raise _refusal("its sections are cut off")
    return end


def _u32(image: memoryview, offset: int) -> int:
    (value,) = struct.unpack_from("<I", image, offset)
    return int(value)


def _refusal(why: str) -> UsageError:
    return UsageError(f"the EFI image cannot be measured: {why}")
