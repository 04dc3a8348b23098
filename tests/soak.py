"""Hosts under mixed load over shared tiers whose servers are killed and stopped all the time, for as long as one likes.

    python -m tests.soak [--minutes 30] [--restart-s 60] [--seed 0] [--json]

Each host is a process with an engine of its own, over one chain of tiers or another; two of them share the pool of an
owner. Its clients load random prompts, compare every byte with what belongs to the prompt, "compute" and save what is
missing, cancel, prefetch and forget. Meanwhile servers are killed and started anew, or stand still for some seconds.

It fails if a byte is wrong, if a call takes longer than a minute, if a pool does not account to zero at the end, if the
memory of a host grows or descriptors are left, if a host loads nothing from its tiers, or if, when the servers are left
alone, some host does not find what the others have saved.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from kvortex import BlockHash, KVortexEngine, ModelIdentity
from kvortex.memory import ExtentAllocator
from tests.engine_support import BLOCK_SIZE, chain, small_config
from tests.owner.owner_support import read_line, spawn
from tests.tiers.redis_support import RedisServer
from tests.tiers.s3_support import Rclone, S3Server, keys_in_environment

PROMPTS, PROMPT_BLOCKS, CLIENTS = 60, 12, 4
ELEMENTS = 2 * BLOCK_SIZE * 2 * 16  # of a block in one layer
CALL_S = 60.0
"""Seconds that no call may take."""
MEET_S = 120.0
"""Seconds in which each host has to find what the others have saved, once the servers are left alone."""
GROWTH_BYTES, GROWTH_DESCRIPTORS = 64 << 20, 8
THINK_S = 0.04
"""Seconds between two calls of a client, at most: so that a short soak is no load for whatever runs beside it."""
STILL_S = 3.0
"""Seconds that a server stands still, or is not there."""
START_S, END_S = 120.0, 20.0


# -- a host --------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a host has seen. Memory: after a quarter of the time, and at its end; descriptors: before and after all."""

    calls: Counter[str] = field(default_factory=Counter)
    blocks_loaded: int = 0
    blocks_saved: int = 0
    blocks_fetched: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    resident_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def measure(self) -> None:
        """Take down how much memory this process has."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident_bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))


class Host:
    """One engine and its clients.

    Args:
        engine: the engine.
        number: of this host.
        count: of all hosts.
        seed: of what its clients do.
    """

    def __init__(self, engine: KVortexEngine, number: int, count: int, seed: int) -> None:
        self._engine = engine
        self._number = number
        self._count = count
        self._random = random.Random(f"{seed} {number}")
        self._cache = {f"layers.{i}": torch.zeros(2, CLIENTS * PROMPT_BLOCKS, BLOCK_SIZE, 2, 16) for i in range(2)}
        self._base = torch.arange(ELEMENTS, dtype=torch.float32).reshape(2, BLOCK_SIZE, 2, 16)
        self._prompts = [chain(PROMPT_BLOCKS, salt) for salt in range(PROMPTS + count)]
        self.tally = Tally()
        engine.register_kv_caches(self._cache, BLOCK_SIZE)

    def _content(self, prompt: int, block: int, layer: int) -> torch.Tensor:
        return self._base + ((prompt * PROMPT_BLOCKS + block) * 2 + layer) * ELEMENTS

    def _compute(self, prompt: int, blocks: Sequence[int], first_id: int) -> None:
        for block in blocks:
            for layer, pages in enumerate(self._cache.values()):
                pages[:, first_id + block] = self._content(prompt, block, layer)

    def _check(self, prompt: int, blocks: Sequence[int], first_id: int) -> None:
        for block in blocks:
            for layer, pages in enumerate(self._cache.values()):
                if not torch.equal(pages[:, first_id + block], self._content(prompt, block, layer)):
                    raise SystemExit(f"wrong bytes in block {block} of prompt {prompt}")

    async def serve(self, seconds: float) -> None:
        """Let all clients work for so long."""
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as clients:
            for client in range(CLIENTS):
                clients.create_task(self._work(client * PROMPT_BLOCKS, until_s))
            await asyncio.sleep(seconds / 4)
            self.tally.measure()
        self.tally.measure()
        tiering = self._engine.get_stats().tiering
        self.tally.blocks_fetched = tiering.fetched_blocks if tiering is not None else 0

    async def _work(self, first_id: int, until_s: float) -> None:
        dice, kinds = (
            self._random,
            {self._answer: 80, self._cancel: 8, self._prefetch: 6, self._forget: 3, self._look: 3},
        )
        while (began_s := time.monotonic()) < until_s:
            prompt, length = dice.randrange(PROMPTS), dice.randint(1, PROMPT_BLOCKS)
            (kind,) = dice.choices(list(kinds), list(kinds.values()))
            async with asyncio.timeout(CALL_S):
                await kind(prompt, self._prompts[prompt][:length], first_id)
            self.tally.calls[kind.__name__.strip("_")] += 1
            self.tally.longest_s = max(self.tally.longest_s, time.monotonic() - began_s)
            await asyncio.sleep(dice.random() * THINK_S)

    async def _answer(self, prompt: int, hashes: Sequence[BlockHash], first_id: int) -> None:
        """Load what is there, compute and save the rest: what a server does with a prompt."""
        for pages in self._cache.values():
            pages[:, first_id : first_id + len(hashes)] = float("nan")
        loaded = await self._engine.load_blocks(hashes, range(first_id, first_id + len(hashes)))
        there = [block for block, outcome in enumerate(loaded.outcomes) if outcome is None]
        missing = [block for block, outcome in enumerate(loaded.outcomes) if outcome is not None]
        self._check(prompt, there, first_id)
        self.tally.blocks_loaded += len(there)
        self.tally.misses.update(str(loaded.outcomes[block]) for block in missing)
        if missing:
            self._compute(prompt, missing, first_id)
            saved = await self._engine.save_blocks([hashes[b] for b in missing], [first_id + b for b in missing])
            self.tally.blocks_saved += saved.num_stored

    async def _cancel(self, prompt: int, hashes: Sequence[BlockHash], first_id: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.random() * 0.02):
                await self._answer(prompt, hashes, first_id)

    async def _prefetch(self, prompt: int, hashes: Sequence[BlockHash], first_id: int) -> None:
        await self._engine.prefetch(hashes)

    async def _forget(self, prompt: int, hashes: Sequence[BlockHash], first_id: int) -> None:
        await self._engine.invalidate(hashes)

    async def _look(self, prompt: int, hashes: Sequence[BlockHash], first_id: int) -> None:
        found = self._engine.match_prefix(hashes)
        if not 0 <= found <= len(hashes):
            raise SystemExit(f"a prefix of {found} of {len(hashes)} blocks")

    async def leave(self) -> None:
        """Save a prompt that the other hosts know nothing of, until all tiers take it."""
        mine = PROMPTS + self._number
        self._compute(mine, range(PROMPT_BLOCKS), 0)
        async with asyncio.timeout(MEET_S):
            while True:
                is_healthy = self._is_healthy()
                await self._engine.invalidate(self._prompts[mine])
                await self._engine.save_blocks(self._prompts[mine], range(PROMPT_BLOCKS))
                await self._engine.flush()
                if is_healthy and self._is_healthy():
                    return
                await asyncio.sleep(0.5)

    def _is_healthy(self) -> bool:
        """True if all tiers take blocks again; that they give them is for the others to find out."""
        tiering = self._engine.get_stats().tiering
        if tiering is None or not all(link.usable for link in tiering.links):
            return False
        return all(part.breakers["writes"].state == "closed" for part in (tiering, *tiering.links))

    async def meet(self) -> None:
        """Load what the other hosts have left."""
        async with asyncio.timeout(MEET_S):
            for other in range(PROMPTS, PROMPTS + self._count):
                while not (await self._engine.load_blocks(self._prompts[other], range(PROMPT_BLOCKS))).ok:
                    await asyncio.sleep(0.5)
                self._check(other, range(PROMPT_BLOCKS), 0)


async def run_host(order: Mapping[str, Any]) -> Tally:
    """One host from its start to its end, as its parent has ordered it. It says how far it is, and waits for a word."""
    loop = asyncio.get_running_loop()

    async def say(word: str) -> None:
        print(word, flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)

    before = num_descriptors()
    config = small_config(identity=ModelIdentity(model="soak", weights_revision="1"), **order["config"])
    async with KVortexEngine.create(config) as engine:
        host = Host(engine, order["number"], order["count"], order["seed"])
        await say("ready")
        await host.serve(order["seconds"])
        await say("served")
        await host.leave()
        await say("left")
        await host.meet()
    due_s = time.monotonic() + END_S  # connections of a store are closed by threads of its client
    while num_descriptors() > before + GROWTH_DESCRIPTORS and time.monotonic() < due_s:
        await asyncio.sleep(0.1)
    host.tally.descriptors = [before, num_descriptors()]
    return host.tally


def num_descriptors() -> int:
    """Descriptors that this process has."""
    return len(os.listdir("/proc/self/fd"))


def host_main(text: str) -> None:
    """The program of a host: prints its tally, as JSON."""
    allocators: list[ExtentAllocator] = []
    make = ExtentAllocator.__init__

    def remember(self: ExtentAllocator, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        allocators.append(self)

    ExtentAllocator.__init__ = remember  # type: ignore[method-assign]
    tally = asyncio.run(run_host(json.loads(text)))
    if leaks := [report for allocator in allocators if (report := allocator.leak_report())]:
        raise SystemExit(f"the pool does not account to zero: {leaks}")
    print(json.dumps(vars(tally)), flush=True)


# -- servers and hosts ---------------------------------------------------------------------------------


class Server(Protocol):
    """What is done to a server of a tier."""

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    def go_on(self) -> None: ...


def harm(server: Server, kind: str) -> None:
    """Do something bad to a server, and let it serve again."""
    if kind == "killed":
        server.kill()
        time.sleep(STILL_S)
        server.start()
    else:
        server.stop()
        time.sleep(STILL_S)
        server.go_on()


class Fleet:
    """All processes of a run, in a directory of their own.

    Args:
        directory: for disks and sockets.
        redis, bucket: the servers that all hosts share.
        seconds: of the load.
        seed: of all dice.
    """

    def __init__(self, directory: Path, redis: RedisServer, bucket: S3Server, seconds: float, seed: int) -> None:
        self._exits = contextlib.ExitStack()
        url, behind = (text.replace("timeout_s=20", "timeout_s=2") for text in (redis.url(), bucket.url()))
        socket = directory / "kv.sock"
        disks = [f"disk://{directory / name}?capacity_bytes=4MiB" for name in "ab"]
        owner = ["-m", "kvortex", "serve", "--pool", "4MiB", "--socket", str(socket), "--json"]
        self.owner = self._spawn([*owner, "--tier", disks[0], "--tier", url, "--tier", behind])
        read_line(self.owner)
        configs: list[dict[str, Any]] = [
            {"tier": [url, behind]},
            {"tier": [disks[1], behind]},
            {"owner": {"socket": str(socket), "deadline_s": CALL_S}},
            {"owner": {"socket": str(socket), "deadline_s": CALL_S}},
        ]
        self.hosts = []
        for number, config in enumerate(configs):
            order = {"number": number, "count": len(configs), "seed": seed, "seconds": seconds, "config": config}
            self.hosts.append(self._spawn(["-m", "tests.soak", "--host", json.dumps(order)]))

    def _spawn(self, arguments: list[str]) -> "subprocess.Popen[str]":
        process = spawn(arguments)
        self._exits.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: "subprocess.Popen[str]") -> None:
        process.kill()
        process.communicate()

    def await_all(self, word: str) -> None:
        """Wait until every host has said a word; then let all go on."""
        for host in self.hosts:
            if (said := read_line(host).strip()) != word:
                raise SystemExit(f"a host says {said!r} instead of {word!r}")
        for host in self.hosts:
            assert host.stdin is not None
            print(file=host.stdin, flush=True)

    def tallies(self) -> list[dict[str, Any]]:
        """What the hosts have seen, when all have ended; the owner ends as well."""
        found = [json.loads(read_line(host)) for host in self.hosts]
        for process, what in [*((host, "a host") for host in self.hosts), (self.owner, "the owner")]:
            if process is self.owner:
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=START_S)
            if process.returncode:
                raise SystemExit(f"{what} ended with {process.returncode}: {errors[-4000:]}")
        return found

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()


@contextlib.contextmanager
def running(seconds: float, seed: int) -> Iterator[tuple[Fleet, list[Server]]]:
    """Servers, and hosts over them."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvortex-soak-")))
        redis = stack.enter_context(RedisServer("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru"))
        stack.enter_context(keys_in_environment())
        bucket = stack.enter_context(Rclone())
        yield stack.enter_context(Fleet(directory, redis, bucket, seconds, seed)), [redis, bucket]


