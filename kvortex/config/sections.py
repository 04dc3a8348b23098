"""The sections of the settings: each is a small frozen dataclass that checks itself when it is made."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from kvortex.config.fields import GIB, MIB, changed_fields, conform, require, require_size
from kvortex.config.redaction import without_passwords

CODECS = ("raw", "fp8", "bf16")
EVICTION_POLICIES = ("arc", "lru", "s3fifo")
TIER_ADMISSIONS = ("always", "second_touch")
TIER_INCLUSIONS = ("inclusive", "exclusive")
TIER_SHEDS = ("newest", "oldest")
MAX_GHOST_ENTRIES = 1 << 28  # 72 bytes each
MAX_PRIORITY = 1000
UNNAMED_MODEL = "unnamed"


def require_named_model(what: str, model: str) -> None:
    """Refuse a store that other processes share if the model has no name: blocks of two models would have equal keys.

    Args:
        what: the store, for the message.
        model: name of the model, as `ModelIdentity` has it.

    Raises:
        ConfigError: the message says what to set.
    """
    require(
        model != UNNAMED_MODEL,
        f"{what} keeps blocks for other processes, which may run another model: name this one, e.g. "
        'KVortexConfig(..., identity=ModelIdentity(model="meta-llama/Llama-3.1-8B", weights_revision="0e9e39f"))',
    )


class Section:
    """Base of all sections: converts values to their types; messages name `section.field`."""

    __slots__ = ()

    section: ClassVar[str]
    plain: ClassVar[str] = ""
    """The field that a plain value sets: `pool="16GiB"` means `pool={"bytes": "16GiB"}`."""
    paths: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        conform(self, prefix=f"{self.section}.", paths=self.paths)
        self._check()

    def _check(self) -> None:
        """Raise `ConfigError` for a value that is out of range."""

    def __repr__(self) -> str:
        """One line that makes the same settings again, but for passwords, which it does not show."""
        changed = ", ".join(f"{name}={value!r}" for name, value in changed_fields(self).items())
        return without_passwords(f"{type(self).__name__}({changed})")

    def _require(self, name: str, condition: bool, rule: str) -> None:
        require(condition, f"{self.section}.{name} must {rule}, not {getattr(self, name)!r}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= 1, "be at least 1")

    def _require_not_negative(self, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= 0, "not be negative")

    def _require_choice(self, name: str, choices: Collection[str]) -> None:
        self._require(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")

    def _require_size(self, name: str, unit: str) -> None:
        value: Any = getattr(self, name)
        require_size(f"{self.section}.{name}", value, f"{value}{unit}")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PoolConfig(Section):
    """The pool in host memory. A plain size sets `bytes`.

    Args:
        bytes: pinned host memory for cached blocks, taken exactly (rounded up to whole pages).
        pin_piece_bytes: the pool is pinned in the background in pieces of this size; no extent crosses one.
        numa_aware: place the pool on the GPU's NUMA node; no effect on a machine with one node.
        lease_share: share of the pool that leases (`KVortexEngine.pin`) may keep from eviction.
    """

    section: ClassVar[str] = "pool"
    plain: ClassVar[str] = "bytes"

    bytes: int = 4 * GIB
    pin_piece_bytes: int = 256 * MIB
    numa_aware: bool = True
    lease_share: float = 0.5

    def _check(self) -> None:
        self._require_size("bytes", "GiB")
        self._require_size("pin_piece_bytes", "MiB")
        self._require("pin_piece_bytes", self.pin_piece_bytes % 4096 == 0, "be a multiple of the page size 4096")
        self._require("lease_share", 0 <= self.lease_share < 1, "lie in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EvictionConfig(Section):
    """Which blocks are evicted, and when. A plain name sets `policy`.

    Args:
        policy: "lru", "s3fifo" or "arc". The last two resist scans and remember evicted blocks: `ghost_entries` of
            them, or as many as the pool has blocks if that is more. See docs/eviction.md.
        watermark: share of the pool above which eviction begins. The space above it absorbs bursts and holds blocks
            that wait for a lower tier.
        ratio: share of the watermark that one eviction cycle frees, a little at a time. A busy pool is filled to
            between `watermark * (1 - ratio)` and `watermark`.
        ghost_entries: number of evicted or dropped blocks whose miss reason is remembered.
    """

    section: ClassVar[str] = "eviction"
    plain: ClassVar[str] = "policy"

    policy: str = "lru"
    watermark: float = 0.95
    ratio: float = 0.05
    ghost_entries: int = 65536

    def _check(self) -> None:
        self._require_choice("policy", EVICTION_POLICIES)
        self._require("watermark", 0 < self.watermark <= 1, "lie in (0, 1]")
        self._require("ratio", 0 < self.ratio < 1, "lie in (0, 1)")
        in_range = 0 <= self.ghost_entries <= MAX_GHOST_ENTRIES
        self._require("ghost_entries", in_range, f"lie in [0, {MAX_GHOST_ENTRIES}]")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TransferConfig(Section):
    """How blocks move between the paged cache and the pool.

    Args:
        streams: number of CUDA streams for copies. Both directions share a single one; otherwise saves get half of
            them, rounded down, and loads the rest. Kernels run on two further streams.
        max_batch_requests: maximum number of requests in one batch.
        max_batch_bytes: maximum bytes in one batch; also the size of a staging buffer (four on the GPU).
        linger_s: seconds that a batch that is not full waits for more requests while its direction is busy.
        max_consecutive_loads: load batches that may go before a waiting save batch if both share a resource.
        max_outstanding_requests: maximum number of saves and loads in progress; further callers wait.
        self_test: on registration, write a pattern and read it back, on the same path as transfers.
    """

    section: ClassVar[str] = "transfer"

    streams: int = 3
    max_batch_requests: int = 32
    max_batch_bytes: int = 128 * MIB
    linger_s: float = 0.0005
    max_consecutive_loads: int = 4
    max_outstanding_requests: int = 1024
    self_test: bool = True

    def _check(self) -> None:
        self._require_positive("streams", "max_batch_requests", "max_batch_bytes")
        self._require_positive("max_consecutive_loads", "max_outstanding_requests")
        self._require_not_negative("linger_s")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CodecConfig(Section):
    """How blocks are encoded in the pool and the lower tier. A plain name sets `name`.

    Args:
        name: "raw", "fp8" (half the bytes of 16-bit caches) or "bf16" (half of float32 caches); a cache that a codec
            does not support is stored raw.
        max_error: largest error of packing, as a share of a block's root mean square; above it a block is stored raw.
    """

    section: ClassVar[str] = "codec"
    plain: ClassVar[str] = "name"

    name: str = "raw"
    max_error: float = 0.05

    def _check(self) -> None:
        self._require_choice("name", CODECS)
        # An infinite bound would let infinite elements be packed.
        self._require("max_error", 0 < self.max_error < 1, "lie in (0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TierConfig(Section):
    """Which lower tiers there are, what is written to them, and how long calls wait. Plain URLs set `urls`.

    Args:
        urls: the lower tiers, the fastest first, such as "disk:///var/cache/kvortex?capacity_bytes=500GiB"; a list, or
            text with spaces between them. Empty for the tier of `disk`, or for none. Other packages may add schemes,
            see docs/own-tier.md.
        inclusion: "inclusive" writes blocks to the lower tier after they are saved; "exclusive" writes them when they
            are evicted, and deletes them from the tier when they come back.
        admission: "always", or "second_touch", which writes only blocks that are requested again and spares the device.
        queue_blocks: maximum number of blocks that wait to be written.
        shed: the block that is dropped when the queue is full, "newest" or "oldest".
        fetch_blocks: maximum number of blocks being fetched from the lower tier.
        timeout_s: seconds after which a read or write of the lower tier counts as failed.
        load_deadline_s: seconds that a load waits for the lower tier. Later blocks are misses, and in the pool for the
            next load. 0 does not wait; None, the default, waits without limit.
        canonical_layout: keep blocks in an order of bytes that does not depend on the number of tensor-parallel ranks:
            engines of different sizes find each other's blocks then. They are re-laid on both ways.
    """

    section: ClassVar[str] = "tier"
    plain: ClassVar[str] = "urls"

    urls: tuple[str, ...] = ()
    inclusion: str = "inclusive"
    admission: str = "always"
    queue_blocks: int = 4096
    shed: str = "newest"
    fetch_blocks: int = 64
    timeout_s: float = 10.0
    load_deadline_s: float | None = None
    canonical_layout: bool = False

    def _check(self) -> None:
        self._require_choice("inclusion", TIER_INCLUSIONS)
        self._require_choice("admission", TIER_ADMISSIONS)
        self._require_choice("shed", TIER_SHEDS)
        self._require_positive("queue_blocks", "fetch_blocks")
        self._require("timeout_s", self.timeout_s > 0, "be positive")
        if self.load_deadline_s is not None:
            self._require_not_negative("load_deadline_s")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class DiskTierConfig(Section):
    """The disk below the pool; an empty `path` means no disk. A plain path sets `path`.

    Args:
        path: directory of the tier; `~` is the user's home. If it does not exist it is created with mode 0700. Any
            number of processes may share it, and should then have the same capacity.
        capacity_bytes: bytes that the files of all namespaces and processes may take together.
        read_threads: reads in flight. Choose the queue depth at which the device reaches its full rate.
        write_threads: writes in flight.
        direct: whether to use O_DIRECT. None uses it if a probe at start finds that it works; True requires it; False
            never uses it. Without it the page cache holds a second copy of blocks that are in the pinned pool.
        fsync: flush a block to the device before its file gets its name. Without it a crash of the machine (not of the
            process) may lose the last blocks; they are misses then, never wrong bytes.
        verify: check the payload's digest in every read. If False, a block is checked only once, when it is loaded into
            the paged cache.
        touch_interval_s: seconds between two updates of a file's time of use, at least. After a restart the order of
            eviction is wrong by this much.
        rescan_interval_s: seconds between two scans of the directory, in which other processes write and delete too.
            None scans at start only.
        close_timeout_s: seconds that closing waits for I/O in flight.
        seal_keys: file with the secrets that seal blocks, for a directory that others can write to, see
            docs/sealing.md. Empty for plain blocks.
    """

    section: ClassVar[str] = "disk"
    plain: ClassVar[str] = "path"
    paths: ClassVar[tuple[str, ...]] = ("path", "seal_keys")

    path: str | os.PathLike[str] = ""
    capacity_bytes: int = 64 * GIB
    read_threads: int = 8
    write_threads: int = 8
    direct: bool | None = None
    fsync: bool = False
    verify: bool = True
    touch_interval_s: float = 60.0
    rescan_interval_s: float | None = 300.0
    close_timeout_s: float = 5.0
    seal_keys: str | os.PathLike[str] = ""

    def _check(self) -> None:
        self._require_positive("read_threads", "write_threads")
        self._require_size("capacity_bytes", "GiB")
        self._require_not_negative("touch_interval_s", "close_timeout_s")
        interval_s = self.rescan_interval_s
        self._require("rescan_interval_s", interval_s is None or interval_s > 0, "be positive or None")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class OwnerConfig(Section):
    """The owner of a pool that all engines of a machine share, see docs/deploy.md. A plain path sets `socket`.

    Args:
        socket: path of the owner's Unix socket; empty for a pool of this engine alone. With an owner, the size of the
            pool and its eviction are the owner's settings.
        deadline_s: seconds that a call to the owner may take, at least 10 while the engine starts. Then the engine
            goes on without the pool, and tries to connect again.
        priority: blocks of this engine's namespace are evicted before those of namespaces with a higher priority, from
            -1000 to 1000. None leaves it as another engine of the namespace has set it, at first 0.
        quota: bytes of the pool that the blocks of this engine's namespace may take, such as "20GiB"; if they need
            more, its own blocks are evicted. None leaves it as another engine of the namespace has set it, at first
            without a limit.
    """

    section: ClassVar[str] = "owner"
    plain: ClassVar[str] = "socket"
    paths: ClassVar[tuple[str, ...]] = ("socket",)

    socket: str | os.PathLike[str] = ""
    deadline_s: float = 1.0
    priority: int | None = None
    quota: int | None = None

    def _check(self) -> None:
        self._require("deadline_s", self.deadline_s > 0, "be positive")
        if self.priority is not None:
            self._require("priority", abs(self.priority) <= MAX_PRIORITY, f"lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
        if self.quota is not None:
            require(
                self.quota != 0,
                "owner.quota = 0 leaves no room for a block: leave it out for no quota, or give a size such as 20GiB",
            )
            self._require_size("quota", "GiB")
            self._require("quota", self.quota < 1 << 62, "be below 4 EiB")
        for name in ("priority", "quota"):
            require(
                bool(self.socket) or getattr(self, name) is None,
                f"owner.{name} says what an engine gets of a pool that it shares, and this pool is its own: give the "
                f"socket of an owner as owner.socket, or leave owner.{name} out",
            )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ModelIdentity(Section):
    """Identity of the model; stored bytes are reusable only if it agrees. It is part of the namespace.

    Args:
        model: name of the model; required if a lower tier keeps blocks after the process ends.
        weights_revision: revision of the weights, such as a commit.
        fingerprint: digest of everything else that changes the bytes: configuration, quantisation, position encoding.
        tp_rank, tp_size, pp_rank, pp_size: shard of the model that computes the blocks.
    """

    section: ClassVar[str] = "identity"

    model: str = UNNAMED_MODEL
    weights_revision: str = ""
    fingerprint: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def _check(self) -> None:
        for kind, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            require(0 <= rank < size, f"identity.{kind}_rank {rank} is not in [0, {kind}_size = {size})")
