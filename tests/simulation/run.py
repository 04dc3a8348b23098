"""Runs many seeds, or repeats one: `python -m tests.simulation.run --seeds 100000`, `... --seed 17 --trace`."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numba

from tests.simulation.world import ViolationError, World

CHUNK = 50  # seeds that a process takes at a time


def run_seeds(seeds: Iterable[int], *, keep_going: bool = False) -> tuple[Counter[str], list[str]]:
    """What has happened in them, and what was wrong; without `keep_going` they end with the first that fails."""
    numba.set_num_threads(1)  # of two cores, and blocks are tiny
    tally: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except ViolationError as error:
            failures.append(str(error))
        tally.update(world.tally)
        if failures and not keep_going:
            break
    return tally, failures


def run_side_by_side(
    seeds: range, *, jobs: int, keep_going: bool = False, report: Callable[[str], None] | None = None
) -> tuple[Counter[str], list[str]]:
    """`run_seeds` in several processes; `report` is told of each failure as it comes."""
    tally: Counter[str] = Counter()
    failures: list[str] = []
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for counts, wrong in pool.map(partial(run_seeds, keep_going=keep_going), chunks):
            tally.update(counts)
            failures += wrong
            for text in wrong if report is not None else ():
                report(text)
            if failures and not keep_going:
                pool.shutdown(cancel_futures=True)
                break
    return tally, failures


def replay(seed: int, *, trace: bool) -> int:
    """One seed again; 1 if it fails."""
    numba.set_num_threads(1)
    world = World(seed)
    try:
        world.run()
    except ViolationError as error:
        say(str(error))
        return 1
    finally:
        for time_s, event in world.trace if trace else ():
            say(f"{time_s:12.5f} {event}")
    say(f"seed {seed} ends well")
    return 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: show everything that happens")
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that fails")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed, trace=options.trace)
    began_s = time.perf_counter()
    seeds = range(options.first, options.first + options.seeds)
    tally, failures = run_side_by_side(seeds, jobs=options.jobs, keep_going=options.keep_going, report=say)
    for name, count in sorted(tally.items()):
        say(f"{count:10} {name}")
    say(f"{len(seeds)} seeds in {time.perf_counter() - began_s:.1f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
