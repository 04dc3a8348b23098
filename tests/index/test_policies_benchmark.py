"""The comparison of policies: its optimum is one, and no policy beats it."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.config import EVICTION_POLICIES


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "policies.py"
    spec = importlib.util.spec_from_file_location("policies_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load()


def prompts_of(chains: list[tuple[int, ...]]) -> list[object]:
    """Prompts whose blocks are nodes of a tree, each with its next use."""
    following: dict[int, int] = {}
    prompts = []
    for number in reversed(range(len(chains))):
        chain = chains[number]
        next_use = np.array([following.get(name, benchmark.NEVER) for name in chain], np.int64)
        following.update(dict.fromkeys(chain, number))
        prompts.append(benchmark.Prompt(np.array(chain, np.int64), next_use, len(chain) * benchmark.BLOCK_TOKENS))
    return prompts[::-1]


def most_hits(chains: list[tuple[int, ...]], room: int) -> int:
    """By trying every set of blocks that could be kept after every request."""
    best = {frozenset[int](): 0}
    for chain in chains:
        after: dict[frozenset[int], int] = {}
        for cached, hits in best.items():
            found = len(list(itertools.takewhile(cached.__contains__, chain)))
            at_hand = sorted(cached | set(chain))
            for kept in itertools.combinations(at_hand, min(room, len(at_hand))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits + found)
        best = after
    return max(best.values())


@settings(max_examples=100)
@given(
    parents=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    leaves=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    room=st.integers(1, 4),
)
def test_the_optimum_is_the_most_that_any_cache_could_find(parents: list[int], leaves: list[int], room: int) -> None:
    chains = []
    for leaf in leaves:
        chain = [leaf]
        while chain[0]:
            chain.insert(0, min(parents[chain[0] - 1], chain[0] - 1))
        chains.append(tuple(chain))
    prompts, size_gib = prompts_of(chains), room * benchmark.BLOCK_BYTES / 2**30
    blocks = sum(len(chain) for chain in chains)

    def hits(name: str) -> int:
        return round(benchmark.simulate(name, prompts, size_gib, lambda: None).block_hit_rate * blocks)

    optimum = hits(benchmark.OPTIMUM)
    assert optimum == most_hits(chains, room)
    assert all(hits(name) <= optimum for name in EVICTION_POLICIES)


def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["policies.py", "--requests", "40", "--sizes", "1", "64", "--json"])
    benchmark.main()
    report = json.loads(capsys.readouterr().out)
    rates = {(r["policy"], r["size_gib"]): r["token_hit_rate"] for r in report["results"]}
    assert report["requests"] == 40
    assert {name for name, _ in rates} == {*EVICTION_POLICIES, benchmark.OPTIMUM}
    for name, _ in rates:
        assert rates[name, 1.0] <= rates[name, 64.0] <= rates[benchmark.OPTIMUM, 64.0]
    assert rates["lru", 64.0] > 0
