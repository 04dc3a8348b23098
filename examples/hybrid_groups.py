"""A model that mixes kinds of KV: full attention, a sliding window and a state. Save, match, load what is needed."""

import asyncio

import torch

from kvortex import KVortexConfig, KVortexEngine, hash_blocks
from kvortex.groups import KVGroup, KVKind

BLOCK_SIZE = 16  # tokens of a block, and of a block hash
NUM_TOKENS = 192
GROUPS = (
    KVGroup("full", ("layers.0",), BLOCK_SIZE),
    KVGroup(
        "window", ("layers.1",), BLOCK_SIZE, KVKind.WINDOW, reach=40
    ),  # a query sees itself and 39 tokens before it
    KVGroup("state", ("layers.2",), 64, KVKind.STATE),  # a snapshot every 64 tokens
)
device = "cuda" if torch.cuda.is_available() else "cpu"


async def main() -> None:
    kv_caches = {
        "layers.0": torch.randn(2, 64, BLOCK_SIZE, 4, 64, device=device),  # K and V, blocks, tokens, heads, head size
        "layers.1": torch.randn(2, 64, BLOCK_SIZE, 4, 64, device=device),
        "layers.2": torch.randn(16, 4, 64, 64, device=device),  # snapshots, heads, and a matrix for each
    }
    async with KVortexEngine.create(KVortexConfig(pool=64 << 20)) as engine:
        engine.register_kv_caches(kv_caches, BLOCK_SIZE, groups=GROUPS)
        hashes = hash_blocks(range(NUM_TOKENS), BLOCK_SIZE)

        # The request has all blocks of full attention, those of the window's last 64 tokens, and three snapshots.
        window = [-1] * 8 + list(range(4))
        saved = await engine.save_blocks(hashes, {"full": range(12), "window": window, "state": range(3)})
        print("saved:", saved.counts())

        # A request with the same tokens and some more: how far can it resume, and what does it need for that?
        longer = hash_blocks(range(NUM_TOKENS + 64), BLOCK_SIZE)
        match = engine.match_request(longer)
        print("found:", match.num_tokens, "tokens; missing further on:", match.missing)
        into: dict[str, list[int]] = {}
        for group in GROUPS:
            first = 12 if group.name == "state" else 32  # of the free blocks that this request gets
            into[group.name] = [-1] * (len(longer) * BLOCK_SIZE // group.block_size)
            for block in group.needed(match.num_tokens):
                into[group.name][block] = first + block
        print("needed:", {name: sum(b >= 0 for b in ids) for name, ids in into.items()}, "blocks")

        loaded = await engine.load_blocks(longer, into)
        print("loaded:", loaded.num_loaded, "of", len(loaded.outcomes))
        full, window_kv, state = kv_caches.values()
        intact = torch.equal(full[:, 32:44], full[:, :12]) and torch.equal(state[14], state[2])
        intact = intact and torch.equal(window_kv[:, 41:44], window_kv[:, 1:4])
        print("bytes intact:", intact)


asyncio.run(main())
