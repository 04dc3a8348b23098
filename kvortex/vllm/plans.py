"""Messages between the scheduler half and the worker half: jobs one way, outcomes the other. Plain data."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from kvortex.hashing import Namespace
from kvortex.layout.canonical import BlockShard
from kvortex.types import BlockSizes, TransferPlan


@dataclass(frozen=True)
class SaveJob:
    """Blocks of one request or more, to save once this step's forward has written them.

    Args:
        job_id: number of the save.
        transfer: which blocks move between which device blocks and pool offsets.
        pool: name of the owner's memory that it was planned for; empty without an owner.
    """

    job_id: int
    transfer: TransferPlan
    pool: str = ""


@dataclass(frozen=True)
class LoadJob:
    """Blocks to load for a request that waits for them.

    Args:
        job_id: number of the load.
        request_id: the waiting request.
        transfer: which blocks move between which pool offsets and device blocks.
        missing_block_ids: device blocks without a source, because the pool lost them between look-up and plan. They
            are reported as failed together with those whose transfer fails.
        digests: of the blocks, `uint64 [n]`, where the owner of the pool keeps them; None where the workers do.
        num_weights: how many changes of the weights were known when it was planned.
        pool: name of the owner's memory that it was planned for; empty without an owner.
    """

    job_id: int
    request_id: str
    transfer: TransferPlan
    missing_block_ids: tuple[int, ...] = ()
    digests: NDArray[np.uint64] | None = None
    num_weights: int = 0
    pool: str = ""


@dataclass
class ConnectorPlan(KVConnectorMetadata):  # type: ignore[misc]
    """One step's jobs.

    Args:
        early_saves: saves of blocks that the last step has completed. They start, and read what this step overwrites,
            before anything else.
        saves, loads: the other jobs.
        fresh_block_ids: device blocks that were allocated for this step. The forward or a load will overwrite them, so
            saves of earlier steps must have read them before.
        compare_weights: True if vLLM's own cache was emptied: perhaps the weights have changed, so compare them.
        number: the step's number, from 0.
        has_forward: True if the step computes tokens.
    """

    early_saves: list[SaveJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    loads: list[LoadJob] = field(default_factory=list)
    fresh_block_ids: set[int] = field(default_factory=set)
    compare_weights: bool = False
    number: int = -1
    has_forward: bool = True


@dataclass(frozen=True)
class SaveDigests:
    """Digests of what one worker has saved, for the owner of the pool.

    Args:
        part: number of the worker's part of a block.
        positions: of the blocks, in the job's transfer, `intp [n]`.
        digests: of its part of them, `uint64 [n]`.
    """

    part: int
    positions: NDArray[np.intp]
    digests: NDArray[np.uint64]


@dataclass(frozen=True)
class JobOutcome:
    """One worker's report that a job is over. All positions are positions in the job's transfer.

    Args:
        job_id: number of the job.
        failed: blocks that were not moved.
        corrupt: blocks of a load whose bytes did not match their digest.
        too_lossy: blocks of a save that failed because packing would lose too much; they are in `failed` as well.
        digests: of a save, where the owner of the pool keeps them; else None.
    """

    job_id: int
    failed: tuple[int, ...] = ()
    corrupt: tuple[int, ...] = ()
    too_lossy: tuple[int, ...] = ()
    digests: SaveDigests | None = None


@dataclass(frozen=True)
class WeightsChanged:
    """One worker's report that its model has other weights now.

    Args:
        last_plan: number of the last plan that was carried out, at least in part, with the old weights.
    """

    last_plan: int


@dataclass(frozen=True)
class PoolShrunk:
    """One worker's report that no more of its pool can be pinned.

    Args:
        pool_bytes: size of the usable part, in bytes of the pool that the scheduler half plans for.
    """

    pool_bytes: int


@dataclass(frozen=True)
class OwnedHandshake:
    """What the scheduler half has to know of a worker to plan in the pool of an owner.

    Args:
        socket: the owner's.
        pool: name of its memory, another one if the owner was started anew.
        namespace: the namespace of its blocks.
        part, num_parts: number of its part of a block, and how many there are.
        writer: the name under which it writes to the pool.
        payloads, codecs: bytes of a payload and number of the codec of a whole block, by form.
        canonical: its part of a block by form, None for forms that there are not; or why there is no canonical layout.
        canonical_namespace: the namespace of canonical blocks; None if there is none.
    """

    socket: str
    pool: str
    namespace: Namespace
    part: int
    num_parts: int
    writer: str
    payloads: tuple[int, ...]
    codecs: tuple[int, ...]
    canonical: tuple[BlockShard | None, ...] | str
    canonical_namespace: Namespace | None


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """One worker's report of the paged cache that it registered.

    Args:
        layout_digest: digest of the cache's layout.
        sizes: bytes of a block for each group of layers, large enough for those of every pipeline stage.
        num_blocks: device blocks.
        pool_bytes: size of its pool, in bytes of the pool that is planned with these sizes.
        owned: of a pool that an owner holds; None without one.
    """

    layout_digest: bytes
    sizes: tuple[BlockSizes, ...]
    num_blocks: int
    pool_bytes: int
    owned: "OwnedHandshake | None" = None
