"""Hundreds of seeds of tiers behind each other; that a seed repeats itself; and that a wrong chain is found out."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvortex.tiering import chain
from kvortex.tiering.chain import ChainTier
from kvortex.tiering.chain_parts import ChainRead, ChainWrite, unread
from kvortex.tiers import Cause, WriteOutcome
from kvortex.tiers.base import as_bytes
from tests.simulation.chain_world import ChainWorld
from tests.simulation.seeds import repeats_itself, run_seeds, run_side_by_side

SEEDS = 400
FEWEST = {
    "cancelled": 350,
    "closed in the middle": 40,
    "corrupt": 200,
    "deleted": 1500,
    "found": 800,
    "hit": 4000,
    "miss corrupt": 25,
    "miss deadline": 900,
    "miss never_stored": 5000,
    "miss transfer_failed": 300,
    "read at rest": 550,
    "stolen": 1000,
    "touched": 4500,
    "write already_stored": 1500,
    "write failed": 900,
    "write no_space": 90,
    "write stored": 6000,
}
"""What must happen in so many seeds, or they say nothing of it: about half of what does."""


@pytest.mark.slow
def test_many_seeds() -> None:
    tally, failures = run_side_by_side(ChainWorld, range(SEEDS), jobs=2)
    assert not failures, failures[0]
    assert {name: (tally[name], least) for name, least in FEWEST.items() if tally[name] < least} == {}


def test_a_seed_repeats_itself() -> None:
    assert repeats_itself(ChainWorld, [3, 4, 5], hash_seeds=["1", "2"])


# What follows breaks the chain, in the ways in which it could break, and wants to be told of it.

Patch = Callable[[pytest.MonkeyPatch], None]


def a_write_ends_with_the_first_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChainWrite, "settled", lambda self, position, outcome: self.end(outcome))


def a_late_read_gives_its_buffer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChainRead, "give_up", lambda self, cause: self.end(unread(cause)))


def blocks_are_settled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChainRead, "end", lambda self, outcome: self.request.settle(outcome))


class Same(np.ndarray[Any, Any]):
    def copy(self, order: Any = "C") -> Any:
        return self


def copies_are_made_of_the_callers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "as_bytes", lambda buffer: as_bytes(buffer).view(Same))


def deleted_blocks_stay_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def delete(self: ChainTier, keys: Sequence[bytes], *, deadline_s: float | None = None) -> list[bool]:
        return await self.links[0].guard.delete(keys) or [False] * len(keys)

    monkeypatch.setattr(ChainTier, "delete", delete)


def a_late_write_counts_as_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    write = ChainTier.write

    async def settled(self: ChainTier, requests: Any, **named: Any) -> list[WriteOutcome]:
        outcomes = await write(self, requests, **named)
        return [WriteOutcome(one.outcome, one.cause or Cause.DEADLINE) for one in outcomes]

    monkeypatch.setattr(ChainTier, "write", settled)


def only_the_first_tier_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reads_of = ChainTier._reads_of

    def first(self: ChainTier, requests: Any) -> list[ChainRead]:
        reads = reads_of(self, requests)
        for read in reads:
            read.links = [link for link in read.links if link is self.links[0]]
        return reads

    monkeypatch.setattr(ChainTier, "_reads_of", first)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (a_write_ends_with_the_first_tier, "given back"),
        (a_late_read_gives_its_buffer_back, "given back"),
        (blocks_are_settled_again, "settled twice|what was settled"),
        (copies_are_made_of_the_callers_memory, "given back"),
        (deleted_blocks_stay_behind, "a deleted block is still in a tier"),
        (a_late_write_counts_as_settled, "what was settled is"),
        (only_the_first_tier_is_read, "do not give a block back"),
    ],
)
def test_a_broken_chain_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: Patch, complaint: str) -> None:
    broken(monkeypatch)
    _, failures = run_seeds(ChainWorld, range(60), keep_going=False)
    assert failures, "nobody has noticed"
    assert re.search(complaint, failures[0]), failures[0]
