"""What a tier is: the contract that memory, disk and remote stores share.

A tier keeps encoded blocks by 32-byte key (`kvortex.tiering.keys`). It is a cache: it may lose any block at any time,
and must never hand out another one's bytes. One object serves one namespace and one event loop; a store that several
namespaces share keeps them apart, by directories or by `kvortex.hashing.cache_key`.

**Values and errors.** What a caller can live with is a value: a block that is not there, damaged, late or on a
failing device is a `ReadOutcome` with a `MissReason`; a block that could not be kept is a `WriteOutcome`. `cause`
says more, for metrics and logs. What raises is misuse: a key of the wrong length (`InvalidHashError`), a read-only
buffer or an empty payload (`ValueError`), a call before `open` or after `aclose` (`EngineStateError`). A call that
raises so has started nothing and settles nothing.

**Batches.** Every call takes many blocks and answers in the order of the call. A key may appear more than once.
Blocks of one call move side by side, in no order.

**Deadlines.** `deadline_s` is seconds from the call, `None` for as long as it takes. A call returns when everything is
done or the deadline has passed, whichever is first; what is not done then is `MissReason.DEADLINE` or a failed write
with `Cause.DEADLINE`. What had not been started is dropped; what had been started goes on.

**Who owns a buffer.** From the call on the buffers of a read and the payloads of a write belong to the tier, until it
settles them: it calls the request's `on_settled` exactly once, with the block's final outcome, when no thread, DMA or
socket of the tier can touch the memory any more. That is

- before the call returns, for every outcome with `settled=True`: the normal case;
- later, for an outcome with `settled=False`: the deadline passed while the block was moving. The final outcome may
  then be a hit, and the bytes good: a late block is there for the next request;
- before or after `CancelledError` reaches the caller, if the call is cancelled: there are no outcomes then, and
  `on_settled` is all there is to go by;
- never, if an I/O never ends or the loop is closed before it does. The memory is lost then: a leak is better than
  another block's bytes under a reader.

So an extent is freed, reused or made visible in `on_settled` and nowhere else. It runs on the loop's thread, must be
quick and must not raise. Until then the contents of a read's buffer are undefined, and after a miss as well.

**Cancelling** a call is always safe: blocks that had not been started are dropped, those that had been started end by
themselves and settle. Nothing half-written becomes visible.

**Two ways to ask.** `lookup` is for the control plane: synchronous, from memory, no I/O, from any thread; it may say
"not known" of a block that is there (another process wrote it, the start-up scan has not come to it), and "there" of a
block that is gone. `contains` asks the store itself. Neither promises that a read will succeed.

`kvortex.testing.tier_conformance` holds all of this as tests; a new tier subclasses it.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Codec
from kvortex.errors import InvalidHashError
from kvortex.types import BLOCK_HASH_BYTES, MissReason, SaveOutcome

Buffer: TypeAlias = bytearray | memoryview | NDArray[np.uint8]
"""Contiguous writable memory of bytes; in production an extent of the pinned pool."""


class Cause(StrEnum):
    """What lies behind a miss or a refused write; one counter each."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    UNKNOWN_VERSION = "unknown_version"  # a frame of a later version: left alone
    BUFFER_TOO_SMALL = "buffer_too_small"
    NO_SPACE = "no_space"  # the device is full, or the block does not fit the tier's capacity
    IO_ERROR = "io_error"
    OPEN_FILES = "open_files"  # the process or the system has no file descriptor left
    PERMISSION = "permission"
    READ_ONLY = "read_only"
    DEADLINE = "deadline"
    CLOSED = "closed"  # the tier was closed while the block waited
    CANCELLED = "cancelled"  # the caller went away while the block waited; seen by `on_settled` only


@dataclass(frozen=True, slots=True)
class ReadOutcome:
    """What became of one block of a read. A hit has `reason` None, and then the frame's figures.

    Attributes:
        reason: why it is a miss, or None.
        payload_bytes: bytes of payload at the start of the buffer. What follows in the buffer is undefined.
        raw_bytes: size of the block once it is decoded.
        codec: number of the codec, `Codec` or a later one.
        digest: 64-bit digest of the payload as stated by its writer (`kvortex.kernels.digest`; a payload that is no
            multiple of 8 bytes counts as padded with zeros). Checked by the tier unless it was told not to.
        cause: what lies behind a miss.
        detail: the system's words, for logs.
        settled: False when the buffer still belongs to the tier.
    """

    reason: MissReason | None
    payload_bytes: int = 0
    raw_bytes: int = 0
    codec: int = 0
    digest: int = 0
    cause: Cause | None = None
    detail: str = ""
    settled: bool = True


