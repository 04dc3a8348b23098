"""Which block goes when a tier is full: what was used longest ago, and of a chain the tail before the head."""

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from kvortex.testing.tier_conformance import NAMESPACE, NBYTES, key_of, read_request, write_request
from kvortex.tiers import MemoryTier, Tier, WriteRequest
from kvortex.tiers.frame import frame_bytes
from kvortex.tiers.store_index import Admission, StoreIndex
from kvortex.tiers.uses import UseClock
from kvortex.types import SaveOutcome
from tests.tiers.disk_support import disk_tier, file_of, read_one

FRAME = frame_bytes(NBYTES)
ROOM = 10


def make_tier(kind: str, root: Path) -> Tier:
    if kind == "memory":
        return MemoryTier(ROOM * NBYTES, namespace=NAMESPACE)
    return disk_tier(root, capacity_bytes=ROOM * FRAME, write_threads=1 if kind == "disk, in order" else 4)


def chain_writes(numbers: range, clock: UseClock) -> list[WriteRequest]:
    requests = map(write_request, numbers)
    return [
        WriteRequest(r.key, r.payload, r.digest, r.raw_bytes, r.codec, None, used_s)
        for r, used_s in zip(requests, clock.chain(len(numbers)).tolist(), strict=True)
    ]


def there(tier: Tier, numbers: range) -> list[int]:
    return [n for n in numbers if tier.lookup([key_of(n)])[0]]


@pytest.fixture(params=["memory", "disk", "disk, in order"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_chain_loses_its_tail_before_its_head(tmp_path: Path, kind: str) -> None:
    clock = UseClock()
    async with make_tier(kind, tmp_path) as tier:
        await tier.scanned()
        await tier.write(chain_writes(range(8), clock))
        await tier.write(chain_writes(range(100, 105), clock))
        assert there(tier, range(8)) == [0, 1, 2, 3, 4]
        assert there(tier, range(100, 105)) == [*range(100, 105)]


async def test_a_chain_that_does_not_fit_keeps_its_head(tmp_path: Path, kind: str) -> None:
    clock = UseClock()
    async with make_tier(kind, tmp_path) as tier:
        await tier.scanned()
        await tier.write(chain_writes(range(200, 203), clock))
        outcomes = []
        requests = chain_writes(range(25), clock)
        for start in range(0, len(requests), 4):
            outcomes += await tier.write(requests[start : start + 4])
        kept = there(tier, range(25))
        # Of blocks that are written side by side any may get the last places.
        sure = ROOM - 4 if kind == "disk" else ROOM
        assert kept[:sure] == [*range(sure)]
        assert len(kept) == ROOM
        assert [outcome.outcome is SaveOutcome.STORED for outcome in outcomes[: ROOM - 4]] == [True] * (ROOM - 4)
        assert outcomes[-1].outcome is SaveOutcome.NO_SPACE


async def test_what_is_touched_stays(tmp_path: Path, kind: str) -> None:
    clock = UseClock()
    async with make_tier(kind, tmp_path) as tier:
        await tier.scanned()
        await tier.write(chain_writes(range(5), clock))
        await tier.write(chain_writes(range(100, 105), clock))
        await tier.touch([key_of(n) for n in [*range(5), 77]], clock.chain(6).tolist())
        await tier.write(chain_writes(range(300, 304), clock))
        assert there(tier, range(5)) == [*range(5)]
        assert there(tier, range(100, 105)) == [100]


async def test_what_is_read_in_any_order_stays_in_that_of_its_chain(tmp_path: Path, kind: str) -> None:
    clock = UseClock()
    async with make_tier(kind, tmp_path) as tier:
        await tier.scanned()
        await tier.write(chain_writes(range(ROOM), clock))
        times = clock.chain(ROOM).tolist()
        for n in np.random.default_rng(0).permutation(ROOM).tolist():
            request = read_request(n)
            await tier.read([type(request)(request.key, request.buffer, None, times[n])])
        await tier.write(chain_writes(range(300, 303), clock))
        assert there(tier, range(ROOM)) == [*range(ROOM - 3)]


async def test_the_order_survives_a_restart(tmp_path: Path) -> None:
    clock = UseClock()
    async with make_tier("disk", tmp_path) as tier:
        await tier.scanned()
        await tier.write(chain_writes(range(5), clock))
        await tier.write(chain_writes(range(100, 105), clock))
    async with disk_tier(tmp_path, capacity_bytes=ROOM * FRAME, touch_interval_s=0.0) as tier:
        await tier.scanned()
        await tier.touch([key_of(n) for n in range(5)], clock.chain(5).tolist())
    async with make_tier("disk", tmp_path) as tier:
        await tier.scanned()
        await tier.write([write_request(n) for n in (300, 301, 302)])
        assert there(tier, range(5)) == [*range(5)]
        assert there(tier, range(100, 105)) == [100, 101]


async def test_a_file_from_the_future_is_not_kept_for_ever(tmp_path: Path) -> None:
    async with make_tier("disk", tmp_path) as tier:
        await tier.scanned()
        await tier.write([write_request(n) for n in range(ROOM)])
    for n in range(ROOM):
        os.utime(file_of(tmp_path, key_of(n)), (4e9, 4e9))
    async with make_tier("disk", tmp_path) as tier:
        await tier.scanned()
        outcomes = await tier.write(chain_writes(range(100, 104), UseClock()))
        assert [outcome.outcome for outcome in outcomes] == [SaveOutcome.STORED] * 4


def test_a_clock_that_is_set_back_changes_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.chain([1000.0, 1001.0], itertools.repeat(5.0))
    monkeypatch.setattr("kvortex.tiers.uses.time.time", lambda: next(times))
    clock = UseClock()
    moments = [clock.now(), *reversed(clock.chain(3).tolist()), clock.now(), *reversed(clock.chain(100).tolist())]
    assert moments == sorted(set(moments))


def test_the_order_of_use_keeps_no_more_than_it_needs() -> None:
    index, clock = StoreIndex(4 * FRAME), UseClock()
    for number in range(1000):
        key = key_of(number % 5)
        admission, victims = index.reserve(key, FRAME, clock.now())
        for victim, _ in victims:
            index.removed(victim)
        if admission is Admission.RESERVED:
            index.commit(key, "n")
        assert len(index) <= 4
    assert len(index._order) < 100


@pytest.mark.parametrize("how", ["read", "touched"])
async def test_what_another_process_has_used_since_the_scan_stays(tmp_path: Path, how: str) -> None:
    settings = {"capacity_bytes": 3 * FRAME, "rescan_interval_s": None, "touch_interval_s": 0.0}
    async with disk_tier(tmp_path, **settings) as tier:
        for number in range(3):
            await tier.write([write_request(number)])
    for number in range(3):  # used long ago, the first first
        os.utime(file_of(tmp_path, key_of(number)), (1000 + number, 1000 + number))
    async with disk_tier(tmp_path, **settings) as tier, disk_tier(tmp_path, **settings) as other:
        await tier.scanned()
        await other.scanned()
        if how == "read":
            assert (await read_one(other, 0)).reason is None
        else:
            await other.touch([key_of(0)], [time.time()])
        assert (await tier.write([write_request(3)]))[0].outcome is SaveOutcome.STORED
        assert [file_of(tmp_path, key_of(n)).exists() for n in range(4)] == [True, False, True, True]
