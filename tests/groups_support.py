"""Helpers for tests of caches with several groups of layers: the caches, and their blocks by torch's own indexing."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import torch

from kvortex import KVortexConfig, KVortexEngine
from kvortex.config import KIB, MIB
from kvortex.groups import KVGroup
from kvortex.sched.batcher import Batch
from kvortex.testing import Fault, FaultInjectingExecutor
from kvortex.types import BlockHash
from tests.engine_support import BLOCK_SIZE, Parts, chain

STATE_TOKENS = 4 * BLOCK_SIZE
REACH = 40  # tokens of the window: the last three blocks
GROUPS = (
    KVGroup("full", ("full.0", "full.1"), BLOCK_SIZE),
    KVGroup("window", ("window.0",), BLOCK_SIZE, "window", REACH),
    KVGroup("state", ("conv", "ssm"), STATE_TOKENS, "state"),
)
PAGE_BYTES = 16 * KIB


class GroupedCache:
    """Tensors of a cache with groups.

    Args:
        tensors: name -> tensor.
        block_dims: name -> the dimension that counts blocks.
        groups: the groups, which name all tensors.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], block_dims: dict[str, int], groups: Sequence[KVGroup] = GROUPS
    ) -> None:
        self.tensors = tensors
        self.block_dims = block_dims
        self.groups = {group.name: group for group in groups}

    def num_blocks(self, group: str) -> int:
        name = self.groups[group].layers[0]
        return self.tensors[name].shape[self.block_dims[name]]

    def parts(self, group: str, block_id: int) -> list[torch.Tensor]:
        """A view of each layer's part of a block."""
        layers = self.groups[group].layers
        return [self.tensors[name].select(self.block_dims[name], block_id) for name in layers]

    def block(self, group: str, block_id: int) -> bytes:
        return b"".join(as_bytes(part).numpy().tobytes() for part in self.parts(group, block_id))

    def blocks(self, tables: Mapping[str, Sequence[int]]) -> dict[str, list[bytes]]:
        return {group: [self.block(group, b) for b in ids if b >= 0] for group, ids in tables.items()}

    def write(self, group: str, block_id: int, content: bytes) -> None:
        start = 0
        for part in self.parts(group, block_id):
            nbytes = part.numel() * part.element_size()
            piece = torch.frombuffer(bytearray(content[start : start + nbytes]), dtype=torch.uint8)
            part.copy_(piece.view(part.dtype).view(part.shape))
            start += nbytes

    def fill(self, seed: int) -> None:
        """Any bytes at all: what is no number of its type, too."""
        self._fill_with(seed, lambda shape, dtype, generator: random_bytes(shape, dtype, generator))

    def fill_with_numbers(self, seed: int) -> None:
        """Numbers as a model computes them, which a codec packs."""
        self._fill_with(seed, lambda shape, dtype, generator: torch.randn(shape, generator=generator).to(dtype))

    def _fill_with(self, seed: int, make: Callable[[torch.Size, torch.dtype, torch.Generator], torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.tensors.values():
            tensor.copy_(make(tensor.shape, tensor.dtype, generator))

    def snapshot(self) -> dict[str, bytes]:
        """All bytes of each tensor."""
        return {name: as_bytes(tensor).numpy().tobytes() for name, tensor in self.tensors.items()}

    def register(self, engine: KVortexEngine, hash_block_size: int = BLOCK_SIZE) -> None:
        engine.register_kv_caches(
            self.tensors, hash_block_size, block_dim=self.block_dims, groups=tuple(self.groups.values())
        )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in the order of its elements, `uint8 [n]`."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bytes(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    count = shape.numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def apart(groups: Sequence[KVGroup] = GROUPS) -> GroupedCache:
    """Each group on tensors of its own, with its own number of blocks and dtypes."""
    tensors = {
        "full.0": torch.zeros(2, 48, BLOCK_SIZE, 2, 64, dtype=torch.bfloat16),
        "full.1": torch.zeros(2, 48, BLOCK_SIZE, 2, 64, dtype=torch.bfloat16),
        "window.0": torch.zeros(40, BLOCK_SIZE, 2, 128, dtype=torch.float16),
        "conv": torch.zeros(24, 3, 80, dtype=torch.bfloat16),
        "ssm": torch.zeros(24, 4, 16, 32, dtype=torch.float32),
    }
    dims = {"full.0": 1, "full.1": 1, "window.0": 0, "conv": 0, "ssm": 0}
    return GroupedCache(tensors, dims, groups)


def in_shared_pages(groups: Sequence[KVGroup] = GROUPS, num_pages: int = 64) -> GroupedCache:
    """All groups over the same pages, as servers have them: a page belongs to the group that uses it just now."""
    first = torch.zeros(num_pages, PAGE_BYTES, dtype=torch.uint8)
    second = torch.zeros(num_pages, PAGE_BYTES, dtype=torch.uint8)
    page = 2 * BLOCK_SIZE * 2 * 64 * 2  # bytes of K and V of 16 tokens, 2 heads of 64 16-bit floats
    tensors = {
        "full.0": first[:, :page].view(torch.bfloat16).unflatten(1, (2, BLOCK_SIZE, 2, 64)),
        "full.1": second[:, :page].view(torch.bfloat16).unflatten(1, (2, BLOCK_SIZE, 2, 64)),
        "window.0": first[:, :page].view(torch.float16).unflatten(1, (2, BLOCK_SIZE, 2, 64)),
        "conv": first[:, : 3 * 80 * 2].view(torch.bfloat16).unflatten(1, (3, 80)),
        "ssm": first[:, 1024 : 1024 + 4 * 16 * 32 * 4].view(torch.float32).unflatten(1, (4, 16, 32)),
    }
    return GroupedCache(tensors, dict.fromkeys(tensors, 0), groups)


CACHES = {"apart": apart, "in shared pages": in_shared_pages}

Tables = dict[str, list[int]]


def tables(num_blocks: int, first: Mapping[str, int], window: int | None = None) -> Tables:
    """Block ids of a request of so many blocks.

    Args:
        num_blocks: blocks of full attention.
        first: the id of each group's first block.
        window: how many blocks of the window the request has, the last ones; None for all.
    """
    kept = num_blocks if window is None else window
    num_states = num_blocks * BLOCK_SIZE // STATE_TOKENS
    return {
        "full": list(range(first["full"], first["full"] + num_blocks)),
        "window": [-1] * (num_blocks - kept) + list(range(first["window"], first["window"] + kept)),
        "state": list(range(first["state"], first["state"] + num_states)),
    }


HERE = {"full": 0, "window": 16, "state": 0}
"""First ids of a request of 12 blocks; in shared pages they must differ, so the states' are shifted there."""


def places(shared: bool, number: int) -> dict[str, int]:
    """First ids of one of two requests of up to 12 blocks, such that no two blocks share a page."""
    if shared:
        return {"full": 32 * number, "window": 32 * number + 12, "state": 32 * number + 24}
    return {"full": 12 * number, "window": 12 * number, "state": 3 * number}


def request(num_blocks: int = 12, salt: int = 0) -> list[BlockHash]:
    return chain(num_blocks, salt)


def groups_config(**changes: object) -> KVortexConfig:
    """A pool of many blocks in several pieces, small batches."""
    small = KVortexConfig(
        pool={"bytes": 4 * MIB, "pin_piece_bytes": 256 * KIB},
        transfer={"max_batch_bytes": 4 * PAGE_BYTES, "linger_s": 0.0},
        identity={"model": "three groups"},
    )
    return small.replace(**changes)


@asynccontextmanager
async def grouped_engine(
    cache: GroupedCache,
    config: KVortexConfig | None = None,
    fault_of: Callable[[int, Batch], Fault | None] | None = None,
) -> AsyncIterator[KVortexEngine]:
    """An engine over the cache, whose batches go wrong as `fault_of` says."""

    def wrap(inner: object) -> FaultInjectingExecutor:
        return FaultInjectingExecutor(inner, fault_of or (lambda number, batch: None))  # type: ignore[arg-type]

    async with KVortexEngine.create(config or groups_config(), Parts(wrap_executor=wrap)) as engine:
        cache.register(engine)
        yield engine


def ids_of(tables: Mapping[str, Iterable[int]]) -> int:
    """How many blocks the tables name."""
    return sum(1 for ids in tables.values() for b in ids if b >= 0)
