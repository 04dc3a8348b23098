"""The frame: the format of one block in a file or an object, versions 1 (plain) and 2 (sealed).

In a file a frame is a header of 4,096 bytes, the payload, and zeros up to a multiple of 4,096 bytes, so both start and
end at the alignment that O_DIRECT needs. In an object it is the first 128 bytes of such a header, and the payload.
Integers are little-endian.

| offset | bytes | field |
|---|---|---|
| 0 | 8 | magic `KVORTEX\\0` |
| 8 | 8 | header checksum: BLAKE2b-64 of the other bytes of the header |
| 16 | 4 | format version: 1, or 2 for a sealed frame |
| 20 | 4 | header length in bytes: 4,096 or 128; 192 for a sealed object |
| 24 | 4 | codec |
| 28 | 4 | zero |
| 32 | 8 | payload length in bytes, exact |
| 40 | 8 | raw length in bytes: of the block once decoded |
| 48 | 8 | payload digest |
| 56 | 8 | zero |
| 64 | 32 | namespace digest |
| 96 | 32 | key |
| 128 | 3,968 | zeros, in a file |

In a sealed frame (`kvortex.tiers.sealing`) the payload is encrypted, and the header goes on behind the key, in an
object too:

| offset | bytes | field |
|---|---|---|
| 128 | 16 | id of the key that sealed it, ASCII, zeros behind it |
| 144 | 24 | nonce |
| 168 | 16 | tag |
| 184 | 8 | zero |

The tag authenticates the payload and the header from offset 16 on, but for itself. The checksum of a sealed object
covers its first 128 bytes only, so that a reader of version 1 finds a frame of another version and leaves it alone.

The first two fields are the same in every version, so a damaged frame can be told from one of a later version: if the
checksum is right and the version is another, the frame is good and is left as it is. The checksum covers the whole
header, and the digest the whole payload; the zeros behind the payload are checked as well, and the length of the whole
follows from that of the payload. So every change of a byte of a frame is noticed. Only a seal finds changes that
somebody has made on purpose.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from kvortex.tiers.base import Cause

MAGIC: Final = b"KVORTEX\0"
FORMAT_VERSION: Final = 1
SEALED_VERSION: Final = 2
ALIGNMENT_BYTES: Final = 4096
HEADER_BYTES: Final = ALIGNMENT_BYTES
SHORT_HEADER_BYTES: Final = 128
KEY_ID_BYTES: Final = 16
NONCE_BYTES: Final = 24
TAG_BYTES: Final = 16
SEALED_HEADER_BYTES: Final = 192
"""Bytes of the header of a sealed object."""

_FIELDS = struct.Struct("<IIII QQQQ 32s32s")
_SEAL = struct.Struct(f"{KEY_ID_BYTES}s{NONCE_BYTES}s{TAG_BYTES}sQ")
_CHECKSUM_AT, _FIELDS_AT, _SEAL_AT = 8, 16, 128
_TAG_AT = _SEAL_AT + KEY_ID_BYTES + NONCE_BYTES
_CHECKSUM_BYTES = _FIELDS_AT - _CHECKSUM_AT


@dataclass(frozen=True, slots=True)
class Seal:
    """What a sealed frame's header has beside the fields of a plain one.

    Attributes:
        key_id: id of the key, 16 bytes.
        nonce: nonce, 24 bytes.
        tag: tag, 16 bytes.
        associated: the bytes of the header that the tag authenticates.
    """

    key_id: bytes
    nonce: bytes
    tag: bytes
    associated: bytes


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fields of a frame's header; see `ReadOutcome` for their meaning. `seal` is None in a plain frame."""

    namespace: bytes
    key: bytes
    codec: int
    payload_bytes: int
    raw_bytes: int
    digest: int
    seal: Seal | None = None


