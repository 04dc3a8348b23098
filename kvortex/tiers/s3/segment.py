"""The format of an object, version 1: payloads of blocks, and a footer that says which they are.

An object, called a segment here, is written once. It has payloads, each at a multiple of 8 bytes, and then the footer.
Integers are little-endian.

| offset in the footer | bytes | field |
|---|---|---|
| 0 | 8 | magic `KVORTXSG` |
| 8 | 8 | checksum: BLAKE2b-64 of all other bytes of the footer |
| 16 | 4 | format version: 1 |
| 20 | 4 | number of blocks, n |
| 24 | 4 | number of removals, m |
| 28 | 4 | zero |
| 32 | 32 | namespace digest |
| 64 | 72 n | blocks: key (32), offset in the object, stored bytes, raw bytes, digest (8 each), codec, zero (4 each) |
| 64 + 72 n | 32 m | removals: the number of a segment (24), the position of a block in it (4), zero (4) |
| 64 + 72 n + 32 m | 8 | bytes of the footer, all of it |

The stored bytes of a block are its payload; of a sealed block a header (`kvortex.tiers.frame`) and its payload, and the
objects of sealed blocks have names of their own.

A *removal* says that a block of an earlier segment is gone, while the others of that segment stay.

The name of an object is its *number*, in hexadecimal: the time of its writing in milliseconds since the epoch (12
digits), the checksum (16), and the bytes of the footer (8). So names are in the order of time, a name never stands for
two different contents, and one request for a range brings the footer.
"""

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, overload

from kvortex.tiers.base import Cause

MAGIC: Final = b"KVORTXSG"
FORMAT_VERSION: Final = 1
ALIGNMENT_BYTES: Final = 8
MAX_BLOCKS: Final = 1 << 16
"""Blocks of a segment, at most: a footer has at most 4.5 MiB then."""

_HEAD = struct.Struct("<8s8sIIII32s")
_BLOCK = struct.Struct("<32sQQQQII")
_REMOVAL = struct.Struct("<QQQII")
_LENGTH = struct.Struct("<Q")
_CHECKSUM_AT, _FIELDS_AT = 8, 16
FIXED_BYTES: Final = _HEAD.size + _LENGTH.size
"""What a footer has without blocks."""
BLOCK_BYTES: Final = _BLOCK.size
MAX_FOOTER_BYTES: Final = 1 << 24

_NAME = re.compile(r"([0-9a-f]{12})-([0-9a-f]{16})-([0-9a-f]{8})")
_ID = struct.Struct("<QQQ8x")


class SegmentId(NamedTuple):
    """What a segment's name says: time in milliseconds since the epoch, checksum and bytes of its footer."""

    written_ms: int
    checksum: int
    footer_bytes: int

    @property
    def name(self) -> str:
        """The name of its object, without what stands in front of all of a namespace."""
        return f"{self.written_ms:012x}-{self.checksum:016x}-{self.footer_bytes:08x}"

    @property
    def key(self) -> bytes:
        """The same as 32 bytes, for an index."""
        return _ID.pack(self.written_ms, self.checksum, self.footer_bytes)

    @classmethod
    def of_key(cls, key: bytes) -> "SegmentId":
        """The segment that has this key."""
        return cls(*_ID.unpack(key))

    @classmethod
    def of_name(cls, name: str) -> "SegmentId | None":
        """The segment that has this name; None if it is the name of something else."""
        if (match := _NAME.fullmatch(name)) is None:
            return None
        return cls(*(int(part, 16) for part in match.groups()))


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One block of a segment; see `ReadOutcome` for its numbers. `offset` is in bytes from the begin of the object."""

    key: bytes
    offset: int
    stored_bytes: int
    raw_bytes: int
    digest: int
    codec: int

    @property
    def end(self) -> int:
        """The offset behind its bytes."""
        return self.offset + self.stored_bytes


class PackedEntries(Sequence[StoredEntry]):
    """The blocks of a footer as they stand in it, which takes a quarter of the memory."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data) // BLOCK_BYTES

    @overload
    def __getitem__(self, position: int) -> StoredEntry: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[StoredEntry]: ...
    def __getitem__(self, position: int | slice) -> StoredEntry | Sequence[StoredEntry]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        if not 0 <= position < len(self):
            raise IndexError(position)
        return StoredEntry(*_BLOCK.unpack_from(self._data, position * BLOCK_BYTES)[:6])


