"""Several requests with one system prompt: the shared blocks are stored once, and all requests hit them."""

import asyncio

import torch

from kvortex import KVortexConfig, KVortexEngine, hash_blocks

BLOCK_SIZE = 16
SYSTEM_PROMPT = list(range(1000, 1000 + 4 * BLOCK_SIZE))
device = "cuda" if torch.cuda.is_available() else "cpu"


async def serve(engine: KVortexEngine, name: str, question: list[int], first_block: int) -> None:
    """What a server does: load the longest known prefix, compute the rest (left out here), save it all."""
    hashes = hash_blocks(SYSTEM_PROMPT + question, BLOCK_SIZE)
    block_ids = list(range(first_block, first_block + len(hashes)))
    known = engine.match_prefix(hashes)
    loaded = await engine.load_blocks(hashes[:known], block_ids[:known])
    saved = await engine.save_blocks(hashes, block_ids)
    print(f"{name}: {loaded.num_prefix_loaded} blocks loaded, {saved.num_stored} new ones stored")


async def main() -> None:
    kv_caches = {f"layers.{i}": torch.randn(2, 64, BLOCK_SIZE, 4, 64, device=device) for i in range(2)}
    async with KVortexEngine.create(KVortexConfig(pool=64 << 20)) as engine:
        engine.register_kv_caches(kv_caches, block_size=BLOCK_SIZE)
        await serve(engine, "first request", list(range(2 * BLOCK_SIZE)), 0)
        async with asyncio.TaskGroup() as group:
            for number in range(1, 4):
                question = list(range(number * 500, number * 500 + 2 * BLOCK_SIZE))
                group.create_task(serve(engine, f"request {number}", question, 10 * number))
        print(f"hit rate of what was asked for: {engine.get_stats().hit_rate:.0%}")


asyncio.run(main())
