"""Kill a process that saves at full speed, at a random moment, again and again; whatever is there afterwards is right.

python -m tests.tiers.crash [--rounds 2000] [--seed 0] [--path DIR] [--writers 2]

Every round forks writers over one directory, kills them after a random time, opens a tier there and reads every
block back against the oracle: the payload that follows from its key. A miss is fine, wrong bytes are not; nor is a
damaged frame (nothing is renamed before it is whole), a temporary file that survives the scan, or a block that a
writer had reported as stored and that is gone.

Half of the rounds have a server of Redis behind the directory: whatever it has after the kill is right as well.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvortex.testing.tier_conformance import NAMESPACE, is_right, key_of, read_request, write_request
from kvortex.tiering.chain import ChainTier
from kvortex.tiering.chain_parts import Takes
from kvortex.tiers import Cause, Tier, tier_from_url
from kvortex.tiers.payload import warm_up
from kvortex.types import SaveOutcome
from tests.tiers.disk_support import disk_tier, temp_files
from tests.tiers.redis_support import RedisServer

NUM_KEYS = 400
SIZES = (4096, 5000, 12288, 262144 + 64)
LONGEST_S = 0.12
ROOM = max(SIZES)


@dataclass
class Tally:
    """What the rounds have seen."""

    rounds: int = 0
    hits: int = 0
    hits_behind: int = 0
    misses: int = 0
    reported: int = 0
    temps_left_by_the_dead: int = 0
    causes: dict[str, int] = field(default_factory=dict)


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def chained(disk: Tier, behind: str) -> Tier:
    """The disk tier, with the tier of a URL behind it if there is one."""
    if not behind:
        return disk
    return ChainTier([(disk, Takes.ALWAYS), (tier_from_url(behind, NAMESPACE), Takes.ALWAYS)], timeout_s=10.0)


async def save_for_ever(root: Path, behind: str, seed: int, reports: int) -> None:
    """Write and delete at random; say on `reports` what is stored, one line each, in one system call."""
    rng = random.Random(seed)
    disk = disk_tier(root, write_threads=4, rescan_interval_s=0.05, fsync=seed % 3 == 0)
    async with chained(disk, behind) as tier:
        while True:
            numbers = rng.sample(range(NUM_KEYS), 16)
            if rng.random() < 0.3:
                os.write(reports, "".join(f"-{n}\n" for n in numbers).encode())
                await tier.delete([key_of(n) for n in numbers])
            outcomes = await tier.write([write_request(n, size_of(n)) for n in numbers])
            stored = [n for n, o in zip(numbers, outcomes, strict=True) if o.outcome is SaveOutcome.STORED]
            os.write(reports, "".join(f"+{n}\n" for n in stored).encode())


def fork_writer(root: Path, behind: str, seed: int, reports: Path) -> int:
    """A child that writes until it is killed. The parent has no other threads when this is called."""
    pid = os.fork()
    if pid:
        return pid
    try:
        fd = os.open(reports, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        asyncio.run(save_for_ever(root, behind, seed, fd))
    finally:
        os._exit(1)


def wait_for_any(reports: list[Path]) -> None:
    """Until a writer has written something, however slow the machine."""
    give_up = time.monotonic() + 30
    while not any(report.exists() and report.stat().st_size for report in reports):
        if time.monotonic() > give_up:
            raise SystemExit("no writer came to write anything")
        time.sleep(0.001)


def certainly_stored(reports: list[Path]) -> set[int]:
    """Blocks that a writer reported and nobody began to delete, ever: they must be there."""
    stored: set[int] = set()
    deleted: set[int] = set()
    for report in reports:
        for line in report.read_text().splitlines() if report.exists() else ():
            (stored if line[0] == "+" else deleted).add(int(line[1:]))
    return stored - deleted


async def verify_behind(behind: str, tally: Tally) -> None:
    """Read everything back from the tier behind the directory.

    Raises:
        SystemExit: something is not as it must be.
    """
    async with tier_from_url(behind, NAMESPACE) as tier:
        requests = [read_request(n, ROOM) for n in range(NUM_KEYS)]
        for number, (request, outcome) in enumerate(zip(requests, await tier.read(requests), strict=True)):
            if outcome.reason is None:
                if outcome.payload_bytes != size_of(number) or not is_right(request, outcome):
                    raise SystemExit(f"wrong bytes for block {number} in the {tier.name} tier")
                tally.hits_behind += 1
            elif outcome.cause is not Cause.ABSENT:
                raise SystemExit(f"block {number} in the {tier.name} tier: {outcome}")


async def verify(root: Path, reports: list[Path], tally: Tally) -> None:
    """Read everything back.

    Raises:
        SystemExit: something is not as it must be.
    """
    tally.temps_left_by_the_dead += len(temp_files(root))
    async with disk_tier(root) as tier:
        await tier.scanned()
        if left := temp_files(root):
            raise SystemExit(f"temporary files survive the scan: {left}")
        requests = [read_request(n, ROOM) for n in range(NUM_KEYS)]
        outcomes = await tier.read(requests)
        for number, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
            if outcome.reason is None:
                if outcome.payload_bytes != size_of(number) or not is_right(request, outcome):
                    raise SystemExit(f"wrong bytes for block {number}")
                tally.hits += 1
            else:
                tally.misses += 1
                tally.causes[str(outcome.cause)] = tally.causes.get(str(outcome.cause), 0) + 1
        present = {n for n, outcome in enumerate(outcomes) if outcome.reason is None}
        # A kill loses what the process held, not what the system has: only a crash of the machine could.
        if lost := certainly_stored(reports) - present:
            raise SystemExit(f"reported as stored, but gone: {sorted(lost)}")
        if Cause.CORRUPT in tally.causes:
            raise SystemExit("a damaged frame got its name")
        tally.reported += len(certainly_stored(reports))


def play(path: Path, server: RedisServer, rounds: int, seed: int, writers: int) -> Tally:
    """All rounds; the directory is emptied now and then, so that writers always find work."""
    rng = random.Random(seed)
    tally = Tally()
    warm_up()
    for number in range(rounds):
        root = path / f"tier{number // 5}"
        reports = [path / f"report{number // 5}-{number % 5}-{w}" for w in range(writers)]
        earlier = sorted(path.glob(f"report{number // 5}-*"))
        behind = server.url() if number // 5 % 2 else ""
        pids = [fork_writer(root, behind, rng.randrange(1 << 30), report) for report in reports]
        if rng.random() < 0.75:  # the others are killed while they start
            wait_for_any(reports)
        time.sleep(rng.random() * LONGEST_S)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        tally.rounds += 1
        asyncio.run(verify(root, [*earlier, *reports], tally))
        if behind:
            asyncio.run(verify_behind(behind, tally))
        if number % 5 == 4:
            shutil.rmtree(root)
            server.ask("FLUSHALL")
            for report in path.glob("report*"):
                report.unlink()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--path", help="a directory on the file system to test; default: the system's temporary one")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvortex-crash-", dir=arguments.path)))
        server = stack.enter_context(RedisServer())
        tally = play(path, server, arguments.rounds, arguments.seed, arguments.writers)
    sys.stdout.write(json.dumps(asdict(tally)) + "\n")


if __name__ == "__main__":
    main()
