"""Runs many seeds of a simulation, or repeats one."""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numba

from tests.simulation.seeded_world import SeededWorld, ViolationError

CHUNK = 50  # seeds that a process takes at a time

MakeWorld = Callable[[int], SeededWorld]


def run_seeds(
    make_world: MakeWorld, seeds: Iterable[int], *, keep_going: bool = False
) -> tuple[Counter[str], list[str]]:
    """What has happened in them, and what was wrong; without `keep_going` they end with the first that fails."""
    numba.set_num_threads(1)  # of two cores, and blocks are tiny
    tally: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        world = make_world(seed)
        try:
            world.run()
        except ViolationError as error:
            failures.append(str(error))
        tally.update(world.tally)
        if failures and not keep_going:
            break
    return tally, failures


def run_side_by_side(
    make_world: MakeWorld,
    seeds: range,
    *,
    jobs: int,
    keep_going: bool = False,
    report: Callable[[str], None] | None = None,
) -> tuple[Counter[str], list[str]]:
    """`run_seeds` in several processes; `report` is told of each failure as it comes."""
    tally: Counter[str] = Counter()
    failures: list[str] = []
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for counts, wrong in pool.map(partial(run_seeds, make_world, keep_going=keep_going), chunks):
            tally.update(counts)
            failures += wrong
            for text in wrong if report is not None else ():
                report(text)
            if failures and not keep_going:
                pool.shutdown(cancel_futures=True)
                break
    return tally, failures


def trace_of(make_world: MakeWorld, seed: int) -> list[tuple[float, str]]:
    """What has happened in a seed, and when; a `ViolationError` if it fails."""
    world = make_world(seed)
    world.run()
    return world.trace


def repeats_itself(make_world: type[SeededWorld], seeds: list[int], hash_seeds: Iterable[str]) -> bool:
    """Whether the seeds end the same in this process and in others, whose sets are in another order."""
    first = [trace_of(make_world, seed) for seed in seeds]
    name, module = make_world.__name__, make_world.__module__
    program = (
        f"from {module} import {name}; from tests.simulation.seeds import trace_of; "
        f"print([trace_of({name}, seed) for seed in {seeds}])"
    )
    elsewhere = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in hash_seeds
    ]
    again = [trace_of(make_world, seed) for seed in seeds]
    return first == again and elsewhere == [str(first)] * len(elsewhere)


def main(make_world: MakeWorld, about: str | None) -> int:
    """The command line: 1 if a seed fails."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: show everything that happens")
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that fails")
    options = parser.parse_args()
    if options.seed is not None:
        return _replay(make_world(options.seed), trace=options.trace)
    began_s = time.perf_counter()
    seeds = range(options.first, options.first + options.seeds)
    tally, failures = run_side_by_side(make_world, seeds, jobs=options.jobs, keep_going=options.keep_going, report=_say)
    for name, count in sorted(tally.items()):
        _say(f"{count:10} {name}")
    _say(f"{len(seeds)} seeds in {time.perf_counter() - began_s:.1f} s, {len(failures)} failed")
    return 1 if failures else 0


def _replay(world: SeededWorld, *, trace: bool) -> int:
    numba.set_num_threads(1)
    try:
        world.run()
    except ViolationError as error:
        _say(str(error))
        return 1
    finally:
        for time_s, event in world.trace if trace else ():
            _say(f"{time_s:12.5f} {event}")
    _say(f"seed {world.seed} ends well")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
