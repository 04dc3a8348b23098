"""The codecs, and the format of packed payloads.

A *unit* is 8 bytes of packed codes: 8 elements in `fp8`, 4 elements in `bf16`. It is made from 16 or 32 bytes of the
cache. A *group* is 16 consecutive units of one segment: 128 elements in `fp8`, which is one token of one head if heads
have 128 dimensions.

A packed payload is the codes of all segments in order, followed in `fp8` by one scale byte per group. The scale is a
power of two, as the shared exponents of the OCP Microscaling formats (MX v1.0): it brings the largest magnitude of the
group into (224, 448], the upper end of the range of E4M3.

With scales that are powers of two, only the codes are rounded. So unpacking is exact, and packing an unpacked block
again loses nothing more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import ConfigError
from kvortex.layout import KVLayout
from kvortex.types import BlockSizes, form_of

RAW: Final = "raw"
GROUP_UNITS: Final = 16
UNITS_A_TILE: Final = 256
LANE_BYTES: Final = 16
_GROUPS_A_WORD: Final = 8
LOST_STEPS: Final = 1024
THERE_STEPS: Final = 16
"""The sums of squares of a unit are rounded down to whole steps of 1/LOST_STEPS (squared rounding errors) and
1/THERE_STEPS (squared elements). Integers give the same sum in any order. Divided by its scale, an element is at most
448 and its rounding error at most 16, so a unit's sums fit 32 bits and a block's sums fit 64 bits."""
NOT_FINITE: Final = 1 << 50
"""Added to a block's sum of squared errors for each tile with an element that is too large. It is more than any sum."""


class Codec(IntEnum):
    """How a payload encodes a block. Frames contain these numbers, so a number is never reused."""

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
    """How the blocks of one layout are packed.

    A *tile* is the work of one warp: at most 256 units of one segment, starting at the first unit of a group. A row of
    `tiles` has these columns:

    0. first 16-byte lane of the tile in the arena
    1. block stride in lanes
    2. first unit, which is also the position of its word in the packed payload
    3. number of units, at most 256
    4. first word of the tile's scales in the packed payload; the scales fill whole words, padded with zero bytes
    """

    format: Format
    tiles: NDArray[np.int64]  # [num_tiles, 5]
    code_words: int  # 8-byte words of codes in a packed payload
    scale_words: int  # 8-byte words of scales behind them

    @property
    def codec(self) -> str:
        return self.format.codec

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of a packed block's payload."""
        return 8 * (self.code_words + self.scale_words)


class Pages(NamedTuple):
    """The blocks of one group of layers: where their bytes are in the paged cache, and how they are packed."""

    layout: KVLayout
    packing: Packing | None = None
    """None if its blocks are never packed."""

    @property
    def sizes(self) -> BlockSizes:
        """Bytes of an extent for a raw and for a packed block."""
        return block_sizes(self.layout, self.packing)


class Encodings:
    """How blocks are encoded in the pool: bytes of a payload, and the codec, by form.

    Args:
        payloads: bytes of the payload of each form, two forms a group.
        codecs: the codec of each form.
    """

    def __init__(self, payloads: Iterable[int], codecs: Iterable[Codec]) -> None:
        self.payloads = tuple(payloads)
        self.codecs = tuple(codecs)
        self.packs = tuple(codec is not Codec.RAW for codec in self.codecs[1::2])
        """For each group whether its blocks can be packed."""

    @cached_property
    def pack_any(self) -> bool:
        """True if blocks of at least one group can be packed."""
        return any(self.packs)

    def usual_form(self, group: int) -> int:
        """The form in which blocks of a group are stored: packed if they can be."""
        return form_of(group, self.packs[group])

    def is_kept_as_is(self, form: int) -> bool:
        """True for blocks that are stored raw although their group's are packed."""
        return self.packs[form // 2] and form % 2 == 0

    def raw_nbytes(self, form: int) -> int:
        """Bytes of a raw payload of the same group."""
        return self.payloads[form // 2 * 2]


class PageEncodings(Encodings):
    """How the blocks of a paged cache are encoded, with the bytes of their extents, by form.

    Args:
        pages: the groups of the cache, in the order of their numbers.
    """

    def __init__(self, pages: Sequence[Pages]) -> None:
        forms = [(p.layout, packing) for p in pages for packing in (None, p.packing)]
        super().__init__(
            (packing.block_nbytes if packing else layout.block_nbytes for layout, packing in forms),
            (Codec[packing.codec.upper()] if packing else Codec.RAW for _, packing in forms),
        )
        self.extents = tuple(nbytes for p in pages for nbytes in (p.sizes.raw, p.sizes.packed))
        self._moved_as = _moved_as(pages)

    def moved_as(self, forms: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
        """For blocks of these forms the forms in whose batches they move, `uint8 [n]`; None if `forms` is.

        Groups of layers that lie in the same memory, as those of windows do, move together: the addresses of a block,
        its bytes and how they are packed are the same. A load of such a model is one batch then, and not one a group.
        """
        return None if forms is None else self._moved_as[forms]


def _moved_as(pages: Sequence[Pages]) -> NDArray[np.uint8]:
    """For each form the first form with the same addresses and packing, `uint8 [forms]`."""
    places = [[(s.address, s.block_stride, s.nbytes) for s in p.layout.segments] for p in pages]
    kinds = [
        (segments, packing and packing.format)
        for segments, p in zip(places, pages, strict=True)
        for packing in (None, p.packing)
    ]
    return np.array([kinds.index(kind) for kind in kinds], dtype=np.uint8)


def block_sizes(layout: KVLayout, packing: Packing | None) -> BlockSizes:
    """Return the bytes of an extent for a raw and for a packed block. `packing` is None if blocks are never packed."""
    raw = align_up(layout.block_nbytes, EXTENT_ALIGNMENT_BYTES)
    return BlockSizes(raw, align_up(packing.block_nbytes, EXTENT_ALIGNMENT_BYTES) if packing else raw)


def packed_nbytes(segment_nbytes: Iterable[int], codec: str, dtype: str) -> int | None:
    """Return the bytes of a packed payload, or None if `codec` does not pack elements of `dtype`.

    Args:
        segment_nbytes: bytes of each segment of a block.
        codec: name of the codec.
        dtype: name of the cache's dtype, such as "bfloat16".

    Raises:
        ConfigError: the codec does not exist, or a segment is not a whole number of units.
    """
    fmt = _format_of(codec, (dtype,))
    if fmt is None:
        return None
    counts = [_units_of(nbytes, fmt) for nbytes in segment_nbytes]
    return 8 * (sum(counts) + sum(map(_scale_words, counts)) * fmt.has_scales)


def packing_for(layout: KVLayout, codec: str) -> Packing | None:
    """Return how `codec` packs the blocks of `layout`, or None if it does not pack them.

    Blocks are not packed by `raw`, nor if the codec does not support the cache's dtype, as for FP8 caches.

    Raises:
        ConfigError: the codec does not exist, or a segment is not a whole number of units.
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
    # A word holds the scales of 8 groups, and a full tile has 16 groups. So only the last tile of a segment can need
    # padding, and a segment has as many scale words as its tiles together.
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