def soak(seconds: float, restart_s: float, seed: int) -> dict[str, Any]:
    """Run it.

    Returns:
        How often servers were harmed, and what each host has seen.

    Raises:
        SystemExit: something is not as it must be.
    """
    dice, harmed = random.Random(seed), Counter[str]()
    with running(seconds, seed) as (fleet, servers):
        fleet.await_all("ready")
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > restart_s:
            time.sleep(restart_s)
            kind = dice.choice(("killed", "stopped"))
            harm(dice.choice(servers), kind)
            harmed[kind] += 1
            print(f"{left_s - restart_s:5.0f} s left; servers harmed: {dict(harmed)}", file=sys.stderr, flush=True)
        for word in ("served", "left"):
            fleet.await_all(word)
        tallies = fleet.tallies()
    for tally in tallies:
        judge(tally)
    return {"seconds": seconds, "harmed": dict(harmed), "hosts": tallies}


def judge(tally: Mapping[str, Any]) -> None:
    """Fail for what a host has seen.

    Raises:
        SystemExit: it grows, or has loaded nothing from its tiers.
    """
    for name, most in (("resident_bytes", GROWTH_BYTES), ("descriptors", GROWTH_DESCRIPTORS)):
        before, after = tally[name]
        if after - before > most:
            raise SystemExit(f"{name} of a host grew from {before} to {after}: {tally}")
    if not tally["blocks_loaded"] or not tally["blocks_fetched"]:
        raise SystemExit(f"nothing came from the tiers: {tally}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (30)")
    parser.add_argument("--restart-s", type=float, default=60.0, help="seconds between two harms (60)")
    parser.add_argument("--seed", type=int, default=0, help="of all dice (0)")
    parser.add_argument("--json", action="store_true", help="print the tallies as JSON")
    parser.add_argument("--host", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.host is not None:
        host_main(arguments.host)
        return 0
    found = soak(arguments.minutes * 60, arguments.restart_s, arguments.seed)
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(f"{found['seconds']:.0f} s of load, servers harmed: {found['harmed']}")
    for number, tally in enumerate(found["hosts"]):
        before, after = (nbytes >> 20 for nbytes in tally["resident_bytes"])
        print(
            f"host {number}: {sum(tally['calls'].values())} calls, the longest {tally['longest_s']:.1f} s; blocks: "
            f"{tally['blocks_loaded']} loaded, {tally['blocks_saved']} saved, {tally['blocks_fetched']} fetched; "
            f"{before} -> {after} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
