"""A request's accounts: what waits, what is under way, when it is over and when its source may be overwritten."""

import numpy as np
import pytest

from kvortex.sched import TransferRequest
from kvortex.types import Direction


def request(blocks: int, settled: list[TransferRequest]) -> TransferRequest:
    ids = np.arange(blocks, dtype=np.int32)
    return TransferRequest(Direction.SAVE, ids, ids.astype(np.int64) * 128, [128], on_settled=settled.append)


def test_a_new_request_waits_with_all_its_blocks() -> None:
    settled: list[TransferRequest] = []
    r = request(5, settled)
    r.settle_if_done()
    assert (r.num_blocks, r.blocks_waiting, r.blocks_in_flight, r.blocks_unread) == (5, 5, 0, 5)
    assert not r.settled.is_set()
    assert not r.source_released.is_set()
    assert (r.digests.dtype, r.succeeded.dtype) == (np.uint64, np.bool_)
    assert settled == []


@pytest.mark.parametrize(("waiting", "in_flight", "done"), [(0, 0, True), (0, 1, False), (1, 0, False), (2, 3, False)])
def test_it_settles_when_nothing_waits_and_nothing_is_under_way(waiting: int, in_flight: int, done: bool) -> None:
    settled: list[TransferRequest] = []
    r = request(5, settled)
    r.next_block, r.blocks_in_flight = 5 - waiting, in_flight
    r.settle_if_done()
    assert r.settled.is_set() == r.source_released.is_set() == done
    assert settled == [r] * done


def test_the_source_is_free_once_all_of_it_is_read() -> None:
    settled: list[TransferRequest] = []
    r = request(5, settled)
    r.next_block, r.blocks_in_flight, r.blocks_unread = 5, 2, 0
    r.settle_if_done()
    assert r.source_released.is_set()
    assert not r.settled.is_set()


def test_dropping_what_waits_keeps_what_is_under_way() -> None:
    settled: list[TransferRequest] = []
    r = request(5, settled)
    r.next_block, r.blocks_in_flight, r.blocks_unread = 3, 1, 1 + 2  # two blocks are done, one runs, two wait
    for _ in range(2):
        r.cancel()
        assert r.cancelled
        assert (r.num_blocks, r.blocks_waiting, r.blocks_unread) == (3, 0, 1)
        assert not r.source_released.is_set()
        assert settled == []
    r.blocks_unread = 0
    r.cancel()
    assert r.source_released.is_set()
    assert not r.settled.is_set()


def test_dropping_all_of_it_settles_at_once() -> None:
    settled: list[TransferRequest] = []
    r = request(5, settled)
    r.cancel()
    r.cancel()
    assert settled == [r]
    assert r.source_released.is_set()
    assert len(r.succeeded) == len(r.digests) == 5
    assert not r.succeeded.any()


def test_what_arrives_at_once_is_kept_as_it_is() -> None:
    r = request(3, [])
    assert (r.num_succeeded, r.digests.tolist(), r.succeeded.any()) == (0, [0, 0, 0], False)
    digests = np.array([7, 8, 9], dtype=np.uint64)
    r.arrived(0, digests, None)
    assert r.digests is digests
    assert (r.num_succeeded, r.succeeded.all(), r.too_lossy.any()) == (3, True, False)


def test_what_arrives_bit_by_bit_is_put_together() -> None:
    r = request(5, [])
    r.arrived(3, np.array([4, 5], dtype=np.uint64), None)
    assert (r.num_succeeded, r.succeeded.tolist()) == (2, [False] * 3 + [True] * 2)
    r.arrived(0, np.array([1, 2], dtype=np.uint64), np.array([False, True]))
    assert r.digests.tolist() == [1, 2, 0, 4, 5]
    assert r.succeeded.tolist() == [True, False, False, True, True]
    assert r.too_lossy.tolist() == [False, True, False, False, False]
    assert r.num_succeeded == 3


def test_a_whole_batch_may_be_lossy() -> None:
    r = request(2, [])
    r.arrived(0, np.array([1, 2], dtype=np.uint64), np.array([True, False]))
    assert (r.num_succeeded, r.too_lossy.tolist()) == (1, [True, False])


def mixed(forms: list[int]) -> TransferRequest:
    ids = np.arange(len(forms), dtype=np.int32)
    options = {"forms": np.array(forms, dtype=np.uint8)}
    return TransferRequest(Direction.SAVE, ids, ids.astype(np.int64) * 128, [128] * 6, **options)


def test_blocks_move_form_by_form_and_what_comes_back_is_in_the_order_of_their_names() -> None:
    r = mixed([4, 0, 2, 4, 0, 2])
    assert r.forms is not None
    assert r.forms.tolist() == [0, 0, 2, 2, 4, 4]
    assert r.block_ids.tolist() == [1, 4, 2, 5, 0, 3]
    assert r.offsets.tolist() == [128 * b for b in (1, 4, 2, 5, 0, 3)]
    assert r.next_alike() == (2, 0)
    r.arrived(0, np.array([11, 14], dtype=np.uint64), np.array([False, True]))
    r.arrived(2, np.array([12, 15], dtype=np.uint64), None)
    r.next_block = 4
    r.cancel()
    assert r.digests.tolist() == [0, 11, 12, 0, 14, 15]
    assert r.succeeded.tolist() == [False, True, True, False, False, True]
    assert r.too_lossy.tolist() == [False, False, False, False, True, False]
    assert r.tried.tolist() == [False, True, True, False, True, True]
    assert (r.num_succeeded, r.num_tried) == (3, 4)
    assert r.succeeded_forms is not None
    assert sorted(r.succeeded_forms.tolist()) == [0, 2, 2]


@pytest.mark.parametrize("forms", [None, [0, 0, 0, 0, 0], [0, 2, 0, 2, 0]])
def test_blocks_of_a_form_move_in_the_order_of_their_extents(forms: list[int] | None) -> None:
    """Neighbours in the pool are one copy then, in whatever order a call names them."""
    ids, places = np.arange(5, dtype=np.int32), np.array([3, 9, 1, 8, 2], dtype=np.int64)
    of_each = None if forms is None else np.array(forms, dtype=np.uint8)
    r = TransferRequest(Direction.LOAD, ids, places * 128, [128] * 3, forms=of_each)
    order = [2, 4, 0, 3, 1]
    assert r.block_ids.tolist() == order
    assert r.offsets.tolist() == [128 * place for place in (1, 2, 3, 8, 9)]
    digests = np.array(order, dtype=np.uint64) + 10
    r.arrived(0, digests, None)
    assert r.digests.tolist() == [10, 11, 12, 13, 14]


def test_blocks_of_one_form_after_another_stay_as_they_are() -> None:
    r = mixed([0, 0, 2, 4])
    assert r.block_ids.tolist() == [0, 1, 2, 3]
    digests = np.array([7, 8, 9, 10], dtype=np.uint64)
    r.arrived(0, digests, None)
    assert r.digests is digests
    assert r.tried.all()


def test_a_request_of_one_form_has_no_forms() -> None:
    r = request(3, [])
    assert r.succeeded_forms is None
    assert r.tried.all()
