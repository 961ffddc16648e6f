"""GNU tar headers, field by field.

Written here and not by the standard library, whose bytes have changed between versions: a layer's digest may not
depend on which Python packed it. Never PAX, whose size records for files over 8 GiB Clair's scanner does not read.

Source: GNU tar manual, "Basic Tar Format" (struct posix_header, GNU_MAGIC, base-256 numbers, `././@LongLink`).
"""

from __future__ import annotations

from typing import Final

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
"""Ends an archive."""
REGULAR: Final = b"0"
DIRECTORY: Final = b"5"
_LONG_NAME: Final = b"L"


def padded(size_bytes: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size_bytes // BLOCK) * BLOCK


def member_header(name: str, size_bytes: int, mode: int, kind: bytes) -> bytes:
    """Return the header blocks of a member; a name over 100 bytes comes first, as a member of its own."""
    encoded = name.encode()
    if len(encoded) <= 100:
        return _block(encoded, size_bytes, mode, kind)
    content = encoded + b"\0"
    return (
        _block(b"././@LongLink", len(content), 0, _LONG_NAME)
        + content.ljust(padded(len(content)), b"\0")
        + _block(encoded[:100], size_bytes, mode, kind)
    )


def _block(name: bytes, size_bytes: int, mode: int, kind: bytes) -> bytes:
    """Return one 512-byte header; owner, time, link, names and devices stay zero."""
    before_checksum = name.ljust(100, b"\0") + _octal(mode, 8) + _octal(0, 8) * 2 + _number(size_bytes) + _octal(0, 12)
    after_checksum = kind + bytes(100) + b"ustar  \0" + bytes(BLOCK - 265)
    checksum = sum(before_checksum) + sum(after_checksum) + 8 * ord(" ")
    return before_checksum + b"%06o\0 " % checksum + after_checksum


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def _number(value: int) -> bytes:
    """Return a size in the field's 12 bytes: octal up to 8 GiB, else base 256 with the top bit set."""
    return _octal(value, 12) if value < 8**11 else b"\x80" + value.to_bytes(11, "big")
