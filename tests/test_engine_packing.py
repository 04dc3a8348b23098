"""The engine with a codec: half the bytes, within the error, and what packing would hurt kept as it is."""

import numpy as np
import pytest
import torch

from kvortex import KVortexEngine, SaveOutcome
from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.kernels.reference import gather_reference
from kvortex.layout import KVLayout
from kvortex.testing import Fault
from kvortex.types import MissReason
from tests.engine_support import BLOCK_SIZE, chain, running_engine, small_config

BLOCKS = 40
KINDS = {
    "fp8 of bfloat16": ("fp8", torch.bfloat16),
    "fp8 of float32": ("fp8", torch.float32),
    "bf16": ("bf16", torch.float32),
}


def make_cache(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"layers.{i}": torch.randn(2, BLOCKS, BLOCK_SIZE, 2, 64, generator=generator).to(dtype) for i in range(2)}


def wipe(cache: dict[str, torch.Tensor]) -> None:
    for layer in cache.values():
        layer.fill_(float("nan"))


def expected(cache: dict[str, torch.Tensor], codec: str, ids: list[int]) -> np.ndarray:
    layout = KVLayout.from_tensors(cache, BLOCK_SIZE)
    packing = packing_for(layout, codec)
    assert packing is not None
    return unpack_reference(packing, pack_reference(packing, gather_reference(layout, ids)[0])[0])


def payloads(cache: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    return gather_reference(KVLayout.from_tensors(cache, BLOCK_SIZE), ids)[0]


@pytest.mark.parametrize("kind", KINDS)
async def test_blocks_come_back_as_the_codec_rounds_them_from_half_the_memory(kind: str) -> None:
    codec, dtype = KINDS[kind]
    cache, hashes, ids = make_cache(dtype), chain(20), list(range(20))
    want = expected(cache, codec, ids)
    async with running_engine(cache, small_config(codec=codec, transfer={"self_test": True})) as (engine, _):
        assert (await engine.save_blocks(hashes, ids)).num_stored == 20
        used = engine.get_stats().pools[0].allocated_bytes
        raw = 20 * KVLayout.from_tensors(cache, BLOCK_SIZE).block_nbytes
        assert used < raw * (0.27 if kind == "fp8 of float32" else 0.51)
        assert engine.namespace.codec == f"{codec} within {engine.config.codec.max_error}"
        wipe(cache)
        assert (await engine.load_blocks(hashes, [b + 20 for b in ids])).ok
        assert (payloads(cache, [b + 20 for b in ids]) == want).all()


async def test_what_packing_would_hurt_is_kept_as_it_is() -> None:
    cache, hashes, ids = make_cache(torch.bfloat16), chain(12), list(range(12))
    cache["layers.1"][1, 3, 5, 1, 7] = float("inf")
    cache["layers.0"][0, 8, 0, 0, 0] = float("nan")
    want, exact = expected(cache, "fp8", ids), payloads(cache, ids)
    async with running_engine(cache, small_config(codec="fp8")) as (engine, executor):
        result = await engine.save_blocks(hashes, ids)
        assert result.outcomes == (SaveOutcome.STORED,) * 12
        assert engine.get_stats().kept_as_is_blocks == 2
        assert engine.get_stats().transfers[0].failures == 0
        wipe(cache)
        loaded = await engine.load_blocks(hashes, [b + 20 for b in ids])
        assert loaded.ok
        back = payloads(cache, [b + 20 for b in ids])
        as_is = np.isin(ids, [3, 8])
        assert (back[as_is] == exact[as_is]).all()
        assert (back[~as_is] == want[~as_is]).all()
        assert {batch.form for batch in executor.batches} == {0, 1}
        assert all(batch.nbytes <= engine.config.transfer.max_batch_bytes for batch in executor.batches)


async def test_a_strict_bound_keeps_everything_as_it_is() -> None:
    cache, hashes, ids = make_cache(torch.bfloat16), chain(6), list(range(6))
    exact = payloads(cache, ids)
    async with running_engine(cache, small_config(codec={"name": "fp8", "max_error": 1e-4})) as (engine, _):
        assert (await engine.save_blocks(hashes, ids)).ok
        wipe(cache)
        assert (await engine.load_blocks(hashes, ids)).ok
        assert (payloads(cache, ids) == exact).all()
        assert engine.get_stats().kept_as_is_blocks == 6


async def test_a_failed_second_attempt_is_a_miss_that_says_so() -> None:
    cache, hashes = make_cache(torch.bfloat16), chain(3)

    def fault_of(number: int, batch: object) -> Fault | None:
        return {0: Fault.LOSSY, 1: Fault.FAIL}.get(number)

    async with running_engine(cache, small_config(codec="fp8"), fault_of) as (engine, _):
        result = await engine.save_blocks(hashes, [0, 1, 2])
        assert result.outcomes == (SaveOutcome.FAILED, SaveOutcome.STORED, SaveOutcome.STORED)
        assert engine.miss_reason(hashes[0]) is MissReason.TRANSFER_FAILED
        assert (await engine.load_blocks(hashes, [0, 1, 2])).outcomes[1:] == (None, None)


async def test_a_flipped_bit_in_a_packed_block_is_a_miss() -> None:
    cache, hashes, ids = make_cache(torch.bfloat16), chain(5), list(range(5))
    async with running_engine(cache, small_config(codec="fp8")) as (engine, _):
        await engine.save_blocks(hashes, ids)
        pool = engine._planes()[1].pool
        pool.bytes[100] ^= 1
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.outcomes == (MissReason.CORRUPT, None, None, None, None)


async def test_packed_and_other_blocks_share_a_pool_that_overflows() -> None:
    cache = make_cache(torch.bfloat16)
    cache["layers.0"][:, ::3] = float("inf")  # every third block is kept as it is
    exact = payloads(cache, list(range(BLOCKS)))
    want = expected(cache, "fp8", list(range(BLOCKS)))
    block = KVLayout.from_tensors(cache, BLOCK_SIZE).block_nbytes
    config = small_config(codec="fp8", pool={"bytes": 12 * block, "pin_piece_bytes": 64 * 1024})
    hits = 0
    async with running_engine(cache, config) as (engine, _):
        for salt in range(12):
            ids = np.random.default_rng(salt).permutation(BLOCKS)[:10].tolist()
            hashes = chain(10, salt)
            before = {name: layer.clone() for name, layer in cache.items()}
            await engine.save_blocks(hashes, ids)
            loaded = await engine.load_blocks(hashes, ids)
            back = payloads(cache, ids)
            for row, b, reason in zip(back, ids, loaded.outcomes, strict=True):
                if reason is None:
                    hits += 1
                    assert (row == (exact[b] if b % 3 == 0 else want[b])).all()
            for name, layer in cache.items():
                layer.copy_(before[name])
        assert engine.get_stats().evicted_blocks > 0
    assert hits >= 60


async def test_a_cache_that_the_codec_does_not_take_is_left_as_it_is() -> None:
    cache = {"layers.0": torch.randint(0, 256, (BLOCKS, BLOCK_SIZE, 64), dtype=torch.uint8)}
    exact = payloads(cache, [1, 2])
    async with KVortexEngine.create(small_config(codec="fp8")) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        assert engine.namespace.codec == "raw"
        await engine.save_blocks(chain(2), [1, 2])
        assert (await engine.load_blocks(chain(2), [3, 4])).ok
        assert (payloads(cache, [3, 4]) == exact).all()
