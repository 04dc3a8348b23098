"""Clients that are killed: for each line of its input, this program forks one and prints its process id.

A line names what the client does: `hold` saves blocks, and the transfer never ends; `leave` takes memory, and closes
its connection; `churn SEED` saves and loads chains until it is killed.

    python -m tests.owner.client_program SOCKET
"""

import asyncio
import os
import random
import sys

from kvortex import KVortexConfig, KVortexEngine
from kvortex.owner import OwnerClient
from kvortex.owner.protocol import Kind, numbers
from kvortex.testing import Fault, FaultInjectingExecutor
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, Parts, chain, contents, make_cache, wipe

NUM_CHAINS = 12
CHAIN_BLOCKS = 8


def config_of(socket: str, deadline_s: float = 5.0) -> KVortexConfig:
    return KVortexConfig(
        owner={"socket": socket, "deadline_s": deadline_s},
        identity={"model": "m"},
        transfer={"max_batch_bytes": 4 * BLOCK_NBYTES, "linger_s": 0.0, "self_test": False},
    )


class Churn:
    """Saves and loads chains, whose bytes follow from their numbers, over one engine."""

    def __init__(self, engine: KVortexEngine, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._models = [make_cache(CHAIN_BLOCKS, seed=number) for number in range(NUM_CHAINS)]
        self._cache = make_cache(2 * CHAIN_BLOCKS)
        engine.register_kv_caches(self._cache, BLOCK_SIZE)
        self.num_loaded = 0

    async def step(self) -> None:
        number = self._random.randrange(NUM_CHAINS)
        model, hashes = self._models[number], chain(CHAIN_BLOCKS, number)
        for name, layer in self._cache.items():
            layer[:, :CHAIN_BLOCKS] = model[name]
        await self._engine.save_blocks(hashes, range(CHAIN_BLOCKS))
        number = self._random.randrange(NUM_CHAINS)
        target = range(CHAIN_BLOCKS, 2 * CHAIN_BLOCKS)
        wipe(self._cache, target)
        result = await self._engine.load_blocks(chain(CHAIN_BLOCKS, number), target)
        expected, found = contents(self._models[number], range(CHAIN_BLOCKS)), contents(self._cache, target)
        for place, outcome in enumerate(result.outcomes):
            if outcome is None:
                self.num_loaded += 1
                assert found[place] == expected[place], "wrong bytes"


async def hold(socket: str) -> None:
    parts = Parts(wrap_executor=lambda inner: FaultInjectingExecutor(inner, lambda number, batch: Fault.HOLD))
    async with KVortexEngine.create(config_of(socket), parts) as engine:
        engine.register_kv_caches(make_cache(), BLOCK_SIZE)
        await engine.save_blocks(chain(12), range(12))


async def leave(socket: str) -> None:
    client = OwnerClient(socket, 5.0)
    client.ask(Kind.SCRATCH, numbers(BLOCK_NBYTES))
    client.close()
    await asyncio.sleep(600)


async def churn(socket: str, seed: int) -> None:
    async with KVortexEngine.create(config_of(socket)) as engine:
        work = Churn(engine, seed)
        while True:
            await work.step()


def main(socket: str) -> None:
    for line in sys.stdin:
        what, *seed = line.split()
        if pid := os.fork():
            print(pid, flush=True)  # noqa: T201
            continue
        try:
            asyncio.run({"hold": hold, "leave": leave}[what](socket) if not seed else churn(socket, int(seed[0])))
        finally:
            os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
