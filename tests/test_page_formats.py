"""Pages of every format that servers keep, byte-exact through pool and disk. KVortex does not look into them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine
from tests.engine_support import chain

BLOCKS = 24
TOKENS = 16
HEADS, DIM, LAYERS = 2, 64, 3
SAVED, ELSEWHERE = list(range(8)), list(range(12, 20))

Cache = dict[str, torch.Tensor]


def layers(make: Callable[[], torch.Tensor], count: int = LAYERS) -> Cache:
    return {f"layers.{i}": make() for i in range(count)}


def paged(*shape: int, dtype: torch.dtype = torch.uint8) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(shape, dtype=dtype)


def padded(page: tuple[int, ...], page_bytes: int) -> Callable[[], torch.Tensor]:
    """Pages of bytes with a gap behind each, as where the pages of several kinds of layer have one size."""

    def make() -> torch.Tensor:
        storage = torch.zeros(BLOCKS, page_bytes, dtype=torch.uint8)
        used = int(torch.tensor(page).prod())
        return storage[:, :used].unflatten(1, page)

    return make


def in_one_storage(page: tuple[int, ...], dtype: torch.dtype) -> Cache:
    """All layers of a block side by side."""
    storage = torch.zeros(BLOCKS, LAYERS, *page, dtype=dtype)
    return {f"layers.{i}": storage[:, i] for i in range(LAYERS)}


FORMATS: dict[str, Callable[[], Cache]] = {
    # 8-bit floats, as vLLM keeps them (bytes) and as typed tensors.
    "fp8 as bytes": lambda: layers(paged(2, BLOCKS, TOKENS, HEADS, DIM)),
    "fp8_e4m3": lambda: layers(paged(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.float8_e4m3fn)),
    "fp8_e5m2": lambda: layers(paged(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.float8_e5m2)),
    "fp8_e4m3fnuz": lambda: layers(paged(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.float8_e4m3fnuz)),
    # A scale a token and head: in the page behind the values, or in a tensor of its own.
    "int8 per token and head, scales inside": lambda: layers(paged(BLOCKS, 2, TOKENS, HEADS, DIM + 4)),
    "int8 per token and head, scales apart": lambda: (
        {f"{name}.values": t for name, t in layers(paged(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.int8)).items()}
        | {f"{name}.scales": t for name, t in layers(paged(2, BLOCKS, TOKENS, HEADS, dtype=torch.float32)).items()}
    ),
    "fp8 per token and head, scales inside": lambda: layers(paged(BLOCKS, 2, HEADS, TOKENS, DIM + 4)),
    "int4 per token and head": lambda: layers(paged(BLOCKS, 2, TOKENS, HEADS, DIM // 2 + 4)),
    # 4-bit floats with a scale byte for 16 of them.
    "nvfp4": lambda: layers(paged(BLOCKS, 2, TOKENS, HEADS, DIM // 2 + DIM // 16)),
    "nvfp4, scales apart": lambda: (
        {f"{name}.values": t for name, t in layers(paged(BLOCKS, 2, TOKENS, HEADS, DIM // 2)).items()}
        | {f"{name}.scales": t for name, t in layers(paged(BLOCKS, 2, TOKENS, HEADS, DIM // 16)).items()}
    ),
    # Rotated codes with norms: K and V of a token in one slot of an uneven size.
    "turboquant k8v4": lambda: layers(paged(BLOCKS, TOKENS, HEADS, DIM + 2 + DIM // 2 + 4)),
    "turboquant 4 bit": lambda: layers(paged(BLOCKS, TOKENS, HEADS, DIM // 2 + 2 + DIM // 2 + 4)),
    "turboquant 3 bit": lambda: layers(paged(BLOCKS, TOKENS, HEADS, 3 * DIM // 8 + 2 + 3 * DIM // 8 + 4)),
    # Latents: one vector a token.
    "latent": lambda: layers(paged(BLOCKS, TOKENS, 576, dtype=torch.bfloat16)),
    "packed latent of 656 bytes": lambda: layers(paged(BLOCKS, TOKENS, 656)),
    "packed latent of 584 bytes": lambda: layers(paged(BLOCKS, TOKENS, 584)),
    "latent and indexer": lambda: (
        layers(paged(BLOCKS, TOKENS, 656))
        | {f"layers.{i}.indexer": t for i, t in enumerate(layers(paged(BLOCKS, TOKENS, 132)).values())}
    ),
    # Gaps behind pages, and pages of several layers side by side.
    "padded pages": lambda: layers(padded((2, TOKENS, HEADS, DIM), 8192)),
    "padded pages of uneven size": lambda: layers(padded((TOKENS, 132), 4096)),
    "all layers in one storage": lambda: in_one_storage((TOKENS, HEADS, 2 * DIM), torch.float16),
    "all packed layers in one storage": lambda: in_one_storage((TOKENS, HEADS, 36), torch.uint8),
    # States: a convolution's and a recurrence's, of two types, in one page each.
    "states": lambda: {
        "mixer.conv": torch.zeros(BLOCKS, 3, 80, dtype=torch.bfloat16),
        "mixer.ssm": torch.zeros(BLOCKS, 4, 16, 32, dtype=torch.float32),
    },
}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() > 1 or tensor.dtype != torch.uint8 else tensor


def block_dim_of(tensor: torch.Tensor) -> int:
    return tensor.shape.index(BLOCKS)


def block_of(tensor: torch.Tensor, block_id: int) -> bytes:
    return bytes(as_bytes(tensor.select(block_dim_of(tensor), block_id).contiguous()).flatten().tolist())


def fill(cache: Cache, seed: int) -> None:
    """Any bytes at all: what is no number of its type, too."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in cache.values():
        for block_id in range(BLOCKS):
            block = as_bytes(tensor.select(block_dim_of(tensor), block_id))
            block.copy_(torch.randint(0, 256, block.shape, generator=generator, dtype=torch.uint8))


