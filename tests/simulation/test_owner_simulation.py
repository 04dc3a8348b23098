"""Hundreds of lives around an owner; that a seed repeats itself; and that a wrong owner or client is found out."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvortex.index.orders import EvictionOrders
from kvortex.memory import ExtentAllocator
from kvortex.owner import OwnerClient
from kvortex.owner import session as session_module
from kvortex.owner.control import _GENERATION, RemoteControl
from kvortex.owner.events import Watcher
from kvortex.owner.process import Process
from kvortex.owner.session import Session
from kvortex.planes.control import ControlPlane
from kvortex.tiering import Tiering
from tests.simulation import owner_player
from tests.simulation.owner_world import OwnerWorld
from tests.simulation.seeds import repeats_itself, run_seeds, run_side_by_side

SEEDS = max(400, int(os.environ.get("KVORTEX_HUNT_RUNS", "0")))
SEEDS_OF_BROKEN = 300
FEWEST = {
    "a question is lost": 160,
    "an answer is lost": 120,
    "connected again": 560,
    "deaths": 480,
    "evicted": 800,
    "evicted before a higher priority": 10,
    "evicted for a quota": 400,
    "fetches that wait": 160,
    "forget": 80,
    "forgotten for sure: False": 80,
    "forgotten for sure: True": 400,
    "load corrupt": 16,
    "load evicted": 400,
    "load hit": 2400,
    "load invalidated": 560,
    "load owner_lost": 2400,
    "load pending": 1200,
    "moved to another owner": 104,
    "owners that ended": 40,
    "owners that were killed": 40,
    "save no_space": 1600,
    "save pending": 1200,
    "save stored": 3200,
    "tests of memory": 280,
}
"""What must happen in 400 seeds, or they say nothing of it: about half of what does."""


@pytest.mark.slow
def test_many_seeds() -> None:
    tally, failures = run_side_by_side(OwnerWorld, range(SEEDS), jobs=2)
    assert not failures, failures[0]
    assert {name: (tally[name], least) for name, least in FEWEST.items() if tally[name] < least} == {}


def test_a_seed_repeats_itself() -> None:
    assert repeats_itself(OwnerWorld, [3, 4, 5, 6], hash_seeds=["1"])


# What follows breaks the owner or its clients, in the ways in which they could break, and wants to be told of it.

Patch = Callable[[pytest.MonkeyPatch], None]


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def what_a_dead_client_writes_to_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "may_write", lambda self, client, offsets, others: self._free(offsets))


def other_writers_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = Process.may_write
    monkeypatch.setattr(
        Process, "may_write", lambda self, client, offsets, others: may_write(self, client, offsets, [])
    )


def writers_are_named_on_the_first_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = RemoteControl._connected

    def without(self: RemoteControl, client: OwnerClient) -> None:
        self._writers = ()
        connected(self, client)

    monkeypatch.setattr(RemoteControl, "_connected", without)


def what_a_dead_client_was_saving_becomes_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Session.close

    def close_and_commit(self: Session) -> list[int]:
        slots = self._reserved.used("held")
        rows = self._reserved.rows[slots]
        control = self._control
        nbytes = control.extents[rows["form"]]
        digests = np.zeros(len(slots), dtype=np.uint64)
        control.allocator.free_many(control.index.commit(slots, rows["offset"], nbytes, digests, rows["form"]))
        self._reserved.rows["held"][slots] = False
        return close(self)

    monkeypatch.setattr(Session, "close", close_and_commit)


def what_a_dead_client_has_pinned_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Session.close

    def close_without_pins(self: Session) -> list[int]:
        self._pins = session_module.Table(session_module._PINNED)
        return close(self)

    monkeypatch.setattr(Session, "close", close_without_pins)


def readers_check_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_player, "is_intact", lambda digest, payload: True)


def slots_of_an_earlier_connection_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteControl, "_current", lambda self, slots: slots % _GENERATION)


def transfers_settle_when_the_connection_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    say_if_settled = RemoteControl._say_if_settled

    def say_always(self: RemoteControl) -> None:
        self._saving.clear()
        say_if_settled(self)

    monkeypatch.setattr(RemoteControl, "_say_if_settled", say_always)


def nobody_says_that_transfers_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteControl, "_say_if_settled", nothing)


def what_was_cleared_while_it_was_saved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_without", lambda mask, stale: mask)


def what_was_invalidated_while_it_was_saved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def invalidate(self: ControlPlane, keys: Any) -> None:
        self._remove(self.index.drop_keys(keys, session_module.MISS_REASONS[0]))

    monkeypatch.setattr(ControlPlane, "invalidate", invalidate)


def saves_in_flight_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteControl, "_without_forgotten", lambda self, slots, succeeded: succeeded)


def nobody_is_told_what_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watcher, "add_removed", nothing)


def the_tier_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def invalidate(self: Tiering, keys: Any, forget: Callable[[], None]) -> bool:
        forget()
        return True

    monkeypatch.setattr(Tiering, "invalidate", invalidate)


def priorities_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pop_coldest = EvictionOrders.pop_coldest

    def backwards(self: EvictionOrders, *arguments: Any) -> Any:
        self._levels = dict(reversed(self._levels.items()))
        try:
            return pop_coldest(self, *arguments)
        finally:
            self._levels = dict(reversed(self._levels.items()))

    monkeypatch.setattr(EvictionOrders, "pop_coldest", backwards)


def a_new_priority_is_for_new_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvictionOrders, "_copy", nothing)


def quotas_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlPlane, "_keep_to_quota", lambda self, quota, count, *rest: count)


def a_quota_takes_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvictionOrders, "pop_coldest_of", lambda self, form, *rest: self.pop_coldest(*rest))


def what_is_freed_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtentAllocator, "_discount", nothing)


def what_comes_from_a_tier_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_fetch = ControlPlane.plan_fetch

    def for_nobody(self: ControlPlane, keys: Any, forms: Any, owner: str, **how: Any) -> Any:
        return plan_fetch(self, keys, forms, "fetch", **how)

    monkeypatch.setattr(ControlPlane, "plan_fetch", for_nobody)


def another_owner_is_not_told_of_priority_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    move_to = RemoteControl.move_to

    def without(self: RemoteControl, client: Any) -> None:
        self._rank = np.zeros(4, dtype=np.int64)
        move_to(self, client)

    monkeypatch.setattr(RemoteControl, "move_to", without)


@pytest.mark.leaves_extents
@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (what_a_dead_client_writes_to_is_freed_at_once, "still touches it|at the same time"),
        (other_writers_are_not_waited_for, "still touches it|at the same time"),
        (writers_are_named_on_the_first_connection_only, "still touches it|at the same time"),
        (what_a_dead_client_was_saving_becomes_visible, "visible"),
        (what_a_dead_client_has_pinned_stays, "pins for"),
        (readers_check_no_digest, "wrong bytes"),
        (slots_of_an_earlier_connection_are_good, "not served any more|still touches it"),
        (transfers_settle_when_the_connection_is_back, "still touches it|at the same time"),
        (nobody_says_that_transfers_have_settled, "at rest there are left"),
        (what_was_cleared_while_it_was_saved_is_seen, "forgotten"),
        (what_was_invalidated_while_it_was_saved_is_seen, "forgotten"),
        (saves_in_flight_are_not_forgotten, "forgotten"),
        (nobody_is_told_what_has_left, "was not told"),
        (the_tier_forgets_nothing, "forgotten"),
        (priorities_do_not_matter, "was evicted before one of"),
        (a_new_priority_is_for_new_blocks_only, "was evicted before one of"),
        (quotas_are_not_kept, "and its quota is"),
        (a_quota_takes_from_others, "for the quota of another"),
        (what_is_freed_still_counts, "are counted"),
        (what_comes_from_a_tier_counts_for_nobody, "and has blocks of"),
        (another_owner_is_not_told_of_priority_and_quota, "and its clients have said"),
    ],
)
def test_a_broken_owner_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: Patch, complaint: str) -> None:
    broken(monkeypatch)
    _, failures = run_seeds(OwnerWorld, range(SEEDS_OF_BROKEN))
    assert failures, f"{SEEDS_OF_BROKEN} seeds see nothing wrong"
    assert any(words in failures[0] for words in complaint.split("|")), failures[0]
    assert "replay: python -m tests.simulation.owner_run --seed" in failures[0]
