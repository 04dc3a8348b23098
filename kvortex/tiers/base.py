"""The contract of a lower tier: memory, disk and remote stores all fulfil it.

A tier stores encoded blocks under keys of 32 bytes (`kvortex.tiering.keys`). It is a cache: it may lose any block at
any time, and must never return the bytes of another block. One object serves one namespace and one event loop. If
several namespaces share a store, it keeps them apart, by directories or by `kvortex.hashing.cache_key`.

**Values and errors.** An expected failure is a value. A block that is absent, damaged, late or on a failing device is a
`ReadOutcome` with a `MissReason`; a block that could not be stored is a `WriteOutcome`. Their `cause` says more, for
metrics and logs. Misuse raises: a key of the wrong length (`InvalidHashError`), a read-only buffer or an empty payload
(`ValueError`), a call before `open` or after `aclose` (`EngineStateError`). A call that raises one of these has started
nothing and settles nothing.

**Batches.** Every call takes many blocks and returns outcomes in the order of the call. A key may appear more than
once. The blocks of a call move concurrently, in no order.

**Deadlines.** `deadline_s` is seconds from the call; `None` means no deadline. A call returns when all blocks are done
or the deadline has passed. A block that is not done by then is a miss with `MissReason.DEADLINE`, or a failed write
with `Cause.DEADLINE`. If its I/O has not started it is dropped; otherwise the I/O goes on.

**Ownership of buffers.** From the call on, the tier owns the buffers of a read and the payloads of a write, until it
settles them. To settle a request, the tier calls its `on_settled` exactly once, with the final outcome of the block,
when no thread, DMA or socket of the tier can touch the memory any more. This happens

- before the call returns, for every outcome with `settled=True`: the normal case;
- later, for an outcome with `settled=False`: the deadline passed while the block was moving. The final outcome may
  still be a hit with good bytes: a late block is there for the next request;
- before or after `CancelledError` reaches the caller, if the call is cancelled: then the call returns no outcomes, and
  `on_settled` is the only report;
- never, if an I/O never ends, or ends after the loop was closed. Then the memory is lost: a leak is better than a
  reader who sees another block's bytes.

So an extent is freed, reused or made visible in `on_settled` and nowhere else. It runs on the loop's thread, must be
quick and must not raise. Before that the contents of a read's buffer are undefined; after a miss they stay undefined.

**Cancelling** a call is always safe: blocks whose I/O has not started are dropped, the others end by themselves and
settle. A block that is written in part never becomes visible.

**Two ways to look up.** `lookup` is for the control plane: synchronous, from memory, without I/O, from any thread. It
may miss a block that is there (another process wrote it, or the start-up scan has not reached it), and may report a
block that is gone. `find` asks the store itself. Neither guarantees that a read will succeed.

`kvortex.testing.tier_conformance` tests all of this; the tests of a new tier subclass it.
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
"""Contiguous writable memory; in production an extent of the pinned pool."""


class Cause(StrEnum):
    """The cause of a miss or of a refused write; each has a counter."""

    ABSENT = "absent"
    CORRUPT = "corrupt"
    AUTH = "auth"  # not sealed by a key that this tier has: forged, exchanged, damaged, plain, or of another key
    SEALED = "sealed"  # a sealed block, and this tier has no keys
    UNKNOWN_VERSION = "unknown_version"  # a frame of a later format version: it is left as it is
    BUFFER_TOO_SMALL = "buffer_too_small"
    NO_SPACE = "no_space"  # the device is full, or the block does not fit the tier's capacity
    IO_ERROR = "io_error"
    OPEN_FILES = "open_files"  # the process or the system has no file descriptor left
    PERMISSION = "permission"
    READ_ONLY = "read_only"
    DEADLINE = "deadline"
    CLOSED = "closed"  # the tier was closed while the block waited
    CANCELLED = "cancelled"  # the call was cancelled while the block waited; only `on_settled` gets this


@dataclass(frozen=True, slots=True)
class ReadOutcome:
    """The result of one block of a read. If it is a hit, `reason` is None and the next four fields are set.

    Attributes:
        reason: why it is a miss; None for a hit.
        payload_bytes: bytes of payload at the start of the buffer. The rest of the buffer is undefined.
        raw_bytes: size of the decoded block in bytes.
        codec: number of the codec, `Codec` or a later one.
        digest: 64-bit digest of the payload, from its writer (`kvortex.kernels.digest`; a payload whose length is no
            multiple of 8 bytes counts as padded with zeros). The tier has checked it, unless it was told not to.
        cause: the cause of a miss.
        detail: the message of the operating system, for logs.
        settled: False if the tier still owns the buffer.
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
    """The result of one block of a write.

    Attributes:
        outcome: STORED, ALREADY_STORED, PENDING, NO_SPACE or FAILED.
        cause: the cause of the last two.
        detail: the message of the operating system, for logs.
        settled: False if the tier still owns the payload.
    """

    outcome: SaveOutcome
    cause: Cause | None = None
    detail: str = ""
    settled: bool = True


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A block to read.

    Attributes:
        key: the block's key, 32 bytes.
        buffer: takes the payload at its start.
        on_settled: called once with the final outcome, see the module's docstring.
        used_s: time at which the block counts as used, in seconds since the epoch; None for the time of the read.
        form: how the block lies in the pool (`kvortex.types.Forms`); for what stands between the pool and a tier.
    """

    key: bytes
    buffer: Buffer
    on_settled: Callable[[ReadOutcome], None] | None = None
    used_s: float | None = None
    form: int = 0

    def settle(self, outcome: ReadOutcome) -> None:
        """For tiers: give the buffer back to the caller."""
        if self.on_settled is not None:
            self.on_settled(outcome)


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """A block to write.

    Attributes:
        key: the block's key, 32 bytes.
        payload: the encoded block.
        digest: 64-bit digest of the payload. The tier stores it without a check; a wrong one makes every read a miss.
        raw_bytes: size of the decoded block in bytes.
        codec: number of the codec.
        on_settled: called once with the final outcome, see the module's docstring.
        used_s: time at which the block counts as used, in seconds since the epoch; None for the time of the write. A
            block never evicts blocks that were used after this time: the outcome is NO_SPACE then.
        form: how the block lies in the pool (`kvortex.types.Forms`); for what stands between the pool and a tier.
    """

    key: bytes
    payload: bytes | Buffer
    digest: int
    raw_bytes: int
    codec: int = Codec.RAW
    on_settled: Callable[[WriteOutcome], None] | None = None
    used_s: float | None = None
    form: int = 0

    def settle(self, outcome: WriteOutcome) -> None:
        """For tiers: give the payload back to the caller."""
        if self.on_settled is not None:
            self.on_settled(outcome)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block as `Tier.scan` finds it.

    Attributes:
        key: the block's key, 32 bytes.
        stored_bytes: bytes that it takes in the tier, overhead included.
        last_use_s: time of its last known use, in seconds since the epoch.
    """

    key: bytes
    stored_bytes: int
    last_use_s: float


