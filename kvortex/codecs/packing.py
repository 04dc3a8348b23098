"""Packed payloads: which codecs there are, and where a packed block's words come from.

A *unit* is 8 bytes of packed codes: 8 elements in `fp8`, 4 in `bf16`, from 16 or 32 bytes of the cache. 16 units of
one segment that follow each other are a *group*: 128 elements in `fp8`, which is one token of one head where heads
have 128 dimensions. A packed payload is the codes of all segments in order, then (for `fp8`) one byte a group: its
scale, as in the shared exponents of the OCP Microscaling formats (MX v1.0): the power of two that brings the group's
largest magnitude into (224, 448], the upper end of E4M3.

Scales are powers of two because then nothing is rounded but the codes: unpacking is exact, and packing what was
unpacked loses nothing more, however often a block goes round.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import ConfigError
from kvortex.layout import KVLayout
from kvortex.types import BlockSizes

RAW: Final = "raw"
GROUP_UNITS: Final = 16
UNITS_A_TILE: Final = 256
LANE_BYTES: Final = 16
_GROUPS_A_WORD: Final = 8
LOST_STEPS: Final = 1024
THERE_STEPS: Final = 16
"""Sums of squares are counted in whole steps a unit, so that they can be added up in any order. A unit's elements are
at most 448 over their scale, and differ by at most 16 from their codes: both fit 32 bits, a block's 64."""
NOT_FINITE: Final = 1 << 50
"""Added to a block's sum of squared errors for each tile with an element that is too large. It is more than any sum."""


class Codec(IntEnum):
    """How a payload encodes a block, as it is written in a frame. Numbers are never reused."""

    RAW = 0
    BF16 = 1
    FP8 = 2


@dataclass(frozen=True, slots=True)
class Format:
    """How one codec packs one dtype of the cache: what a unit consists of."""

    codec: str
    dtype: str
    elements: int  # in a unit
    lanes: int  # 16-byte accesses of the cache that a unit takes
    has_scales: bool
    largest_bits: int  # of the largest float32 that cannot become infinite when it is rounded and unpacked


FORMATS: Final = (
    Format("fp8", "bfloat16", 8, 1, has_scales=True, largest_bits=0x7F600000),
    Format("fp8", "float16", 8, 1, has_scales=True, largest_bits=0x47600000),
    Format("fp8", "float32", 8, 2, has_scales=True, largest_bits=0x7F600000),
    Format("bf16", "float32", 4, 1, has_scales=False, largest_bits=0x7F7F0000),
)
CODECS: Final = (RAW, *dict.fromkeys(f.codec for f in FORMATS))


@dataclass(frozen=True)
class Packing:
    """How blocks of one layout are packed.

    `tiles` is `int64 [num_tiles, 5]`, a row for what one warp packs: the first 16-byte lane in the arena, the block
    stride in lanes, the first unit (also its word in the packed payload), the number of units (at most 256), and the
    first word of its scales in the packed payload. A tile lies in one segment and starts a group; its scales fill
    whole words, bytes of absent groups are zero.
    """

    format: Format
    tiles: NDArray[np.int64]
    code_words: int
    scale_words: int

    @property
    def codec(self) -> str:
        return self.format.codec

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of a packed block's payload."""
        return 8 * (self.code_words + self.scale_words)


@dataclass(frozen=True, slots=True)
class Encodings:
    """Both encodings of a layout's blocks, raw and packed: bytes of a payload and of an extent, and the codec."""

    payloads: BlockSizes
    extents: BlockSizes
    codec: str

    def payload_nbytes(self, packed: bool) -> int:
        """Bytes of a payload."""
        return self.payloads.packed if packed else self.payloads.raw

    def codec_number(self, packed: bool) -> Codec:
        """The codec's number in the frame of a block in this encoding."""
        return Codec[(self.codec if packed else RAW).upper()]


def encodings_of(layout: KVLayout, packing: Packing | None) -> Encodings:
    """Encodings of a layout's blocks."""
    payloads = BlockSizes(layout.block_nbytes, packing.block_nbytes if packing else layout.block_nbytes)
    return Encodings(payloads, block_sizes(layout, packing), packing.codec if packing else RAW)


def block_sizes(layout: KVLayout, packing: Packing | None) -> BlockSizes:
    """Sizes of a layout's blocks in the pool."""
    raw = align_up(layout.block_nbytes, EXTENT_ALIGNMENT_BYTES)
    return BlockSizes(raw, align_up(packing.block_nbytes, EXTENT_ALIGNMENT_BYTES) if packing else raw)


def packed_nbytes(segment_nbytes: Iterable[int], codec: str, dtype: str) -> int | None:
    """Bytes of a packed payload of such segments; None where `codec` leaves `dtype` as it is.

    Raises:
        ConfigError: no such codec, or segments that are not whole units.
    """
    fmt = _format_of(codec, (dtype,))
    if fmt is None:
        return None
    counts = [_units_of(nbytes, fmt) for nbytes in segment_nbytes]
    return 8 * (sum(counts) + sum(map(_scale_words, counts)) * fmt.has_scales)


def packing_for(layout: KVLayout, codec: str) -> Packing | None:
    """How `layout` is packed by `codec`; None where it is left as it is.

    That is: for `raw`, and for caches whose elements the codec does not take, such as FP8 caches.

    Raises:
        ConfigError: no such codec, or segments that are not whole units.
    """
    fmt = _format_of(codec, layout.dtypes)
    if fmt is None:
        return None
    rows, code_words, scale_words = _tiles(layout, fmt)
    tiles = np.array(rows, dtype=np.int64)
    tiles[:, 4] += code_words
    return Packing(fmt, tiles, code_words, scale_words if fmt.has_scales else 0)


def _format_of(codec: str, dtypes: tuple[str, ...]) -> Format | None:
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}; there are {', '.join(CODECS)}")
    return next((f for f in FORMATS if f.codec == codec and (f.dtype,) == dtypes), None)


def _units_of(segment_nbytes: int, fmt: Format) -> int:
    unit_bytes = fmt.lanes * LANE_BYTES
    if segment_nbytes % unit_bytes:
        raise ConfigError(
            f"codec {fmt.codec!r} packs {fmt.dtype} in units of {unit_bytes} bytes, not segments of "
            f"{segment_nbytes}: set codec to 'raw'"
        )
    return segment_nbytes // unit_bytes


def _scale_words(units: int) -> int:
    # Whole words a tile, and a tile is a whole number of words' groups but for a segment's last.
    return -(-units // (GROUP_UNITS * _GROUPS_A_WORD))


def _tiles(layout: KVLayout, fmt: Format) -> tuple[list[tuple[int, int, int, int, int]], int, int]:
    rows = []
    base = min(segment.address for segment in layout.segments)
    unit = scale_word = 0
    for segment in layout.segments:
        units = _units_of(segment.nbytes, fmt)
        lane, stride = (segment.address - base) // LANE_BYTES, segment.block_stride // LANE_BYTES
        for start in range(0, units, UNITS_A_TILE):
            count = min(UNITS_A_TILE, units - start)
            rows.append((lane + start * fmt.lanes, stride, unit + start, count, scale_word))
            scale_word += _scale_words(count)
        unit += units
    return rows, unit, scale_word
