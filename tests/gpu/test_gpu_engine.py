"""The engine on a real device: bytes, order against streams, cancellation, failure."""

import asyncio
import contextlib

import numpy as np
import pytest
import torch

from kvortex import KVortexConfig, KVortexEngine, MissReason, hash_blocks
from kvortex.codecs import pack_reference, packing_for, unpack_reference
from kvortex.index import pack_keys
from kvortex.kernels.reference import gather_reference
from kvortex.layout import KVLayout

pytestmark = pytest.mark.gpu

MIB = 1 << 20


def make_cache(blocks: int = 128, layers: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"layers.{i}": torch.randn(2, blocks, 16, 4, 64, device="cuda", dtype=torch.bfloat16) for i in range(layers)
    }


def config(**changes: object) -> KVortexConfig:
    pool = {"bytes": 64 * MIB, "pin_piece_bytes": 16 * MIB}
    return KVortexConfig(pool=pool, transfer={"max_batch_bytes": MIB}).replace(**changes)


@pytest.mark.parametrize("streams", [1, 2, 3, 5])
async def test_round_trip(streams: int) -> None:
    kv = make_cache()
    async with KVortexEngine.create(config(transfer={"streams": streams})) as engine:
        engine.register_kv_caches(kv, 16)
        hashes = hash_blocks(np.arange(16 * 100))
        ids = np.random.default_rng(0).permutation(128)[:100]
        assert (await engine.save_blocks(hashes, ids)).ok
        want = {name: tensor.clone() for name, tensor in kv.items()}
        for tensor in kv.values():
            tensor.fill_(float("nan"))
        loaded = await engine.load_blocks(hashes, ids)
        assert loaded.ok
        for name, tensor in kv.items():
            assert torch.equal(tensor[:, ids], want[name][:, ids])


async def test_a_save_waits_for_its_producer_stream() -> None:
    kv = make_cache()
    producer = torch.cuda.Stream()
    async with KVortexEngine.create(config()) as engine:
        engine.register_kv_caches(kv, 16)
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(200_000_000)
            for tensor in kv.values():
                tensor.fill_(1.0)
        hashes = hash_blocks(np.arange(16 * 8))
        await engine.save_blocks(hashes, range(8), stream=producer)
        torch.cuda.synchronize()
        for tensor in kv.values():
            tensor.fill_(2.0)
        assert (await engine.load_blocks(hashes, range(8))).ok
        assert all(bool((tensor[:, :8] == 1.0).all()) for tensor in kv.values())
        assert all(bool((tensor[:, 8:] == 2.0).all()) for tensor in kv.values())


async def test_a_load_waits_for_its_consumer_stream() -> None:
    kv = make_cache()
    consumer = torch.cuda.Stream()
    async with KVortexEngine.create(config()) as engine:
        engine.register_kv_caches(kv, 16)
        hashes = hash_blocks(np.arange(16 * 8))
        await engine.save_blocks(hashes, range(8))
        before = kv["layers.0"][:, 8:16].clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(consumer):
            torch.cuda._sleep(200_000_000)
            seen = kv["layers.0"][:, 8:16].clone()
        assert (await engine.load_blocks(hashes, range(8, 16), stream=consumer)).ok
        consumer.synchronize()
        assert torch.equal(seen, before)
        assert torch.equal(kv["layers.0"][:, 8:16], kv["layers.0"][:, :8])


async def test_cancelling_leaves_no_transfer_behind() -> None:
    kv = make_cache(blocks=512)
    async with KVortexEngine.create(config()) as engine:
        engine.register_kv_caches(kv, 16)
        hashes = hash_blocks(np.arange(16 * 512))
        await engine.save_blocks(hashes[:256], range(256))
        cancelled = 0
        for turns in range(12):
            task = asyncio.create_task(engine.load_blocks(hashes[:256], range(256, 512)))
            for _ in range(turns):
                await asyncio.sleep(0)
            cancelled += task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            for tensor in kv.values():
                tensor[:, 256:] = 3.0
            torch.cuda.synchronize()
            await asyncio.sleep(0.005)
            assert all(bool((tensor[:, 256:] == 3.0).all()) for tensor in kv.values())
        assert cancelled > 2


