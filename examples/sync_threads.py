"""The blocking API: an engine on a thread of its own, used from two other threads."""

import threading

import torch

from kvortex import KVortexConfig, KVortexEngine, hash_blocks

BLOCK_SIZE = 16
device = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    kv_caches = {f"layers.{i}": torch.randn(2, 64, BLOCK_SIZE, 4, 64, device=device) for i in range(2)}
    with KVortexEngine.create_sync(KVortexConfig(pool=64 << 20)) as engine:
        engine.register_kv_caches(kv_caches, block_size=BLOCK_SIZE)

        def client(number: int) -> None:
            tokens = range(number * 1000, number * 1000 + 4 * BLOCK_SIZE)
            hashes = hash_blocks(tokens, BLOCK_SIZE)
            source, target = range(number * 8, number * 8 + 4), range(number * 8 + 4, number * 8 + 8)
            saved = engine.save_blocks(hashes, source, timeout_s=10)
            loaded = engine.load_blocks(hashes, target, timeout_s=10)
            print(f"thread {number}: {saved.num_stored} stored, {loaded.num_loaded} loaded")

        threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


main()
