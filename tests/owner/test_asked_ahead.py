"""Plans that an owner works out while its client goes on: answers in order, or none if the owner is lost."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from owner_support import LocalOwner, local_owner, some_keys

from kvortex.codecs import Codec, Encodings
from kvortex.errors import OwnerError
from kvortex.groups import GroupSet, KVGroup
from kvortex.owner import OwnerClient, RemoteControl
from kvortex.owner.client import OwnerLost
from kvortex.owner.protocol import Kind, numbers
from kvortex.planes.plans import NOT_PLANNED, SavePlan
from kvortex.types import BlockSizes, MissReason, SaveOutcome

BLOCK_NBYTES = 64 << 10
IDS = np.arange(8, dtype=np.int32)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[LocalOwner]:
    with local_owner(tmp_path / "kv.sock") as owner:
        yield owner


def connect(owner: LocalOwner, deadline_s: float = 30.0) -> RemoteControl:
    sizes, encodings = (BlockSizes(BLOCK_NBYTES, BLOCK_NBYTES),), Encodings([BLOCK_NBYTES] * 2, [Codec.RAW] * 2)
    groups = GroupSet([KVGroup("all", ("layer",), 16)], 16)
    return RemoteControl(OwnerClient(owner.path, deadline_s), bytes(range(32)), sizes, encodings, groups)


@pytest.fixture
def control(owner: LocalOwner) -> Iterator[RemoteControl]:
    control = connect(owner)
    yield control
    control.close()


def finish(control: RemoteControl, plan: SavePlan) -> list[SaveOutcome]:
    return list(control.finish_save(plan, np.arange(len(plan.slots), dtype=np.uint64)))


def test_a_plan_comes_later_and_other_questions_meanwhile_get_their_own_answers(control: RemoteControl) -> None:
    keys = some_keys(8)
    save = control.begin_save(keys[:6], IDS[:6], "save")
    assert not save.is_made
    assert control.index.leading(keys) == (0, MissReason.PENDING), "the owner has reserved them"
    again = control.begin_save(keys, IDS, "save")
    assert control.figures().allocated_bytes == 8 * BLOCK_NBYTES
    assert again.result().transfer.block_ids.tolist() == [6, 7]
    assert save.result() is save.result()
    assert save.result().transfer.block_ids.tolist() == list(range(6))
    assert finish(control, save.result()) == [SaveOutcome.STORED] * 6
    load = control.begin_load(keys, IDS)
    finish(control, again.result())
    plan = load.result()
    assert plan.positions.tolist() == list(range(6)), "asked before the rest was stored"
    control.finish_load(plan)
    assert control.index.leading(keys)[0] == 8


def test_what_was_planned_is_forgotten_with_the_rest(control: RemoteControl, owner: LocalOwner) -> None:
    keys = some_keys(8)
    save = control.begin_save(keys, IDS, "save")
    control.forget()
    assert save.is_made
    assert set(finish(control, save.result())) == {SaveOutcome.FAILED}
    assert control.index.leading(keys)[0] == 0
    assert owner.allocated_bytes == 0


def test_nothing_is_planned_where_the_owner_is_lost_before_it_answers(owner: LocalOwner) -> None:
    keys, control = some_keys(8), connect(owner)
    save, load = control.begin_save(keys, IDS, "save"), control.begin_load(keys, IDS)
    with control.client.exclusive():  # whatever has come already
        control.client._lose(ConnectionResetError("injected"))
    assert save.result().states.tolist() == [NOT_PLANNED] * 8
    assert save.result().transfer.num_blocks == 0
    assert control.finish_load(load.result()) == [MissReason.OWNER_LOST] * 8
    control.close()
    late = control.begin_save(keys, IDS, "save")
    assert late.result().transfer.num_blocks == 0


def test_a_closed_client_answers_nothing(control: RemoteControl) -> None:
    question = control.client.ask_ahead(Kind.FIGURES)
    control.close()
    with pytest.raises(OwnerLost, match="before it answered"):
        control.client.answer(question)


def test_a_refusal_comes_to_its_own_question(control: RemoteControl) -> None:
    refused = control.client.ask_ahead(Kind.SCRATCH, numbers(-1))
    figures = control.client.ask_ahead(Kind.FIGURES)
    assert len(control.client.answer(figures)) == 1
    with pytest.raises(OwnerError, match="no scratch memory"):
        control.client.answer(refused)


def test_what_has_left_the_pool_is_told_in_the_order_of_the_answers(control: RemoteControl, owner: LocalOwner) -> None:
    """Although the plan that it comes with is looked at later than a place that was asked for afterwards."""
    told: list[int] = []
    control.watch(lambda offsets: told.extend(offsets.tolist()))
    fill, more = some_keys(64), some_keys(8, salt=1)
    full = control.begin_save(fill, np.arange(64, dtype=np.int32), "save").result()
    finish(control, full)
    save = control.begin_save(more, IDS, "save")
    assert not told
    places = control.places(fill)
    assert not save.is_made
    assert len(told) == np.count_nonzero(places == -1) > 0
    finish(control, save.result())
    assert owner.allocated_bytes <= 4 << 20
