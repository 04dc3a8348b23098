"""The protocol between the owner of a shared pool and its clients: frames of arrays over a Unix socket.

A frame is a header of 16 bytes, a table with the length of each field, and the fields. All numbers are little-endian:

    uint32 body bytes | uint16 kind | uint16 number of fields | uint64 tag
    uint32 bytes of a field, for each field; zeros up to a multiple of 8 bytes
    the fields, each followed by zeros up to a multiple of 8 bytes

A field is an array of the dtype that `FIELDS` names for its kind, or text in UTF-8. A request with an answer has a tag
that is not 0, and the answer has the same; a request with tag 0 has no answer. The first frame of a connection is a
HELLO of the client; it begins with the version in every version of this protocol.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum, unique
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.errors import OwnerError

VERSION: Final = 2
MAX_BODY_BYTES: Final = 64 << 20

HEADER: Final = struct.Struct("<IHHQ")
_ALIGNMENT: Final = 8
_MAX_FIELDS: Final = 16

Field: TypeAlias = NDArray[Any] | bytes
Arrays: TypeAlias = list[NDArray[Any]]


@unique
class Kind(IntEnum):
    """Kinds of frames. The numbers stay the same for ever."""

    HELLO = 1  # version, random number of the client, which it keeps in later connections
    WELCOME = 2  # version, bytes of the pool, bytes of a piece; label of the memory, whose descriptor comes with it
    REFUSED = 3  # why, as text: an answer to any request
    DONE = 4  # an answer without contents

    ADD_CACHE = 10  # namespace; sizes and codecs (`describe_forms`); the groups, as JSON
    CACHE_ADDED = 11  # name of the lower tier, empty if there is none
    SCRATCH = 12  # bytes
    SCRATCH_GIVEN = 13  # offset
    SCRATCH_DONE = 14
    WRITER = 16  # a name: this process writes for the connection that names it in WRITERS
    WRITERS = 17  # the name of a WRITER: what this connection reserves may be written to until that process has ended
    SHRINK = 18  # bytes: use no more of the pool; only the owner of one engine does it
    RANK = 19  # of this client's cache: whether a priority is given, it, whether a quota is given, it in bytes
    SETTLED = 15  # no transfer of an earlier connection of this client writes any more

    PLAN_SAVE = 20  # whether raw; keys; groups; keys that must not be evicted
    SAVE_PLANNED = 21  # states of the n keys; slots, offsets, forms, positions of the m blocks that move; REMOVED
    FINISH_SAVE = 22  # slots; digests; which succeeded, lose too much, were tried (or empty)
    PLAN_LOAD = 23  # keys
    LOAD_PLANNED = 24  # slots and reasons of the n keys; offsets, bytes, digests, forms of the k hits
    FINISH_LOAD = 25  # slots; which are corrupt (or empty)
    HOLD = 26  # keys; answered as PLAN_LOAD

    CONTAINS = 30  # keys
    FOUND = 31  # for each key 1 or 0
    PREFIX = 32  # keys
    LENGTH = 33  # blocks; why the one behind them is a miss, or -1
    STATES = 41  # keys
    STATES_FOUND = 42  # see `CacheIndex.states`
    MISS_REASON = 34  # one key
    REASON = 35
    TOUCH = 36  # keys
    INVALIDATE = 37  # keys
    CLEAR = 38
    WATCH = 70  # from now on tell this client what has left the pool
    EVENTS = 71
    EVENTS_FOUND = 72  # REMOVED; whether events were dropped; keys that the lower tier has stored; those it has lost
    PLACES = 73  # keys
    PLACES_FOUND = 74  # offsets of the blocks, -1 for those that are not in the pool; REMOVED
    # REMOVED are the offsets of blocks that have left the pool since the client, which watches, was last told.
    FIGURES = 39
    POOL_FIGURES = 40  # see `PoolNumbers`

    TIER_KNOWN = 50  # keys
    TIER_FOUND = (
        60  # which of them the tier is known to have; whether its store answers for more; whether it has no more
    )
    FETCH = 51  # whether only the leading blocks that the tier is known to have; keys; groups
    FETCHING = 52  # number of the call, 0 if it is over; for each block IN_TIER and AWAITED
    END_FETCH = 53  # number of the call, whether to cancel it; answered by FETCHING
    TIER_CALL = 54  # a `TierCall`; keys
    CALLED = 55  # number of the call
    CALLS = 56  # all calls that are not over, or were not when they were last asked for
    CALLS_FOUND = 57  # number, leading blocks that are settled, and `TicketState` of each
    TIER_FIGURES = 58
    TIER_FIGURES_FOUND = 59  # `TieringFigures`, as JSON


class TierCall(IntEnum):
    """Calls of a lower tier that take long. Each ends well or not, see `Tiering`."""

    READY = 1
    FLUSH = 2
    INVALIDATE = 3
    CLEAR = 4
    ASK = 5


class PoolNumbers(NamedTuple):
    """The fields of a POOL_FIGURES frame, in this order; of the whole pool, unless it says otherwise."""

    capacity_bytes: int
    allocated_bytes: int
    largest_free_bytes: int
    fragmentation_ppb: int
    num_extents: int
    evicted_blocks: int
    changes: int
    """Another number whenever a block of the asking cache may have gone."""
    priority: int
    """That of the asking cache."""
    quota_bytes: int
    """What its blocks may take; 0 without a quota."""
    quota_used_bytes: int
    """What they take; 0 without a quota."""


_FLAGS, _NUMBERS, _KEYS, _TEXT = np.uint8, np.int64, np.uint64, None

FIELDS: Final[dict[Kind, tuple[Any, ...]]] = {
    Kind.HELLO: (_NUMBERS,),
    Kind.WELCOME: (_NUMBERS, _TEXT),
    Kind.REFUSED: (_TEXT,),
    Kind.DONE: (),
    Kind.ADD_CACHE: (_KEYS, _NUMBERS, _TEXT),
    Kind.CACHE_ADDED: (_TEXT,),
    Kind.SCRATCH: (_NUMBERS,),
    Kind.SCRATCH_GIVEN: (_NUMBERS,),
    Kind.SCRATCH_DONE: (),
    Kind.WRITER: (_TEXT,),
    Kind.WRITERS: (_TEXT,),
    Kind.SHRINK: (_NUMBERS,),
    Kind.RANK: (_NUMBERS,),
    Kind.SETTLED: (),
    Kind.PLAN_SAVE: (_NUMBERS, _KEYS, _FLAGS, _KEYS),
    Kind.SAVE_PLANNED: (_FLAGS, _NUMBERS, _NUMBERS, _FLAGS, _NUMBERS, _NUMBERS),
    Kind.FINISH_SAVE: (_NUMBERS, _KEYS, _FLAGS, _FLAGS, _FLAGS),
    Kind.PLAN_LOAD: (_KEYS,),
    Kind.LOAD_PLANNED: (_NUMBERS, _FLAGS, _NUMBERS, _NUMBERS, _KEYS, _FLAGS),
    Kind.FINISH_LOAD: (_NUMBERS, _FLAGS),
    Kind.HOLD: (_KEYS,),
    Kind.CONTAINS: (_KEYS,),
    Kind.FOUND: (_FLAGS,),
    Kind.PREFIX: (_KEYS,),
    Kind.LENGTH: (_NUMBERS,),
    Kind.STATES: (_KEYS,),
    Kind.STATES_FOUND: (_FLAGS,),
    Kind.MISS_REASON: (_KEYS,),
    Kind.REASON: (_NUMBERS,),
    Kind.TOUCH: (_KEYS,),
    Kind.INVALIDATE: (_KEYS,),
    Kind.CLEAR: (),
    Kind.WATCH: (),
    Kind.EVENTS: (),
    Kind.EVENTS_FOUND: (_NUMBERS, _NUMBERS, _KEYS, _KEYS),
    Kind.PLACES: (_KEYS,),
    Kind.PLACES_FOUND: (_NUMBERS, _NUMBERS),
    Kind.FIGURES: (),
    Kind.POOL_FIGURES: (_NUMBERS,),
    Kind.TIER_KNOWN: (_KEYS,),
    Kind.TIER_FOUND: (_FLAGS, _NUMBERS),
    Kind.FETCH: (_NUMBERS, _KEYS, _FLAGS),
    Kind.FETCHING: (_NUMBERS, _FLAGS),
    Kind.END_FETCH: (_NUMBERS,),
    Kind.TIER_CALL: (_NUMBERS, _KEYS),
    Kind.CALLED: (_NUMBERS,),
    Kind.CALLS: (),
    Kind.CALLS_FOUND: (_NUMBERS,),
    Kind.TIER_FIGURES: (),
    Kind.TIER_FIGURES_FOUND: (_TEXT,),
}
"""dtype of each field, None for text."""


def pack(kind: Kind, tag: int, *fields: Field) -> list[Any]:
    """The parts of a frame, to be sent one after another.

    Args:
        kind: what it is.
        tag: 0, or the number that an answer repeats.
        fields: arrays of the dtypes in `FIELDS`, contiguous, or UTF-8.
    """
    views = [memoryview(field).cast("B") if len(field) else memoryview(b"") for field in fields]  # type: ignore[arg-type]
    table = struct.pack(f"<{len(views)}I", *map(len, views))
    parts: list[Any] = [table, _padding(len(table))]
    for view in views:
        parts += [view, _padding(len(view))]
    body = sum(map(len, parts))
    if body > MAX_BODY_BYTES:
        raise OwnerError(f"a frame of {body} bytes is too large: name fewer blocks in one call")
    return [HEADER.pack(body, kind, len(views), tag), *(part for part in parts if len(part))]


def unpack_header(header: bytes | bytearray) -> tuple[Kind, int, int, int]:
    """Kind, number of fields, tag and body bytes of a frame.

    Raises:
        OwnerError: the frame is too large, or of no known kind.
    """
    body, kind, count, tag = HEADER.unpack(header)
    if body > MAX_BODY_BYTES or count > _MAX_FIELDS or 4 * count > body:
        raise OwnerError(f"a frame of {body} bytes with {count} fields is not one of this protocol")
    try:
        return Kind(kind), count, tag, body
    except ValueError:
        raise OwnerError(f"frames of kind {kind} are not known here: are both sides of one version?") from None


def unpack(kind: Kind, count: int, body: bytes | bytearray | memoryview) -> Arrays:
    """The fields of a frame, as arrays without a copy; text as `uint8`. More fields than are known are left out.

    Raises:
        OwnerError: fields are missing, or of the wrong length.
    """
    dtypes = FIELDS[kind]
    if count < len(dtypes):
        raise OwnerError(f"a frame {kind.name} has {count} fields instead of {len(dtypes)}")
    if 4 * count > len(body):
        raise OwnerError(f"a frame {kind.name} of {len(body)} bytes ends in its table")
    lengths = struct.unpack_from(f"<{count}I", body)
    start, fields = align_up(4 * count, _ALIGNMENT), []
    for dtype, nbytes in zip(dtypes, lengths, strict=False):
        kind_of = np.dtype(np.uint8 if dtype is None else dtype)
        if start + nbytes > len(body) or nbytes % kind_of.itemsize:
            raise OwnerError(f"a frame {kind.name} has a field of {nbytes} bytes, which cannot be")
        fields.append(np.frombuffer(body, kind_of, nbytes // kind_of.itemsize, start))
        start = align_up(start + nbytes, _ALIGNMENT)
    return fields


def text_of(field: NDArray[np.uint8]) -> str:
    """The text of a field."""
    return field.tobytes().decode("utf-8", "replace")


def keys_of(field: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Keys, `uint64 [n, 4]`, from a field.

    Raises:
        OwnerError: the field is not a whole number of keys.
    """
    if field.size % 4:
        raise OwnerError(f"{field.size} words are no whole number of keys")
    return field.reshape(-1, 4)


def flags_of(field: NDArray[np.uint8], count: int) -> NDArray[np.bool_] | None:
    """Flags `bool [count]`; None if the field is empty.

    Raises:
        OwnerError: the field has another length.
    """
    return None if not field.size else expected(field, count).astype(np.bool_)


def expected(field: NDArray[Any], count: int) -> NDArray[Any]:
    """The field itself; `OwnerError` if it has not `count` entries."""
    if field.size != count:
        raise OwnerError(f"a field has {field.size} entries instead of {count}")
    return field


def as_flags(mask: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """A mask as a field; empty for None."""
    return np.empty(0, np.uint8) if mask is None else np.ascontiguousarray(mask).view(np.uint8)


def numbers(*values: int) -> NDArray[np.int64]:
    """Integers as a field."""
    return np.array(values, dtype=np.int64)


def join(parts: Sequence[Any]) -> bytes:
    """A whole frame as one string of bytes."""
    return b"".join(parts)


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % _ALIGNMENT)
