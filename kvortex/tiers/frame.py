"""The frame: the format of one block in a file or an object, version 1.

In a file a frame is a header of 4,096 bytes, the payload, and zeros up to a multiple of 4,096 bytes, so both start and
end at the alignment that O_DIRECT needs. In an object it is the first 128 bytes of such a header, and the payload.
Integers are little-endian.

| offset | bytes | field |
|---|---|---|
| 0 | 8 | magic `KVORTEX\\0` |
| 8 | 8 | header checksum: BLAKE2b-64 of the other bytes of the header |
| 16 | 4 | format version: 1 |
| 20 | 4 | header length in bytes: 4,096 or 128 |
| 24 | 4 | codec |
| 28 | 4 | zero |
| 32 | 8 | payload length in bytes, exact |
| 40 | 8 | raw length in bytes: of the block once decoded |
| 48 | 8 | payload digest |
| 56 | 8 | zero |
| 64 | 32 | namespace digest |
| 96 | 32 | key |
| 128 | 3,968 | zeros, in a file |

The first two fields are the same in every version, so a damaged frame can be told from one of a later version: if the
checksum is right and the version is another, the frame is good and is left as it is. The checksum covers the whole
header, and the digest the whole payload; the zeros behind the payload are checked as well, and the length of the whole
follows from that of the payload. So every change of a byte of a frame is noticed.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from kvortex.tiers.base import Cause

MAGIC: Final = b"KVORTEX\0"
FORMAT_VERSION: Final = 1
ALIGNMENT_BYTES: Final = 4096
HEADER_BYTES: Final = ALIGNMENT_BYTES
SHORT_HEADER_BYTES: Final = 128

_FIELDS = struct.Struct("<IIII QQQQ 32s32s")
_CHECKSUM_AT, _FIELDS_AT = 8, 16
_CHECKSUM_BYTES = _FIELDS_AT - _CHECKSUM_AT


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fields of a frame's header; see `ReadOutcome` for their meaning."""

    namespace: bytes
    key: bytes
    codec: int
    payload_bytes: int
    raw_bytes: int
    digest: int


def padded(payload_bytes: int) -> int:
    """Bytes that a payload takes in a frame, padding included."""
    return -(-payload_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def frame_bytes(payload_bytes: int) -> int:
    """Bytes of a whole frame, and so of its file."""
    return HEADER_BYTES + padded(payload_bytes)


def encode_header(header: FrameHeader, header_bytes: int = HEADER_BYTES) -> bytes:
    """The header, of so many bytes.

    Raises:
        ValueError: a value does not fit its field.
    """
    try:
        fields = _FIELDS.pack(
            FORMAT_VERSION,
            header_bytes,
            header.codec,
            0,
            header.payload_bytes,
            header.raw_bytes,
            header.digest,
            0,
            header.namespace,
            header.key,
        )
    except struct.error as error:
        raise ValueError(f"a frame cannot hold {header}: {error}") from error
    body = fields + bytes(header_bytes - _FIELDS_AT - len(fields))
    return MAGIC + _checksum(MAGIC, body) + body


def decode_header(
    block: bytes | memoryview, namespace: bytes, key: bytes, header_bytes: int = HEADER_BYTES
) -> FrameHeader | Cause:
    """Decode the header of a frame.

    Args:
        block: its bytes.
        namespace: digest of the expected namespace, 32 bytes.
        key: the expected key, 32 bytes.
        header_bytes: bytes that the header has.

    Returns:
        The header, or CORRUPT or UNKNOWN_VERSION. The header of another block or namespace is CORRUPT, because it does
        not agree with the name of the file.
    """
    if len(block) != header_bytes:
        return Cause.CORRUPT
    body = block[_FIELDS_AT:]
    if block[:_CHECKSUM_AT] != MAGIC or block[_CHECKSUM_AT:_FIELDS_AT] != _checksum(MAGIC, body):
        return Cause.CORRUPT
    version, stated_bytes, codec, _, payload_bytes, raw_bytes, digest, _, in_namespace, in_key = _FIELDS.unpack_from(
        block, _FIELDS_AT
    )
    if version != FORMAT_VERSION:
        return Cause.UNKNOWN_VERSION
    if stated_bytes != header_bytes or payload_bytes == 0 or in_namespace != namespace or in_key != key:
        return Cause.CORRUPT
    return FrameHeader(in_namespace, in_key, codec, payload_bytes, raw_bytes, digest)


def _checksum(magic: bytes, body: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(magic, digest_size=_CHECKSUM_BYTES)
    state.update(body)
    return state.digest()