@dataclass(frozen=True, slots=True)
class WriteOutcome:
    """What became of one block of a write: STORED, ALREADY_STORED, PENDING, NO_SPACE or FAILED, and why."""

    outcome: SaveOutcome
    cause: Cause | None = None
    detail: str = ""
    settled: bool = True


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Bring the block `key` to the start of `buffer`, which has room for at least its payload.

    `used_s` is when the block counts as used, in seconds since the epoch; None for the moment at which it is read.
    """

    key: bytes
    buffer: Buffer
    on_settled: Callable[[ReadOutcome], None] | None = None
    used_s: float | None = None

    def settle(self, outcome: ReadOutcome) -> None:
        """For tiers: the buffer is the caller's again."""
        if self.on_settled is not None:
            self.on_settled(outcome)


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """Keep `payload` as the block `key`. `digest` is the payload's, computed where the bytes passed; the tier stores
    it as it is, and a wrong one makes every later read a miss.

    `used_s` is when the block counts as used, in seconds since the epoch; None for the moment at which it is written.
    Where there is no room it does not drive out what has been used since: that is NO_SPACE.
    """

    key: bytes
    payload: bytes | Buffer
    digest: int
    raw_bytes: int
    codec: int = Codec.RAW
    on_settled: Callable[[WriteOutcome], None] | None = None
    used_s: float | None = None

    def settle(self, outcome: WriteOutcome) -> None:
        """For tiers: the payload is the caller's again."""
        if self.on_settled is not None:
            self.on_settled(outcome)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block as `Tier.scan` finds it: bytes it takes in the tier, overhead included; seconds since the epoch of its
    last known use."""

    key: bytes
    stored_bytes: int
    last_use_s: float


@dataclass(frozen=True, slots=True)
class ScanProgress:
    """How far the start-up scan is: parts of the store (directories, pages), and blocks found so far."""

    parts_done: int
    parts_total: int
    blocks: int
    complete: bool


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of one tier since it was made, and gauges of this moment.

    `causes` counts what lay behind every miss and refused write, late ones under both their deadline and their end.
    """

    name: str
    hits: int
    misses: Mapping[MissReason, int]
    writes: Mapping[SaveOutcome, int]
    causes: Mapping[Cause, int]
    read_bytes: int
    written_bytes: int
    evicted_blocks: int
    removed_corrupt: int
    num_blocks: int
    used_bytes: int
    capacity_bytes: int
    unsettled: int
    """Blocks whose buffer belongs to the tier now."""
    scan: ScanProgress


class Tier(ABC):
    """A store of encoded blocks; see the module for what all methods promise.

    Used as `async with tier:`, or by `open` and `aclose`.
    """

    name: str
    """Short and stable, for metrics: `"disk"`."""

    outlives_process: bool = True
    """Whether blocks may come from, or go to, other processes: then the namespace has to name the model."""

    # -- life ------------------------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> None:
        """Make the tier ready to serve; idempotent. What takes long (a scan) goes on in the background.

        Raises:
            ConfigError: the store cannot be used as configured; nothing is left open.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Stop; idempotent. Blocks that wait are missed with `Cause.CLOSED`; what moves is waited for, but not for
        ever: an I/O that hangs keeps its thread and its buffer and settles when it ends. A closed tier is not
        opened again.
        """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def scanned(self) -> None:
        """Wait until `lookup` knows what was in the store when it was opened; at once where nothing is scanned."""
        return

    # -- asking ----------------------------------------------------------------------------------------

    @abstractmethod
    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """For each key the bytes of buffer that are enough to read it, 0 where the block is not known to be there.

        From memory, well below 50 us a key; from any thread. It does not count as a use.
        """

    @abstractmethod
    async def contains(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        """For each key whether the store itself has it. False also where that could not be found out in time."""

    @abstractmethod
    def scan(self) -> AsyncIterator[StoredBlock]:
        """All blocks of the namespace, from the store, in no order. A block that comes or goes meanwhile may be seen or
        not, none is seen twice. Parts that cannot be read are left out."""

    # -- moving ----------------------------------------------------------------------------------------

    @abstractmethod
    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        """Bring blocks straight into the given buffers. A damaged block is a miss, counted, and removed."""

    @abstractmethod
    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        """Keep blocks, making room by dropping the least recently used. Visible when whole, not before."""

    @abstractmethod
    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        """Remove blocks; True for each that was there and is gone. A read under way may still finish as a hit."""

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        """Count blocks as used at these times, in seconds since the epoch; what is not there is left out.

        For blocks that are served from above this tier: they are in use although nobody reads them here. A tier without
        an order of use need not do anything.
        """
        return

    # -- figures ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes that the tier may take, overhead included."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes that it takes, as far as known; blocks being written count."""

    @abstractmethod
    def stats(self) -> TierStats:
        """Counters and gauges at this moment; from any thread."""


def as_bytes(buffer: bytes | Buffer) -> NDArray[np.uint8]:
    """The same memory as a flat array of bytes.

    Raises:
        ValueError: it is not contiguous, or has no bytes.
    """
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    if not view.c_contiguous or view.nbytes == 0:
        raise ValueError(f"a payload is contiguous memory of at least one byte, not {view.shape} of {view.format!r}")
    return np.frombuffer(view, dtype=np.uint8)


def check_reads(requests: Sequence[ReadRequest]) -> None:
    """Raise what the contract says of misuse: `InvalidHashError` or `ValueError`."""
    check_keys([request.key for request in requests])
    if not all(as_bytes(request.buffer).flags.writeable for request in requests):
        raise ValueError("a read needs writable memory")


def check_writes(requests: Sequence[WriteRequest]) -> list[int]:
    """The payloads' lengths. Raises what the contract says of misuse: `InvalidHashError` or `ValueError`."""
    check_keys([request.key for request in requests])
    for request in requests:
        if not (0 <= request.digest < 1 << 64 and 0 <= request.raw_bytes < 1 << 64 and 0 <= request.codec < 1 << 32):
            raise ValueError(f"digest and raw_bytes take 64 bits, codec 32: {request}")
    return [as_bytes(request.payload).size for request in requests]


def check_keys(keys: Sequence[bytes]) -> None:
    """Raise `InvalidHashError` unless all keys are 32 bytes."""
    for key in keys:
        if not isinstance(key, bytes) or len(key) != BLOCK_HASH_BYTES:
            raise InvalidHashError(f"a key is {BLOCK_HASH_BYTES} bytes, not {key!r}")
