"""Many seeds, or one again: `python -m tests.simulation.run --seeds 100000`, `... --seed 17 --trace`."""

import argparse
import sys
import time
from collections import Counter

import numba

from tests.simulation.world import ViolationError, World


def run_seed(seed: int) -> World:
    """The seed's world when it has ended well. Raises `ViolationError`."""
    world = World(seed)
    world.run()
    return world


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="show every event, of a seed that ends well too")
    parser.add_argument("--keep-going", action="store_true", help="count failing seeds instead of stopping at one")
    options = parser.parse_args()
    numba.set_num_threads(1)
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    tally: Counter[str] = Counter()
    failed = []
    began_s = time.perf_counter()
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except ViolationError as error:
            failed.append(seed)
            say(str(error))
        tally.update(world.tally)
        if options.trace:
            for time_s, event in world.trace:
                say(f"{time_s:12.5f} {event}")
        if failed and not options.keep_going:
            break
    elapsed_s = time.perf_counter() - began_s
    say(f"{len(seeds)} seeds in {elapsed_s:.1f} s, {len(failed)} failed {failed[:20]}")
    for name, count in sorted(tally.items()):
        say(f"{count:10} {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
