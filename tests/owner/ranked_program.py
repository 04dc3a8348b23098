"""An engine with a part of a shared pool, in a process of its own. For each line of its input it prints one of JSON.

`save SALT COUNT` saves a chain and prints how many of its blocks can be loaded; `load SALT COUNT` prints how many were
loaded with the right bytes; `figures` prints those of the pool.

    python -m tests.owner.ranked_program SOCKET MODEL PRIORITY QUOTA
"""

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from kvortex import KVortexEngine
from tests.engine_support import BLOCK_SIZE, chain, contents, make_cache, wipe
from tests.owner.client_program import config_of


async def main(socket: str, model: str, priority: str, quota: str) -> None:
    given = {name: json.loads(text) for name, text in (("priority", priority), ("quota", quota))}
    config = config_of(socket).replace(owner=given, identity={"model": model})
    cache = make_cache()
    async with KVortexEngine.create(config) as engine:
        engine.register_kv_caches(cache, BLOCK_SIZE)
        print(json.dumps("ready"), flush=True)  # noqa: T201
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, *numbers = line.split()
            print(json.dumps(await done(engine, cache, what, *map(int, numbers))), flush=True)  # noqa: T201


async def done(engine: KVortexEngine, cache: dict[str, Any], what: str, salt: int = 0, count: int = 1) -> Any:
    if what == "figures":
        return asdict(engine.get_stats().pools[0])
    model, ids = make_cache(count, seed=salt), range(count)
    if what == "save":
        for name, layer in cache.items():
            layer[:, :count] = model[name]
        return sum(outcome.is_stored for outcome in (await engine.save_blocks(chain(count, salt), ids)).outcomes)
    wipe(cache, ids)
    outcomes = (await engine.load_blocks(chain(count, salt), ids)).outcomes
    pairs = zip(outcomes, contents(cache, ids), contents(model, ids), strict=True)
    return sum(outcome is None and found == meant for outcome, found, meant in pairs)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
