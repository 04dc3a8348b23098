"""The other workers of an engine. Ranks that hold the same KV share one pool, and each saves a part of the blocks.

With multi-head latent attention every tensor-parallel rank computes the same latent vector of each token. If the ranks
share a pool, it holds each block once, and each rank's link carries only its part of the saves. Every rank loads all
blocks over its own link, and compares them with the digests of the ranks that saved them.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group

from kvortex.arithmetic import align_up
from kvortex.config import KVortexConfig
from kvortex.errors import ConfigError
from kvortex.memory import SharedMemory, SharedTicket, check_memory
from kvortex.types import PAGE_BYTES, BlockSizes, TransferPlan
from kvortex.vllm.model import ServedGroups

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RankGroup(Protocol):
    """Processes that can exchange values."""

    rank: int
    size: int

    def exchange(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks. Every rank must call this at the same time."""
        ...


class Coordinated:
    """One of vLLM's process groups, over its CPU backend.

    Args:
        coordinator: vLLM's `GroupCoordinator`.
    """

    def __init__(self, coordinator: Any) -> None:
        self.rank, self.size = int(coordinator.rank_in_group), int(coordinator.world_size)
        self._cpu_group = coordinator.cpu_group

    def exchange(self, value: T) -> list[T]:
        """See `RankGroup`."""
        values: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._cpu_group)
        return values  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Peers:
    """The groups of one worker, each None if there is no other rank in it.

    Args:
        replicas: ranks that hold the same KV.
        stages: ranks that hold other layers, on other pipeline stages.
        world: all ranks of the engine.
    """

    replicas: RankGroup | None = None
    stages: RankGroup | None = None
    world: RankGroup | None = None


def peers_of(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> Peers:
    """The groups of the worker in this process."""
    parallel = vllm_config.parallel_config
    latent = parallel.tensor_parallel_size > 1 and ServedGroups(kv_cache_config).is_latent
    return Peers(
        replicas=Coordinated(get_tp_group()) if latent else None,
        stages=Coordinated(get_pp_group()) if parallel.pipeline_parallel_size > 1 else None,
        world=Coordinated(get_world_group()) if parallel.world_size > 1 else None,
    )


def check_memory_of_all(peers: Peers, pool_bytes: int, ranks: int) -> None:
    """Refuse pools that do not fit a machine together, before any rank has allocated one.

    Args:
        peers: the other ranks; all of them must call this at the same time.
        pool_bytes: bytes of one pool.
        ranks: number of pools of that size on this machine.

    Raises:
        ConfigError: the pools do not fit, on this machine or on that of another rank.
    """
    why = ""
    try:
        check_memory(pool_bytes, ranks=ranks)
    except ConfigError as error:
        why = str(error)
    answers = peers.world.exchange(why) if peers.world is not None else [why]
    if refused := [answer for answer in answers if answer]:
        raise ConfigError(refused[0])


@dataclass(frozen=True, slots=True, eq=False)
class PoolShare:
    """One rank's share of the saves, and the digests of all blocks in the pool.

    The pool is divided into places of equal size. An extent belongs to the place that its offset lies in.

    Args:
        config: the settings of the pool.
        digests: `uint64 [num_places]`, the digest of the block at each place.
        place_nbytes: bytes of a place. No extent is smaller, so no two blocks have the same place.
        rank, size: this rank saves the blocks whose place is `rank` modulo `size`.
        memory: the pool, shared by the ranks with the digests; None if this rank has its own.
    """

    config: KVortexConfig
    digests: NDArray[np.uint64]
    place_nbytes: int
    rank: int = 0
    size: int = 1
    memory: SharedMemory | None = None

    @classmethod
    def own(cls, config: KVortexConfig, sizes: Sequence[BlockSizes]) -> Self:
        """The share of a rank with a pool of its own: it saves every block."""
        place = _place_nbytes(sizes)
        return cls(config, np.zeros(_num_places(config, place), dtype=np.uint64), place)

    @classmethod
    def of_group(
        cls, group: RankGroup, config: KVortexConfig, layout_digest: bytes, sizes: Sequence[BlockSizes]
    ) -> Self:
        """Create a shared pool on the first rank, and open it on the others.

        If that is not possible, each rank gets a pool of its own. Every rank of the group must call this at the same
        time.

        Raises:
            ConfigError: the machine does not have that much memory.
        """
        place = _place_nbytes(sizes)
        num_places = _num_places(config, place)
        pool_bytes = align_up(config.pool.bytes, PAGE_BYTES)
        memory = _open_memory(group, pool_bytes + num_places * 8)
        reached = group.exchange((memory is not None, layout_digest))
        if memory is None or any(answer != (True, layout_digest) for answer in reached):
            divided = config.pool.bytes // group.size
            logger.warning(
                "ranks on different machines or with different layouts: each stores a copy of its own, of %d bytes "
                "(pool.bytes divided by %d ranks)",
                divided,
                group.size,
            )
            if memory is not None:
                memory.close()
            return cls.own(config.replace(pool=divided), sizes)
        digests = np.frombuffer(memory.map(pool_bytes, num_places * 8), dtype=np.uint64)
        return cls(config, digests, place, group.rank, group.size, memory)

    def places(self, plan: TransferPlan) -> NDArray[np.int64]:
        """The places of a plan's blocks, `int64 [n]`: indices into `digests`."""
        return plan.offsets // self.place_nbytes

    def part_of(self, planned: TransferPlan, placed: TransferPlan) -> NDArray[np.intp]:
        """Positions of the blocks of a plan that are this rank's share, `intp [m]`; the second has its own offsets."""
        return np.flatnonzero(self.places(placed) % self.size == self.rank)

    def forget(self) -> None:
        """Change the digests of all blocks that this rank has saved, so that each fails its check when it is loaded."""
        mine = self.digests[self.rank :: self.size]
        mine ^= np.uint64(secrets.randbits(64))  # a new number each time: the same one twice would restore the digests

    def close(self) -> None:
        """Release the shared memory; idempotent."""
        if self.memory is not None:
            self.memory.close()


def _open_memory(group: RankGroup, nbytes: int) -> SharedMemory | None:
    first: SharedMemory | None = None
    offer: SharedTicket | str = ""
    if group.rank == 0:
        try:
            first = SharedMemory.create(nbytes)
            offer = first.ticket
        except ConfigError as error:  # the others wait for an answer, whatever it is
            offer = str(error)
    offer, *_ = group.exchange(offer)
    if isinstance(offer, str):
        raise ConfigError(offer)
    return first if first is not None else SharedMemory.attach(offer)


def _place_nbytes(sizes: Sequence[BlockSizes]) -> int:
    return min(size.packed for size in sizes if size.packed)


def _num_places(config: KVortexConfig, place_nbytes: int) -> int:
    return config.pool.bytes // place_nbytes + 1
