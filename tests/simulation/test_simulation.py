"""Thousands of seeds; that a seed repeats itself; and that a wrong engine is found out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex.engine.leases import Leases
from kvortex.planes.control import ControlPlane
from kvortex.tiering import LoadFetch
from kvortex.tiering.fetches import Fetches
from kvortex.tiering.write_behind import WriteBehind
from kvortex.types import MissReason
from tests.simulation.seeds import repeats_itself, run_seeds, run_side_by_side, trace_of
from tests.simulation.world import World

SEEDS = 1000
FEWEST = {
    "cancelled flush": 25,
    "cancelled invalidate": 50,
    "cancelled load": 250,
    "cancelled prefetch": 100,
    "cancelled save": 250,
    "clear True": 150,
    "demoted_blocks": 500,
    "evicted": 5000,
    "failed_writes": 250,
    "fetched_blocks": 1000,
    "invalidate True": 500,
    "leased": 1000,
    "load corrupt": 50,
    "load deadline": 500,
    "load hit": 5000,
    "load invalidated": 25,
    "load pending": 250,
    "load too_lossy": 10,
    "load transfer_failed": 100,
    "only in the tier at the end": 100,
    "save failed": 250,
    "save no_space": 25,
    "save pending": 250,
    "shed_blocks": 1000,
    "shutdown in the middle": 100,
    "stolen": 250,
    "written_blocks": 2500,
}
"""What must happen in so many seeds, or they say nothing of it: about half of what does."""


@pytest.mark.slow
def test_many_seeds() -> None:
    tally, failures = run_side_by_side(World, range(SEEDS), jobs=2)
    assert not failures, failures[0]
    assert {name: (tally[name], least) for name, least in FEWEST.items() if tally[name] < least} == {}


def test_a_seed_repeats_itself() -> None:
    assert repeats_itself(World, [3, 4, 5, 6], hash_seeds=["1", "2"])


def test_seeds_differ() -> None:
    assert trace_of(World, 3) != trace_of(World, 4)


# What follows breaks the engine, in the ways in which it could break, and wants to be told of it.

Patch = Callable[[pytest.MonkeyPatch], None]


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def fetch_is_visible_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_fetch = ControlPlane.plan_fetch

    def plan_and_commit(self: ControlPlane, *args: Any, **named: Any) -> Any:
        plan = plan_fetch(self, *args, **named)
        for slot, offset, form in zip(plan.slots, plan.offsets, plan.forms, strict=True):
            self.finish_fetch(int(slot), int(offset), int(form), 0)
        return plan

    monkeypatch.setattr(ControlPlane, "plan_fetch", plan_and_commit)


def written_blocks_stay_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlPlane, "release", nothing)


def an_abandoned_fetch_keeps_its_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    def abandon(self: ControlPlane, slot: int, offset: int, reason: Any) -> None:
        self.index.abort(np.array([slot]), reason)

    monkeypatch.setattr(ControlPlane, "abandon_fetch", abandon)


def evicted_blocks_are_freed_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def evict(self: ControlPlane, nbytes: int, on_evicted: Any = None) -> int:
        if nbytes <= 0:
            return 0
        evicted = self.index.evict(nbytes)
        if on_evicted is not None and evicted.offsets.size:
            on_evicted(evicted)
        self.allocator.free_many(evicted.offsets)
        return int(evicted.offsets.size)

    monkeypatch.setattr(ControlPlane, "_evict", evict)


def late_blocks_are_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadFetch, "name_misses", lambda self, outcomes: outcomes)


def what_is_wrong_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    finish_load = ControlPlane.finish_load
    monkeypatch.setattr(
        ControlPlane,
        "finish_load",
        lambda self, plan, intact=None, succeeded=None: finish_load(self, plan, None, succeeded),
    )


def nobody_is_told_that_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetches, "_stop_waiting_for", nothing)


def writes_are_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    count_write = WriteBehind._count_write

    def twice(self: WriteBehind, outcome: Any) -> None:
        count_write(self, outcome)
        count_write(self, outcome)

    monkeypatch.setattr(WriteBehind, "_count_write", twice)


def what_is_on_its_way_is_not_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def withdraw(self: WriteBehind, keys: Any = None) -> bool:
        return True

    monkeypatch.setattr(WriteBehind, "withdraw", withdraw)


def what_is_being_stored_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def invalidate(self: ControlPlane, keys: Any) -> None:
        self._remove(self.index.drop_keys(keys, MissReason.INVALIDATED))

    monkeypatch.setattr(ControlPlane, "invalidate", invalidate)


def leases_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Leases.pin

    def pin_nothing(self: Leases, hashes: Any, ttl_s: float) -> Any:
        lease = pin(self, hashes, ttl_s)
        self._control.release(lease._slots)
        lease._slots = lease._slots[:0]
        return lease

    monkeypatch.setattr(Leases, "pin", pin_nothing)


@pytest.mark.leaves_extents
@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (fetch_is_visible_at_once, "visible"),
        (written_blocks_stay_pinned, "pins"),
        (an_abandoned_fetch_keeps_its_extent, "extents are allocated"),
        (evicted_blocks_are_freed_before_they_are_written, "evicted|touches|allocated"),
        (late_blocks_are_pending, "on its way when the deadline passed"),
        (what_is_wrong_is_loaded, "wrong bytes|can still be loaded"),
        (nobody_is_told_that_nothing_comes, "come to an end|waits for"),
        (writes_are_counted_twice, "counted"),
        (what_is_on_its_way_is_not_withdrawn, "forgotten blocks are still in the tier"),
        (what_is_being_stored_is_not_forgotten, "forgotten while it was being stored"),
        (leases_keep_nothing, "have left the pool"),
    ],
)
def test_a_broken_engine_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: Patch, complaint: str) -> None:
    broken(monkeypatch)
    _, failures = run_seeds(World, range(200))
    assert failures, "200 seeds see nothing wrong"
    assert any(words in failures[0] for words in complaint.split("|")), failures[0]
    assert "replay: python -m tests.simulation.run --seed" in failures[0]