async def test_corrupt_host_bytes_are_a_miss() -> None:
    kv = make_cache()
    async with KVortexEngine.create(config()) as engine:
        engine.register_kv_caches(kv, 16)
        hashes = hash_blocks(np.arange(16 * 8))
        await engine.save_blocks(hashes, range(8))
        control, data = engine._planes()
        pins = control.index.pin(pack_keys(hashes[5:6]))
        offset = int(pins.offsets[0])
        control.allocator.free_many(control.index.unpin(pins.slots))
        data.pool.bytes[offset + 1000] ^= 4
        loaded = await engine.load_blocks(hashes, range(8))
        assert loaded.missed_block_ids == (5,)
        assert loaded.outcomes[5] is MissReason.CORRUPT
        assert not engine.check_blocks(hashes)[5]


async def test_both_directions_at_once_under_eviction() -> None:
    kv = make_cache(blocks=256)
    rng = np.random.default_rng(3)
    block_nbytes = 4 * 2 * 16 * 4 * 64 * 2
    async with KVortexEngine.create(config(pool={"bytes": 96 * block_nbytes, "pin_piece_bytes": MIB})) as engine:
        engine.register_kv_caches(kv, 16)
        content = {name: tensor.clone() for name, tensor in kv.items()}
        chains = [hash_blocks(np.arange(16 * 16) + 1000 * c) for c in range(8)]

        async def client(number: int) -> None:
            chain, ids = chains[number], np.arange(16) + 16 * number
            for _ in range(20):
                await engine.save_blocks(chain, ids)
                target = 128 + 16 * number + rng.permutation(16)
                loaded = await engine.load_blocks(chain, target)
                good = [i for i, reason in enumerate(loaded.outcomes) if reason is None]
                for name in kv:
                    assert torch.equal(kv[name][:, target[good]], content[name][:, ids[good]])

        await asyncio.gather(*(client(c) for c in range(8)))
        assert engine.get_stats().evicted_blocks > 0


@pytest.mark.parametrize(("codec", "dtype"), [("fp8", torch.bfloat16), ("fp8", torch.float16), ("bf16", torch.float32)])
async def test_packed_round_trip(codec: str, dtype: torch.dtype) -> None:
    """Blocks come back as the reference rounds them; those with an infinity come back as they were."""
    kv = {name: tensor.to(dtype) for name, tensor in make_cache().items()}
    kv["layers.2"][1, [5, 77], 3, 2, 1] = float("inf")
    host = {name: tensor.cpu() for name, tensor in kv.items()}
    layout = KVLayout.from_tensors(host, 16)
    packing = packing_for(layout, codec)
    assert packing is not None
    raw, _ = gather_reference(layout, range(128))
    want = unpack_reference(packing, pack_reference(packing, raw)[0])
    want[[5, 77]] = raw[[5, 77]]
    async with KVortexEngine.create(config(codec=codec)) as engine:
        engine.register_kv_caches(kv, 16)
        hashes = hash_blocks(np.arange(16 * 128))
        ids = np.random.default_rng(0).permutation(128)
        assert (await engine.save_blocks(hashes, ids)).ok
        stats = engine.get_stats()
        assert stats.kept_as_is_blocks == 2
        assert stats.pools[0].allocated_bytes < 0.53 * raw.nbytes
        for tensor in kv.values():
            tensor.fill_(float("nan"))
        assert (await engine.load_blocks(hashes, ids)).ok
        for name, tensor in kv.items():
            host[name].copy_(tensor)
        assert (gather_reference(layout, range(128))[0] == want).all()


async def test_graphs_are_captured_while_memory_is_pinned_and_blocks_move() -> None:
    kv = make_cache()
    work, side = torch.zeros(1024, device="cuda"), torch.cuda.Stream()
    captured_while_pinning = 0

    def capture() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(200):
                work.add_(1)
        return graph

    async with KVortexEngine.create(config(pool={"bytes": 6 << 30, "pin_piece_bytes": 64 * MIB})) as engine:
        engine.register_kv_caches(kv, 16)
        pinning = asyncio.create_task(engine.wait_pinned())
        for number in range(20):
            still_pinning = not pinning.done()
            hashes = hash_blocks(np.arange(16 * 8), extra_keys=(number,))
            saving = asyncio.create_task(engine.save_blocks(hashes, range(8), stream=side))
            graph = await asyncio.to_thread(capture)
            captured_while_pinning += still_pinning
            assert (await saving).ok
            graph.replay()
        await pinning
        torch.cuda.synchronize()
    assert captured_while_pinning
    assert work.unique().tolist() == [20 * 200]
