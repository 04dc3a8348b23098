"""Every setting, in one small frozen tree; the only module that reads the environment or a file."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

from kvortex.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
EXTENT_ALIGNMENT_BYTES = 128  # a memory transaction of the GPU; every extent starts on one
ENV_PREFIX = "KVORTEX_"
CHOICES = {
    "tier_inclusion": ("inclusive", "exclusive"),
    "tier_admission": ("always", "second_touch"),
    "tier_shed": ("newest", "oldest"),
}
EVICTION_POLICIES = ("arc", "lru", "s3fifo")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What else must agree for stored bytes to be reusable; it becomes part of the namespace.

    Args:
        model: its name.
        weights_revision: what tells its weights from others of that name, such as a commit.
        fingerprint: of whatever else changes the bytes: configuration, quantisation, position encoding.
        tp_rank, tp_size, pp_rank, pp_size: which shard of the model computed them.
    """

    model: str = "unnamed"
    weights_revision: str = ""
    fingerprint: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        for kind, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            _require(0 <= rank < size, f"{kind}_rank {rank} is not in [0, {kind}_size = {size})")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVortexConfig:
    """Settings of an engine. Sizes in bytes, times in seconds; checked when made.

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
        disk_path: directory of the disk tier, shared by any number of processes; empty for none.
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
        identity: model, weights revision and ranks.
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
        for name in (
            "cpu_pool_bytes",
            "pin_piece_bytes",
            "num_transfer_streams",
            "max_batch_requests",
            "max_batch_bytes",
            "max_consecutive_loads",
            "max_outstanding_requests",
            "disk_capacity_bytes",
            "tier_queue_blocks",
            "fetch_blocks",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(self.ghost_entries >= 0, f"ghost_entries must not be negative, got {self.ghost_entries}")
        _require(
            self.eviction_policy in EVICTION_POLICIES,
            f"eviction_policy must be one of {', '.join(EVICTION_POLICIES)}, got {self.eviction_policy!r}",
        )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        _require(self.tier_timeout_s > 0, f"tier_timeout_s must be positive, got {self.tier_timeout_s}")
        _require(
            self.load_deadline_s is None or self.load_deadline_s >= 0,
            f"load_deadline_s must not be negative, got {self.load_deadline_s}",
        )
        _require(
            0 < self.max_pack_error < 1,  # an infinite bound would let infinite elements be packed
            f"max_pack_error must lie in (0, 1), got {self.max_pack_error}",
        )
        _require(self.linger_s >= 0, f"linger_s must not be negative, got {self.linger_s}")
        _require(0 < self.watermark <= 1, f"watermark must lie in (0, 1], got {self.watermark}")
        _require(0 < self.eviction_ratio < 1, f"eviction_ratio must lie in (0, 1), got {self.eviction_ratio}")
        _require(
            self.pin_piece_bytes % 4096 == 0,
            f"pin_piece_bytes must be a multiple of the page size 4096, got {self.pin_piece_bytes}",
        )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Settings by name, as from JSON or TOML; `identity` may be a mapping.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or out of range.
        """
        values = dict(settings)
        identity = values.pop("identity", {})
        if isinstance(identity, Mapping):
            identity = _build(ModelIdentity, identity)
        built: Self = _build(cls, {**values, "identity": identity})
        return built

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Settings from a TOML file."""
        try:
            return cls.from_mapping(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read {os.fspath(path)}: {error}") from error

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from variables such as `KVORTEX_CPU_POOL_BYTES=16GiB`; `KVORTEX_CONFIG` names a TOML file."""
        environ = os.environ if environ is None else environ
        base = cls.from_file(environ["KVORTEX_CONFIG"]) if "KVORTEX_CONFIG" in environ else cls()
        hints = get_type_hints(cls)
        changes: dict[str, Any] = {}
        for name, hint in hints.items():
            hint = float if hint == (float | None) else hint
            text = environ.get(ENV_PREFIX + name.upper())
            if text is not None and hint in (int, float, bool, str):
                changes[name] = _parse(name, text, hint)
        return dataclasses.replace(base, **changes)


def parse_bytes(text: str) -> int:
    """`"16GiB"`, `"512 MiB"`, `"4096"` -> bytes.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": GIB * KIB}
    stripped = text.strip().lower()
    digits = stripped.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = units.get(stripped[len(digits) :].strip())
    try:
        if unit is None:
            raise ValueError
        return int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is no size; write it as 16GiB, 512MiB or a number of bytes") from None


def _parse(name: str, text: str, hint: type) -> Any:
    if name.endswith("_bytes"):
        return parse_bytes(text)
    if hint is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{ENV_PREFIX}{name.upper()}={text!r}: write 1 or 0")
    try:
        return hint(text)
    except ValueError:
        raise ConfigError(f"{ENV_PREFIX}{name.upper()}={text!r} is no {hint.__name__}") from None


def _build(cls: type, settings: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    unknown = sorted(set(settings) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; {cls.__name__} knows {', '.join(sorted(hints))}")
    values = {name: _coerce(name, value, hints[name]) for name, value in settings.items()}
    return cls(**values)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    if hint is int and isinstance(value, str) and name.endswith("_bytes"):
        return parse_bytes(value)
    if hint == (float | None):
        return None if value is None else _coerce(name, value, float)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{name} must be {hint.__name__}, not {type(value).__name__} ({value!r})")
    return value
