"""What travels between the scheduler half and the worker half: jobs one way, outcomes the other. Plain data."""

from dataclasses import dataclass, field
from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from kvortex.hashing import Namespace
from kvortex.types import BlockSizes, TransferPlan

NO_WRITE: Final = -1
"""The `write_id` of a save whose blocks are not written to the lower tier."""


@dataclass(frozen=True)
class SaveJob:
    """Blocks, of one request or more, to save once this step's forward has written them.

    With `keys`, 32 bytes a block, those that are saved are then written to the lower tier as the job `write_id`.
    """

    job_id: int
    transfer: TransferPlan
    keys: bytes = b""
    write_id: int = NO_WRITE


@dataclass(frozen=True)
class LoadJob:
    """Blocks to load for a request that waits for them.

    `missing_block_ids` were promised by the look-up and lost before the load was planned: they are reported as
    failed together with those whose transfer fails.
    """

    job_id: int
    request_id: str
    transfer: TransferPlan
    missing_block_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class FetchJob:
    """Blocks to bring from the lower tier into the pool; `keys` are 32 bytes a block, block ids mean nothing."""

    job_id: int
    transfer: TransferPlan
    keys: bytes


@dataclass
class ConnectorPlan(KVConnectorMetadata):  # type: ignore[misc]
    """One step's jobs. Steps have numbers, from 0.

    `fresh_block_ids` were allocated for this step: the forward or a load will write them, so a save that still
    reads one of them for its last owner must have read it before. `used_keys`, 32 bytes a block, are of chains that
    requests have used, each from its head: in the lower tier they count as used now.
    """

    saves: list[SaveJob] = field(default_factory=list)
    loads: list[LoadJob] = field(default_factory=list)
    fresh_block_ids: set[int] = field(default_factory=set)
    fetches: list[FetchJob] = field(default_factory=list)
    used_keys: bytes = b""
    looks_at_weights: bool = False  # vLLM's own cache was emptied: perhaps because the weights have changed
    number: int = -1


@dataclass(frozen=True)
class JobOutcome:
    """What one worker says of one job: positions of the transfer that failed, whose bytes were wrong, and of a save
    those that failed because packing would have lost too much."""

    job_id: int
    failed: tuple[int, ...] = ()
    corrupt: tuple[int, ...] = ()
    too_lossy: tuple[int, ...] = ()


@dataclass(frozen=True)
class WeightsChanged:
    """What one worker says when its model has got other weights: whatever was computed, or moved, for plans up to
    `last_plan` is of the old ones."""

    last_plan: int


@dataclass(frozen=True)
class PoolShrunk:
    """What one worker says when no more of its pool can be pinned: how much of what is planned lies in what is."""

    pool_bytes: int


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker found when it registered its caches; `namespace` of its blocks in the lower tier, if it has one.

    `sizes` are those that hold the blocks of all pipeline stages, `pool_bytes` how much of what is planned with them
    its pool holds.
    """

    layout_digest: bytes
    sizes: BlockSizes
    num_blocks: int
    pool_bytes: int
    namespace: Namespace | None = None
