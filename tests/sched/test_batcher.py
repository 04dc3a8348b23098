"""The batcher, on its own: a function of what waits, the clock, and what is busy."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvortex.config import KVortexConfig
from kvortex.kernels.tables import MAX_BATCH_BLOCKS
from kvortex.sched import Batcher, TransferRequest
from kvortex.sched.batcher import MIN_BATCH_BYTES
from kvortex.types import Direction

LOAD, SAVE = Direction.LOAD, Direction.SAVE
BOTH = {LOAD, SAVE}
SIZE = 1 << 20


def request(direction: Direction, blocks: int, nbytes: int = SIZE, **options: object) -> TransferRequest:
    ids = np.arange(blocks, dtype=np.int32)
    return TransferRequest(direction, ids, ids.astype(np.int64) * nbytes, [nbytes], **options)


def drain(batcher: Batcher, direction: Direction, now_s: float = 1e9) -> list[int]:
    """Blocks of each batch until nothing is left."""
    sizes = []
    while (batch := batcher.next_batch(now_s, {direction}, set())) is not None:
        sizes.append(batch.num_blocks)
    return sizes


def test_limits() -> None:
    batcher = Batcher(max_requests=2, max_bytes=64 * SIZE, max_blocks=20, linger_s=0.0)
    for _ in range(3):
        batcher.add(request(SAVE, 1), 0.0)
    batch = batcher.next_batch(1.0, BOTH, set())
    assert batch is not None
    assert len(batch.slices) == 2
    assert drain(batcher, SAVE) == [1]
    batcher.add(request(LOAD, 90, more_follows=True), 0.0)
    assert drain(batcher, LOAD) == [20, 20, 20, 20, 10]


def test_a_block_larger_than_the_limit_goes_alone() -> None:
    batcher = Batcher(max_bytes=SIZE // 2, linger_s=0.0)
    batcher.add(request(SAVE, 3), 0.0)
    assert drain(batcher, SAVE) == [1, 1, 1]


def test_a_saves_batches_double_and_a_loads_halve() -> None:
    small = MIN_BATCH_BYTES // SIZE
    batcher = Batcher(max_bytes=8 * MIN_BATCH_BYTES, linger_s=0.0)
    batcher.add(request(SAVE, 31 * small), 0.0)
    assert drain(batcher, SAVE) == [small, 2 * small, 4 * small, 8 * small, 8 * small, 8 * small]
    batcher.restart_ramp(SAVE)
    batcher.add(request(SAVE, small + 1), 0.0)
    assert drain(batcher, SAVE) == [small, 1]
    batcher.add(request(LOAD, 24 * small), 0.0)
    assert drain(batcher, LOAD) == [8 * small, 8 * small, 4 * small, 2 * small, small, small]
    batcher.add(request(LOAD, 8 * small, more_follows=True), 0.0)
    assert drain(batcher, LOAD) == [8 * small]


def test_a_batch_that_is_not_full_lingers_only_while_its_direction_is_busy() -> None:
    batcher = Batcher(linger_s=0.5)
    batcher.add(request(SAVE, 1), 10.0)
    assert batcher.next_batch(10.1, BOTH, {SAVE}) is None
    assert batcher.next_due_s(BOTH) == 10.5
    assert batcher.next_due_s({LOAD}) is None
    assert batcher.next_batch(10.6, {LOAD}, {SAVE}) is None, "no slot is free"
    assert batcher.next_batch(10.6, BOTH, {SAVE}) is not None
    assert batcher.next_due_s(BOTH) is None
    batcher.add(request(SAVE, 1), 20.0)
    assert batcher.next_batch(20.0, BOTH, set()) is not None


def test_a_batch_is_due_at_the_very_time_that_was_named() -> None:
    batcher = Batcher(linger_s=0.3)
    batcher.add(request(SAVE, 1), 0.1)
    batcher.add(request(LOAD, 1), 0.2)
    due_s = batcher.next_due_s(BOTH)
    assert due_s == 0.1 + 0.3
    assert batcher.next_batch(np.nextafter(due_s, 0), BOTH, BOTH) is None
    first = batcher.next_batch(due_s, BOTH, BOTH)
    assert first is not None
    assert first.direction is SAVE
    assert batcher.next_due_s(BOTH) == 0.2 + 0.3
    assert batcher.next_batch(due_s, BOTH, BOTH) is None


def test_defaults_are_those_of_the_configuration() -> None:
    config = KVortexConfig()
    defaults = {p.name: p.default for p in inspect.signature(Batcher).parameters.values()}
    assert defaults == {
        "max_requests": config.transfer.max_batch_requests,
        "max_bytes": config.transfer.max_batch_bytes,
        "max_blocks": MAX_BATCH_BLOCKS,
        "linger_s": config.transfer.linger_s,
        "max_consecutive_loads": config.transfer.max_consecutive_loads,
    }


def test_a_full_batch_does_not_linger() -> None:
    batcher = Batcher(max_requests=3, linger_s=9.0)
    for _ in range(3):
        batcher.add(request(SAVE, 1), 0.0)
    assert batcher.next_batch(0.0, BOTH, {SAVE}) is not None
    batcher = Batcher(max_bytes=4 * SIZE, linger_s=9.0)
    batcher.add(request(SAVE, 4), 0.0)
    assert batcher.next_batch(0.0, BOTH, {SAVE}) is not None


def test_loads_go_first_but_saves_get_their_turn() -> None:
    batcher = Batcher(max_requests=1, linger_s=0.0, max_consecutive_loads=3)
    for _ in range(12):
        batcher.add(request(LOAD, 1), 0.0)
        batcher.add(request(SAVE, 1), 0.0)
    order = []
    while (batch := batcher.next_batch(1.0, BOTH, set())) is not None:
        order.append("L" if batch.direction is LOAD else "S")
    assert "".join(order).startswith("LLLSLLLSLLLSLLLS")
    assert order.count("L") == order.count("S") == 12


def test_removing_gives_up_what_no_batch_has_taken() -> None:
    batcher = Batcher(max_bytes=MIN_BATCH_BYTES, linger_s=0.0)
    first, second = request(SAVE, 20), request(SAVE, 2)
    batcher.add(first, 0.0)
    batcher.add(second, 0.0)
    batch = batcher.next_batch(0.0, BOTH, set())
    assert batch is not None
    assert batch.num_blocks == 16
    batcher.remove(first)
    batcher.remove(first)
    assert batcher.queued_bytes(SAVE) == 2 * SIZE
    assert drain(batcher, SAVE) == [2]
    assert batcher.queued_bytes(SAVE) == 0


@settings(max_examples=300, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from([LOAD, SAVE]), st.integers(1, 40), st.integers(1, 3)), max_size=25),
    turns=st.lists(
        st.tuples(st.sets(st.sampled_from([LOAD, SAVE])), st.sets(st.sampled_from([LOAD, SAVE]))), max_size=80
    ),
    max_requests=st.integers(1, 4),
    max_blocks=st.integers(1, 50),
    max_bytes=st.integers(1, 40).map(lambda n: n * SIZE),
    patience=st.integers(1, 4),
)
def test_everything_goes_once_in_order_within_limits(
    arrivals: list[tuple[Direction, int, int]],
    turns: list[tuple[set[Direction], set[Direction]]],
    max_requests: int,
    max_blocks: int,
    max_bytes: int,
    patience: int,
) -> None:
    batcher = Batcher(
        max_requests=max_requests,
        max_bytes=max_bytes,
        max_blocks=max_blocks,
        linger_s=0.25,
        max_consecutive_loads=patience,
    )
    requests = [request(direction, blocks, size * SIZE) for direction, blocks, size in arrivals]
    taken: list[tuple[TransferRequest, int, int]] = []
    loads_in_a_row = 0
    now_s = 0.0
    waiting = iter(requests)
    added = 0
    for free, busy in [*turns, *[(BOTH, set())] * 2000]:
        now_s += 0.1
        new = next(waiting, None)
        if new is not None:
            batcher.add(new, now_s)
            added += 1
        saves_wait = batcher.queued_bytes(SAVE) > 0
        batch = batcher.next_batch(now_s, free, busy)
        if batch is None:
            if added == len(requests) and free == BOTH and not busy:
                break
            continue
        assert batch.direction in free
        assert len(batch.slices) <= max_requests
        assert batch.num_blocks <= max_blocks
        assert batch.nbytes <= max_bytes or batch.num_blocks == 1
        assert batch.nbytes == sum(part.num_blocks * part.request.extents[0] for part in batch.slices)
        loads_in_a_row = (
            loads_in_a_row + 1 if batch.direction is LOAD and saves_wait and free == BOTH and not busy else 0
        )
        assert loads_in_a_row <= patience
        taken += [(part.request, part.start, part.stop) for part in batch.slices]
    for direction in (LOAD, SAVE):
        wanted = [(r, b) for r in requests if r.direction is direction for b in range(r.num_blocks)]
        got = [(r, b) for r, start, stop in taken if r.direction is direction for b in range(start, stop)]
        assert got == wanted
        assert batcher.queued_bytes(direction) == 0


def test_a_request_settles_once() -> None:
    seen: list[TransferRequest] = []
    r = request(SAVE, 5, on_settled=seen.append)
    r.next_block, r.blocks_in_flight = 3, 3
    r.cancel()
    assert not r.settled.is_set()
    r.blocks_in_flight = 0
    r.settle_if_done()
    r.settle_if_done()
    assert seen == [r]
    assert r.source_released.is_set()
    assert r.succeeded.tolist() == [False] * 5


@pytest.mark.parametrize("direction", [LOAD, SAVE])
def test_an_idle_batcher_has_nothing(direction: Direction) -> None:
    batcher = Batcher()
    assert batcher.next_batch(0.0, {direction}, set()) is None
    assert batcher.next_due_s({direction}) is None


EXTENTS = (1024, 512, 768, 768)


def mixed(forms: list[int], **options: object) -> TransferRequest:
    ids = np.arange(len(forms), dtype=np.int32)
    return TransferRequest(
        Direction.LOAD, ids, ids.astype(np.int64) * 1024, EXTENTS, forms=np.array(forms, dtype=np.uint8), **options
    )


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6),
    max_bytes=st.integers(600, 6000),
)
def test_a_batch_holds_blocks_of_one_form_and_all_go_in_order(requests: list[list[int]], max_bytes: int) -> None:
    batcher = Batcher(max_bytes=max_bytes, linger_s=0.0)
    made = [mixed(forms) for forms in requests]
    for request in made:
        batcher.add(request, 0.0)
    gone: dict[int, list[int]] = {id(request): [] for request in made}
    while (batch := batcher.next_batch(0.0, set(Direction), set())) is not None:
        forms = {int(f) for part in batch.slices for f in part.request.forms[part.start : part.stop]}
        assert forms == {batch.form}
        assert batch.nbytes == batch.num_blocks * EXTENTS[batch.form]
        assert batch.nbytes <= max_bytes or batch.num_blocks == 1
        for part in batch.slices:
            gone[id(part.request)] += range(part.start, part.stop)
    assert batcher.queued_bytes(Direction.LOAD) == 0
    for request in made:
        assert gone[id(request)] == list(range(request.num_blocks))
