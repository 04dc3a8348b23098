"""Every setting, in one small frozen tree; the only module that reads the environment or a file."""

import dataclasses
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kvortex.config.fields import (
    GIB,
    MIB,
    changes_of,
    conform,
    from_text,
    hints_of,
    known_names,
    nearest,
    require,
    require_size,
)
from kvortex.errors import ConfigError

logger = logging.getLogger(__name__)

EXTENT_ALIGNMENT_BYTES = 128  # a memory transaction of the GPU; every extent starts on one
MAX_GHOST_ENTRIES = 1 << 28  # 72 bytes each
ENV_PREFIX = "KVORTEX_"
ENV_FILE = "CONFIG"
ENV_IDENTITY = "IDENTITY_"
UNNAMED_MODEL = "unnamed"
EVICTION_POLICIES = ("arc", "lru", "s3fifo")
CODECS = ("raw", "fp8", "bf16")
CHOICES = {
    "tier_inclusion": ("inclusive", "exclusive"),
    "tier_admission": ("always", "second_touch"),
    "tier_shed": ("newest", "oldest"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What else must agree for stored bytes to be reusable; it becomes part of the namespace.

    Args:
        model: its name; needed as soon as a lower tier keeps blocks beyond the process.
        weights_revision: what tells its weights from others of that name, such as a commit.
        fingerprint: digest of whatever else changes the bytes: configuration, quantisation, position encoding.
        tp_rank, tp_size, pp_rank, pp_size: which shard of the model computed them.
    """

    model: str = UNNAMED_MODEL
    weights_revision: str = ""
    fingerprint: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        conform(self)
        for kind, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            require(0 <= rank < size, f"{kind}_rank {rank} is not in [0, {kind}_size = {size})")

    def __repr__(self) -> str:
        return changes_of(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVortexConfig:
    """Settings of an engine. Sizes in bytes, or as text such as "16GiB"; times in seconds; checked when made.

    Args:
        cpu_pool_bytes: pinned host memory for cached blocks, taken exactly (rounded up to whole pages).
        pin_piece_bytes: the pool is pinned in the background in pieces of this size; no extent crosses one.
        numa_aware: place the pool on the GPU's NUMA node; without effect where there is one node.
        num_transfer_streams: CUDA streams that carry copies. 1: shared by both directions; otherwise saves
            get a half, rounded down, and loads the rest. Kernels run on two further streams.
        max_batch_requests: requests that one batch may serve.
        max_batch_bytes: bytes that one batch may move; also the size of a staging buffer (four on the GPU).
        linger_s: how long a batch that is not full waits for more while its direction is busy.
        max_consecutive_loads: load batches that may go before a waiting save batch where both share a resource.
        max_outstanding_requests: saves and loads in progress; further callers wait.
        watermark: share of the pool above which eviction begins; what is above takes in bursts, and blocks that wait
            for a lower tier.
        eviction_ratio: share of the watermark that one eviction cycle frees, a little at a time. A busy pool is filled
            to between `watermark * (1 - eviction_ratio)` and `watermark`.
        eviction_policy: "lru", or "s3fifo" or "arc": these resist scans and remember what they evicted, as far
            as `ghost_entries` goes (at least as many as the pool has blocks, then). See docs/eviction.md.
        codec: how blocks rest: "raw", "fp8" (half the bytes of 16-bit caches) or "bf16" (half of float32 caches);
            caches that a codec does not take rest as they are.
        max_pack_error: a block that packing would change by more, as a share of its root mean square, rests as it is.
        disk_path: directory of the disk tier, shared by any number of processes; `~` is the user's home. Empty: none.
        disk_capacity_bytes: bytes that all its files together may take.
        disk_fsync: bring a block to the device before it counts as stored; without it a crash of the machine may lose
            the last ones.
        tier_inclusion: "inclusive" writes blocks to the lower tier behind their save, "exclusive" when they are evicted
            and takes them away from there when they come back.
        tier_admission: "always", or "second_touch" for blocks that are asked for again: spares the device.
        tier_queue_blocks: blocks that may wait to be written.
        tier_shed: what is not written when the queue is full, "newest" or "oldest".
        fetch_blocks: blocks that may be on their way from the lower tier.
        tier_timeout_s: after this a read or write of the lower tier counts as failed.
        load_deadline_s: how long a load waits for what comes from the lower tier; the rest is a miss, and there for
            the next load. 0 does not wait; None, the default, waits as long as it takes.
        ghost_entries: evicted or dropped blocks whose reason is remembered.
        self_test: write and read back a pattern on registration, through the path that transfers take.
        identity: model, weights revision and ranks; a mapping of them will do. A disk needs a model's name here.
    """

    cpu_pool_bytes: int = 4 * GIB
    pin_piece_bytes: int = 256 * MIB
    numa_aware: bool = True
    num_transfer_streams: int = 3
    max_batch_requests: int = 32
    max_batch_bytes: int = 128 * MIB
    linger_s: float = 0.0005
    max_consecutive_loads: int = 4
    max_outstanding_requests: int = 1024
    watermark: float = 0.95
    eviction_ratio: float = 0.05
    eviction_policy: str = "lru"
    codec: str = "raw"
    max_pack_error: float = 0.05
    disk_path: str = ""
    disk_capacity_bytes: int = 64 * GIB
    disk_fsync: bool = False
    tier_inclusion: str = "inclusive"
    tier_admission: str = "always"
    tier_queue_blocks: int = 4096
    tier_shed: str = "newest"
    fetch_blocks: int = 64
    tier_timeout_s: float = 10.0
    load_deadline_s: float | None = None
    ghost_entries: int = 65536
    self_test: bool = True
    identity: ModelIdentity = field(default_factory=ModelIdentity)

    def __post_init__(self) -> None:
        conform(self, paths=("disk_path",))
        for name in (
            "num_transfer_streams",
            "max_batch_requests",
            "max_batch_bytes",
            "max_consecutive_loads",
            "max_outstanding_requests",
            "tier_queue_blocks",
            "fetch_blocks",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name, example in (("cpu_pool_bytes", "GiB"), ("disk_capacity_bytes", "GiB"), ("pin_piece_bytes", "MiB")):
            require_size(name, getattr(self, name), f"{getattr(self, name)}{example}")
        require(
            self.pin_piece_bytes % 4096 == 0,
            f"pin_piece_bytes must be a multiple of the page size 4096, got {self.pin_piece_bytes}",
        )
        for name, choices in {"eviction_policy": EVICTION_POLICIES, "codec": CODECS, **CHOICES}.items():
            value = getattr(self, name)
            require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        require(
            0 <= self.ghost_entries <= MAX_GHOST_ENTRIES,
            f"ghost_entries must lie in [0, {MAX_GHOST_ENTRIES}], got {self.ghost_entries}",
        )
        require(self.tier_timeout_s > 0, f"tier_timeout_s must be positive, got {self.tier_timeout_s}")
        require(
            self.load_deadline_s is None or self.load_deadline_s >= 0,
            f"load_deadline_s must not be negative, got {self.load_deadline_s}",
        )
        require(
            0 < self.max_pack_error < 1,  # an infinite bound would let infinite elements be packed
            f"max_pack_error must lie in (0, 1), got {self.max_pack_error}",
        )
        require(self.linger_s >= 0, f"linger_s must not be negative, got {self.linger_s}")
        require(0 < self.watermark <= 1, f"watermark must lie in (0, 1], got {self.watermark}")
        require(0 < self.eviction_ratio < 1, f"eviction_ratio must lie in (0, 1), got {self.eviction_ratio}")

    def __repr__(self) -> str:
        return changes_of(self)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Settings by name, as from JSON or TOML; `identity` may be a mapping.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or out of range.
        """
        return cls(**known_names(cls, settings))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Settings from a TOML file, `identity` as a table of it.

        Raises:
            ConfigError: it cannot be read, or as `from_mapping`; the message names the file.
        """
        place = Path(os.path.expanduser(path))
        try:
            settings = tomllib.loads(place.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read {place}: {error}") from error
        try:
            return cls.from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from variables such as `KVORTEX_CPU_POOL_BYTES=16GiB` or `KVORTEX_IDENTITY_MODEL=llama`.

        `KVORTEX_CONFIG` names a TOML file whose settings the variables go before. Another variable that begins with
        `KVORTEX_` is an error where its name is nearly that of a setting, and a warning otherwise.

        Raises:
            ConfigError: as `from_file`.
        """
        given = {
            name.removeprefix(ENV_PREFIX): text
            for name, text in (os.environ if environ is None else environ).items()
            if name.startswith(ENV_PREFIX)
        }
        base = cls.from_file(given[ENV_FILE]) if ENV_FILE in given else cls()
        _look_at_rest(cls, given)
        changes, identity = _values(cls, "", given), _values(ModelIdentity, ENV_IDENTITY, given)
        if identity:
            changes["identity"] = dataclasses.replace(base.identity, **identity)
        return dataclasses.replace(base, **changes)


def _values(kind: type, prefix: str, given: Mapping[str, str]) -> dict[str, Any]:
    variables = {name: f"{prefix}{name.upper()}" for name in hints_of(kind)}
    return {
        name: from_text(name, given[variable], hints_of(kind)[name])
        for name, variable in variables.items()
        if variable in given
    }


def _look_at_rest(kind: type, given: Mapping[str, str]) -> None:
    known = {ENV_FILE, *(name.upper() for name in hints_of(kind))}
    known |= {f"{ENV_IDENTITY}{name.upper()}" for name in hints_of(ModelIdentity)}
    for name in sorted(set(given) - known):
        guess = nearest(name, known)
        if guess is not None:
            raise ConfigError(f"{ENV_PREFIX}{name} is no setting: did you mean {ENV_PREFIX}{guess}?")
        logger.warning("%s%s is no setting of KVortex and has no effect on it", ENV_PREFIX, name)
