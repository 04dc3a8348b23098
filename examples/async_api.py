"""The async API: save a request's KV blocks, lose them, load them back."""

import asyncio

import torch

from kvortex import KVortexConfig, KVortexEngine, hash_blocks

BLOCK_SIZE = 16
device = "cuda" if torch.cuda.is_available() else "cpu"


async def main() -> None:
    # A paged cache of two layers: [K and V, blocks, tokens a block, heads, head size].
    kv_caches = {f"layers.{i}": torch.randn(2, 64, BLOCK_SIZE, 4, 64, device=device) for i in range(2)}
    before = {name: layer[:, :8].clone() for name, layer in kv_caches.items()}
    async with KVortexEngine.create(KVortexConfig(pool=64 << 20)) as engine:
        engine.register_kv_caches(kv_caches, block_size=BLOCK_SIZE)
        hashes = hash_blocks(range(8 * BLOCK_SIZE), block_size=BLOCK_SIZE)

        saved = await engine.save_blocks(hashes, range(8))
        print("saved:", saved.counts())

        for layer in kv_caches.values():
            layer.zero_()
        loaded = await engine.load_blocks(hashes, range(8))
        print("loaded:", loaded.num_loaded, "of", len(hashes))

        intact = all(torch.equal(kv_caches[name][:, :8], before[name]) for name in kv_caches)
        print("bytes intact:", intact)
        print(engine.get_stats())


asyncio.run(main())