@dataclass(frozen=True, slots=True)
class Removal:
    """A block that is gone: its segment, and its position there."""

    segment: SegmentId
    position: int


@dataclass(frozen=True, slots=True)
class Footer:
    """What a segment has, and what it says of others."""

    blocks: Sequence[StoredEntry]
    removals: Sequence[Removal]


def aligned(nbytes: int) -> int:
    """Bytes that a payload takes in a segment, padding included."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def segment_bytes(payloads: Sequence[int]) -> int:
    """Bytes of a segment with payloads of these bytes."""
    return sum(map(aligned, payloads)) + FIXED_BYTES + BLOCK_BYTES * len(payloads)


def encode_footer(namespace: bytes, footer: Footer, written_ms: int) -> tuple[SegmentId, bytes]:
    """The footer in bytes, and the name that its segment has to have.

    Raises:
        ValueError: a value does not fit its field.
    """
    nbytes = FIXED_BYTES + BLOCK_BYTES * len(footer.blocks) + _REMOVAL.size * len(footer.removals)
    try:
        head = _HEAD.pack(MAGIC, bytes(8), FORMAT_VERSION, len(footer.blocks), len(footer.removals), 0, namespace)
        parts = [head[_FIELDS_AT:]]
        for each in footer.blocks:
            numbers = (each.offset, each.stored_bytes, each.raw_bytes, each.digest, each.codec, 0)
            parts.append(_BLOCK.pack(each.key, *numbers))
        for gone in footer.removals:
            of = gone.segment
            parts.append(_REMOVAL.pack(of.written_ms, of.checksum, of.footer_bytes, gone.position, 0))
    except struct.error as error:
        raise ValueError(f"a segment cannot hold {footer}: {error}") from error
    body = b"".join([*parts, _LENGTH.pack(nbytes)])
    checksum = _checksum(body)
    return SegmentId(written_ms, int.from_bytes(checksum, "little"), nbytes), MAGIC + checksum + body


def decode_footer(data: bytes | memoryview, namespace: bytes, segment: SegmentId, object_bytes: int) -> Footer | Cause:
    """Decode the footer of a segment.

    Args:
        data: its bytes.
        namespace: digest of the expected namespace, 32 bytes.
        segment: what the object's name says.
        object_bytes: bytes of the whole object.

    Returns:
        The footer, or CORRUPT or UNKNOWN_VERSION. That of another segment or namespace is CORRUPT, because it does not
        agree with the name, and so is one that names bytes which the object does not have.
    """
    if len(data) != segment.footer_bytes or len(data) < FIXED_BYTES or len(data) > object_bytes:
        return Cause.CORRUPT
    body = data[_FIELDS_AT:]
    checksum = bytes(data[_CHECKSUM_AT:_FIELDS_AT])
    if (
        data[:_CHECKSUM_AT] != MAGIC
        or checksum != _checksum(body)
        or int.from_bytes(checksum, "little") != (segment.checksum)
    ):
        return Cause.CORRUPT
    _, _, version, num_blocks, num_removals, _, in_namespace = _HEAD.unpack_from(data)
    if version != FORMAT_VERSION:
        return Cause.UNKNOWN_VERSION
    removals_at = _HEAD.size + BLOCK_BYTES * num_blocks
    length_at = removals_at + _REMOVAL.size * num_removals
    if length_at + _LENGTH.size != len(data) or _LENGTH.unpack_from(data, length_at)[0] != len(data):
        return Cause.CORRUPT
    blocks = PackedEntries(bytes(data[_HEAD.size : removals_at]))
    room = object_bytes - len(data)
    if in_namespace != namespace or any(not each.stored_bytes or each.end > room for each in blocks):
        return Cause.CORRUPT
    removals = [
        Removal(SegmentId(*number), position)
        for *number, position, _ in _REMOVAL.iter_unpack(data[removals_at:length_at])
    ]
    return Footer(blocks, removals)


def _checksum(body: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(MAGIC, digest_size=_FIELDS_AT - _CHECKSUM_AT)
    state.update(body)
    return state.digest()