@dataclass(frozen=True, slots=True)
class ScanProgress:
    """Progress of the start-up scan: parts of the store (directories, pages), and blocks found so far."""

    parts_done: int
    parts_total: int
    blocks: int
    complete: bool


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of one tier since it was created, and gauges of this moment.

    `causes` counts the cause of every miss and refused write; a late block counts for its deadline and for its end.
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
    """Blocks whose buffer the tier owns now."""
    scan: ScanProgress


class Tier(ABC):
    """A store of encoded blocks. The module's docstring is the contract of all methods.

    Use it as `async with tier:`, or call `open` and `aclose`.
    """

    name: str
    """A short, stable name for metrics, such as `"disk"`."""

    outlives_process: bool = True
    """True if blocks may come from, or go to, other processes: then the namespace has to name the model."""

    finds_more: bool = False
    """True if others write to the store all the time: `find` may know blocks that `lookup` does not, even after the
    scan. Loads ask it then."""

    write_bytes: int = 0
    """Bytes of payloads that one write should bring, if so many wait to be written; 0 if that makes no difference."""

    # -- life ------------------------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> None:
        """Make the tier ready to serve; idempotent. Long work (a scan) goes on in the background.

        Raises:
            ConfigError: the store cannot be used with this configuration; nothing is left open.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the tier; idempotent. Blocks that wait are misses with `Cause.CLOSED`. It waits for I/O in progress,
        but not for ever: an I/O that hangs keeps its thread and its buffer, and settles when it ends. A closed tier
        cannot be opened again.
        """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def scanned(self) -> None:
        """Wait until `lookup` knows all blocks that were in the store when it was opened."""
        return

    # -- asking ----------------------------------------------------------------------------------------

    @abstractmethod
    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """Look blocks up in memory, well below 50 us a key; from any thread. It does not count as a use.

        Returns:
            For each key the size in bytes of a buffer that is large enough to read the block, or 0 if the block is not
            known to be there.
        """

    @abstractmethod
    async def find(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[int]:
        """The same as `lookup`, from the store itself; 0 also if it could not be found out in time."""

    @abstractmethod
    def scan(self) -> AsyncIterator[StoredBlock]:
        """All blocks of the namespace, from the store itself, in no order. A block that is written or removed during
        the scan may be seen or not; none is seen twice. Parts of the store that cannot be read are left out."""

    def coldest(self, payloads: Sequence[int]) -> list[StoredBlock]:
        """The blocks of this namespace that are evicted to make room for payloads of these bytes, the coldest first.

        None, as here, where the store evicts by itself.
        """
        return []

    # -- moving ----------------------------------------------------------------------------------------

    @abstractmethod
    async def read(self, requests: Sequence[ReadRequest], *, deadline_s: float | None = None) -> list[ReadOutcome]:
        """Read blocks straight into the given buffers. A damaged block is a miss, is counted, and is removed."""

    @abstractmethod
    async def write(self, requests: Sequence[WriteRequest], *, deadline_s: float | None = None) -> list[WriteOutcome]:
        """Store blocks, and evict the least recently used ones to make room. A block is visible once it is complete."""

    @abstractmethod
    async def delete(self, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        """Delete blocks; True for each that was there and is gone. A read in flight may still be a hit."""

    async def touch(self, keys: Sequence[bytes], used_s: Sequence[float], *, deadline_s: float | None = None) -> None:
        """Count blocks as used at these times, in seconds since the epoch; keys without a block are skipped.

        The pool calls this for blocks that it serves itself: they are in use although nothing reads them here. A tier
        that does not order blocks by use may ignore it.
        """
        return

    # -- figures ---------------------------------------------------------------------------------------

    @property
    def may_have_unknown(self) -> bool:
        """True if the store may have blocks that `lookup` does not know: loads ask it then, with `find`."""
        return self.finds_more or not self.stats().scan.complete

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes that the tier may use, overhead included."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes that it uses, as far as known; blocks that are being written count."""

    @abstractmethod
    def stats(self) -> TierStats:
        """Counters and gauges at this moment; from any thread."""


def as_bytes(buffer: bytes | Buffer) -> NDArray[np.uint8]:
    """The same memory as a flat array, `uint8 [n]`.

    Raises:
        ValueError: the memory is not contiguous, or is empty.
    """
    view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    if not view.c_contiguous or view.nbytes == 0:
        raise ValueError(f"a payload is contiguous memory of at least one byte, not {view.shape} of {view.format!r}")
    return np.frombuffer(view, dtype=np.uint8)


def check_reads(requests: Sequence[ReadRequest]) -> None:
    """Check the requests of a read.

    Raises:
        InvalidHashError: a key is not 32 bytes.
        ValueError: a buffer is read-only, empty or not contiguous.
    """
    check_keys([request.key for request in requests])
    if not all(as_bytes(request.buffer).flags.writeable for request in requests):
        raise ValueError("a read needs writable memory")


def check_writes(requests: Sequence[WriteRequest]) -> list[int]:
    """Check the requests of a write, and return the lengths of their payloads in bytes.

    Raises:
        InvalidHashError: a key is not 32 bytes.
        ValueError: a payload is empty or not contiguous, or a number is out of range.
    """
    check_keys([request.key for request in requests])
    for request in requests:
        if not (0 <= request.digest < 1 << 64 and 0 <= request.raw_bytes < 1 << 64 and 0 <= request.codec < 1 << 32):
            raise ValueError(f"digest and raw_bytes take 64 bits, codec 32: {request}")
    return [as_bytes(request.payload).size for request in requests]


def check_keys(keys: Sequence[bytes]) -> None:
    """Check keys.

    Raises:
        InvalidHashError: a key is not 32 bytes.
    """
    for key in keys:
        if not isinstance(key, bytes) or len(key) != BLOCK_HASH_BYTES:
            raise InvalidHashError(f"a key is {BLOCK_HASH_BYTES} bytes, not {key!r}")