def padded(payload_bytes: int) -> int:
    """Bytes that a payload takes in a frame, padding included."""
    return -(-payload_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def frame_bytes(payload_bytes: int) -> int:
    """Bytes of a whole frame, and so of its file."""
    return HEADER_BYTES + padded(payload_bytes)


def encode_header(header: FrameHeader, header_bytes: int = HEADER_BYTES) -> bytes:
    """The header of a plain frame, of so many bytes.

    Raises:
        ValueError: a value does not fit its field.
    """
    return _with_checksum(_body(header, FORMAT_VERSION, header_bytes))


def encode_sealed_header(
    header: FrameHeader, header_bytes: int, key_id: bytes, nonce: bytes, seal: Callable[[bytes], bytes]
) -> bytes:
    """The header of a sealed frame, of so many bytes.

    Args:
        header: its fields.
        header_bytes: 4,096 for a file, `SEALED_HEADER_BYTES` for an object.
        key_id: id of the key, 16 bytes.
        nonce: nonce, 24 bytes.
        seal: called once with the bytes that the tag has to authenticate beside the payload; returns the tag.

    Raises:
        ValueError: a value does not fit its field.
    """
    body = bytearray(_body(header, SEALED_VERSION, header_bytes))
    _SEAL.pack_into(body, _SEAL_AT - _FIELDS_AT, key_id, nonce, bytes(TAG_BYTES), 0)
    tag_at = _TAG_AT - _FIELDS_AT
    body[tag_at : tag_at + TAG_BYTES] = seal(_associated(body))
    return _with_checksum(bytes(body))


def decode_header(
    block: bytes | memoryview, namespace: bytes, key: bytes, header_bytes: int = HEADER_BYTES
) -> FrameHeader | Cause:
    """Decode the header of a plain frame.

    Args:
        block: its bytes.
        namespace: digest of the expected namespace, 32 bytes.
        key: the expected key, 32 bytes.
        header_bytes: bytes that the header has.

    Returns:
        The header, or CORRUPT, SEALED or UNKNOWN_VERSION. The header of another block or namespace is CORRUPT, because
        it does not agree with the name of the file.
    """
    if len(block) != header_bytes or not _has_checksum(block):
        return Cause.CORRUPT
    version, header = _fields(block, header_bytes)
    if version != FORMAT_VERSION:
        return Cause.SEALED if version == SEALED_VERSION else Cause.UNKNOWN_VERSION
    return _expected(header, namespace, key) or Cause.CORRUPT


def decode_sealed_header(
    block: bytes | memoryview, namespace: bytes, key: bytes, header_bytes: int
) -> FrameHeader | None:
    """Decode the header of a sealed frame; None for any other. Its fields cannot be trusted before the tag is checked.

    Args:
        block: its bytes.
        namespace: digest of the expected namespace, 32 bytes.
        key: the expected key, 32 bytes.
        header_bytes: bytes that the header has.
    """
    if len(block) != header_bytes or not _has_checksum(block):
        return None
    version, header = _fields(block, header_bytes)
    expected = _expected(header, namespace, key)
    if version != SEALED_VERSION or expected is None:
        return None
    key_id, nonce, tag, _ = _SEAL.unpack_from(block, _SEAL_AT)
    return replace(expected, seal=Seal(key_id, nonce, tag, _associated(block[_FIELDS_AT:])))


def _body(header: FrameHeader, version: int, header_bytes: int) -> bytes:
    """A header without its first two fields."""
    try:
        fields = _FIELDS.pack(
            version,
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
    return fields + bytes(header_bytes - _FIELDS_AT - len(fields))


def _fields(block: bytes | memoryview, header_bytes: int) -> tuple[int, FrameHeader | None]:
    """The version that a header states, and its fields; None if they cannot be those of a block."""
    version, stated_bytes, codec, _, payload_bytes, raw_bytes, digest, _, namespace, key = _FIELDS.unpack_from(
        block, _FIELDS_AT
    )
    if stated_bytes != header_bytes or payload_bytes == 0:
        return version, None
    return version, FrameHeader(namespace, key, codec, payload_bytes, raw_bytes, digest)


def _expected(header: FrameHeader | None, namespace: bytes, key: bytes) -> FrameHeader | None:
    return header if header is not None and (header.namespace, header.key) == (namespace, key) else None


def _associated(body: bytes | bytearray | memoryview) -> bytes:
    """What a tag authenticates of a header, which is given without its first two fields."""
    tag_at = _TAG_AT - _FIELDS_AT
    return bytes(body[:tag_at]) + bytes(body[tag_at + TAG_BYTES :])


def _with_checksum(body: bytes) -> bytes:
    return MAGIC + _checksum(MAGIC, body[: _covered_bytes(len(body))]) + body


def _has_checksum(block: bytes | memoryview) -> bool:
    body = block[_FIELDS_AT:]
    stated = block[_CHECKSUM_AT:_FIELDS_AT]
    return block[:_CHECKSUM_AT] == MAGIC and stated == _checksum(MAGIC, body[: _covered_bytes(len(body))])


def _covered_bytes(body_bytes: int) -> int:
    """Bytes behind the first two fields that the checksum covers."""
    is_file = body_bytes == HEADER_BYTES - _FIELDS_AT
    return body_bytes if is_file else SHORT_HEADER_BYTES - _FIELDS_AT


def _checksum(magic: bytes, body: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(magic, digest_size=_CHECKSUM_BYTES)
    state.update(body)
    return state.digest()