def contents(cache: Cache, block_ids: list[int]) -> list[list[bytes]]:
    return [[block_of(tensor, block_id) for tensor in cache.values()] for block_id in block_ids]


@pytest.mark.parametrize("name", FORMATS)
async def test_a_page_comes_back_byte_for_byte_from_the_pool_and_from_disk(name: str, tmp_path: Path) -> None:
    config = KVortexConfig(
        pool={"bytes": "16MiB", "pin_piece_bytes": "4MiB"}, disk=tmp_path, identity={"model": f"format {name}"}
    )
    cache = FORMATS[name]()
    fill(cache, seed=1)
    want, untouched = contents(cache, SAVED), contents(cache, [20, 21, 22, 23])
    hashes = chain(len(SAVED))
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, TOKENS, num_blocks=BLOCKS)
        assert (await engine.save_blocks(hashes, SAVED)).ok
        assert (await engine.load_blocks(hashes, ELSEWHERE)).ok
        assert contents(cache, ELSEWHERE) == want, "from the pool"
        assert contents(cache, SAVED) == want
        assert contents(cache, [20, 21, 22, 23]) == untouched
        await engine.flush()
    again = FORMATS[name]()
    fill(again, seed=2)
    untouched = contents(again, [20, 21, 22, 23])
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(again, TOKENS, num_blocks=BLOCKS)
        assert await engine.wait_tier()
        assert (await engine.load_blocks(hashes, ELSEWHERE)).ok
        assert contents(again, ELSEWHERE) == want, "from disk"
        assert contents(again, [20, 21, 22, 23]) == untouched


HOLDS_16_BIT_FLOATS = ("latent", "all layers in one storage", "states")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in HOLDS_16_BIT_FLOATS])
async def test_a_codec_leaves_pages_alone_that_are_quantised_already(name: str) -> None:
    cache = FORMATS[name]()
    fill(cache, seed=3)
    want, hashes = contents(cache, SAVED), chain(len(SAVED))
    async with KVortexEngine.create(KVortexConfig(pool="16MiB", codec={"name": "fp8", "max_error": 0.9})) as engine:
        engine.register_kv_caches(cache, TOKENS, num_blocks=BLOCKS)
        assert engine.namespace.codec == "raw"
        assert (await engine.save_blocks(hashes, SAVED)).ok
        assert (await engine.load_blocks(hashes, ELSEWHERE)).ok
        assert contents(cache, ELSEWHERE) == want
