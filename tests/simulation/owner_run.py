"""Runs many lives around an owner, or repeats one.

`python -m tests.simulation.owner_run --seeds 10000`, `... --seed 17 --trace`.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable

import numba

from tests.simulation.owner_world import OwnerWorld
from tests.simulation.run import say
from tests.simulation.world import ViolationError


def run_seeds(seeds: Iterable[int], *, keep_going: bool = False) -> tuple[Counter[str], list[str]]:
    """What has happened in them, and what was wrong; without `keep_going` they end with the first that fails."""
    numba.set_num_threads(1)  # blocks are tiny
    tally: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        world = OwnerWorld(seed)
        try:
            world.run()
        except ViolationError as error:
            failures.append(str(error))
        tally.update(world.tally)
        if failures and not keep_going:
            break
    return tally, failures


def replay(seed: int, *, trace: bool) -> int:
    """One seed again; 1 if it fails."""
    numba.set_num_threads(1)
    world = OwnerWorld(seed)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: show everything that happens")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that fails")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed, trace=options.trace)
    began_s = time.perf_counter()
    seeds = range(options.first, options.first + options.seeds)
    tally, failures = run_seeds(seeds, keep_going=options.keep_going)
    for failure in failures:
        say(failure)
    for name, count in sorted(tally.items()):
        say(f"{count:10} {name}")
    say(f"{len(seeds)} seeds in {time.perf_counter() - began_s:.1f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
