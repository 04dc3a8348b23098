"""One rank's access to the pool of an owner: that of the machine, or of the engine, which has one for lower tiers."""

import hashlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError, KVortexError
from kvortex.memory import SharedMemory, check_memory
from kvortex.owner import OwnerClient
from kvortex.owner.child import OwnerProcess
from kvortex.owner.protocol import Kind
from kvortex.runtime.private_folder import private_folder
from kvortex.tiering import tier_of
from kvortex.types import PAGE_BYTES, TransferPlan
from kvortex.vllm.worker.parts import BlockParts, PartSizes
from kvortex.vllm.worker.ranks import Peers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_NAME_BYTES: Final = 16


@dataclass(eq=False)
class OwnedPool:
    """The pool of an owner, as one rank uses it.

    Args:
        config: the settings, with the size of the whole pool and of its pieces as the first owner had them.
        client: the connection to the owner.
        parts: this rank's part of the blocks.
        rank, size: number of this rank among those that hold the same KV; each saves some of the blocks.
        shard, num_shards: number of this rank's part among those of its pipeline stage.
        child: the owner's process, if this rank has started it.
    """

    config: KVortexConfig
    client: OwnerClient
    parts: BlockParts
    rank: int = 0
    size: int = 1
    shard: int = 0
    num_shards: int = 1
    child: OwnerProcess | None = None
    writer: str = field(default_factory=lambda: secrets.token_hex(_NAME_BYTES))

    @property
    def memory(self) -> SharedMemory:
        """The pool."""
        return self.client.memory

    def part_of(self, planned: TransferPlan, placed: TransferPlan) -> NDArray[np.intp]:
        """See `PoolShare.part_of`."""
        if self.size == 1:
            return np.arange(planned.num_blocks)
        return np.flatnonzero(planned.offsets // self.parts.smallest % self.size == self.rank)

    def forget(self) -> None:
        """The weights have changed: the scheduler half finds nothing of what was saved any more."""

    def again(self) -> "OwnedPool":
        """The pool of the owner that listens at the socket now. This object is not used any more then.

        Raises:
            ConfigError, OwnerError: there is none, or it refuses this process.
        """
        client = OwnerClient(self.client.path, self.config.owner.deadline_s)
        self.client.close()
        return replace(self, client=client)

    def close(self) -> None:
        """End the connection, and the owner if this rank has started it; idempotent."""
        self.client.close()
        if self.child is not None:
            self.child.close()


def uses_owner(config: KVortexConfig) -> bool:
    """True where the pool is not the worker's own: there is an owner, or there are lower tiers."""
    return bool(config.owner.socket or config.lower_tier)


def join_owner(vllm_config: "VllmConfig", config: KVortexConfig, peers: Peers, mine: PartSizes) -> OwnedPool:
    """Connect to the owner of the machine, or to one that the first rank starts. All ranks call this at the same time.

    Args:
        vllm_config: the engine's configuration.
        config: the connector's settings.
        peers: the other ranks.
        mine: what this rank stores of a block.

    Raises:
        ConfigError, OwnerError: there is no owner, or it refuses this process; vLLM does not start then.
    """
    if int(getattr(vllm_config.parallel_config, "nnodes", 1)) > 1:
        raise ConfigError("lower tiers and owners serve engines whose workers are all on one machine: leave them out")
    shard, num_shards = _shard_of(vllm_config, peers)
    parts = _parts_of(peers, mine, shard, num_shards)
    replicas = peers.replicas
    rank, size = (replicas.rank, replicas.size) if replicas is not None else (0, 1)
    socket, child = config.owner.socket, None
    if not socket:
        socket = str(_childs_socket(vllm_config))
        child = _start_child(vllm_config, config, peers, parts, Path(socket))
    try:
        client = OwnerClient(socket, config.owner.deadline_s)
    except BaseException:
        if child is not None:
            child.close()
        raise
    pool = {"bytes": client.pool_bytes, "pin_piece_bytes": client.piece_bytes}
    own = {"owner": socket, "tier": {"urls": (), "canonical_layout": False}, "disk": ""}
    return OwnedPool(config.replace(pool=pool, **own), client, parts, rank, size, shard, num_shards, child)


def _shard_of(vllm_config: "VllmConfig", peers: Peers) -> tuple[int, int]:
    """Number of a rank's part among those of its pipeline stage, and how many these are."""
    parallel = vllm_config.parallel_config
    tensor_ranks = int(parallel.tensor_parallel_size)
    return (0, 1) if peers.replicas is not None else (int(parallel.rank) % tensor_ranks, tensor_ranks)


def _parts_of(peers: Peers, mine: PartSizes, shard: int, num_shards: int) -> BlockParts:
    of_stages: Sequence[PartSizes] = peers.stages.exchange(mine) if peers.stages is not None else [mine]
    stage = peers.stages.rank if peers.stages is not None else 0
    return BlockParts([part for part in of_stages for _ in range(num_shards)], stage * num_shards + shard)


def _childs_socket(vllm_config: "VllmConfig") -> Path:
    folder = private_folder()
    if folder is None:
        raise ConfigError("there is no folder in TMPDIR for a socket that only this user may write to")
    transfer = vllm_config.kv_transfer_config
    name = hashlib.sha256(str(transfer.engine_id if transfer is not None else "").encode()).hexdigest()
    return folder / f"pool-{name[:_NAME_BYTES]}.sock"


def _start_child(
    vllm_config: "VllmConfig", config: KVortexConfig, peers: Peers, parts: BlockParts, path: Path
) -> OwnerProcess | None:
    """Start the owner of this engine on its first rank; the others wait until it is there."""
    child: OwnerProcess | None = None
    why = ""
    if int(vllm_config.parallel_config.rank) == 0:
        try:
            child = OwnerProcess(_childs_config(config, parts), path)
        except KVortexError as error:  # the others wait for an answer, whatever it is
            why = str(error)
    answers = peers.world.exchange(why) if peers.world is not None else [why]
    if refused := [answer for answer in answers if answer]:
        raise ConfigError(refused[0])
    return child


def _childs_config(config: KVortexConfig, parts: BlockParts) -> KVortexConfig:
    """A pool of `pool.bytes` for each part, in pieces that a block of all ranks fits in."""
    tier_of(config, bytes(32))  # an error in the settings is told here, not by the child
    largest = max(size.raw for size in parts.sizes)
    nbytes = align_up(config.pool.bytes * parts.count, PAGE_BYTES)
    check_memory(nbytes)
    piece = max(config.pool.pin_piece_bytes, align_up(largest, PAGE_BYTES))
    return config.replace(pool={"bytes": nbytes, "pin_piece_bytes": piece})


def join_as_writer(pool: OwnedPool) -> None:
    """Tell the owner that this process writes to the blocks which the scheduler half reserves."""
    pool.client.ask(Kind.WRITER, pool.writer.encode())
