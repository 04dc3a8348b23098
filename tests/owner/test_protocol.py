"""Frames: what is packed comes back, and whatever else arrives is refused without another error."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import OwnerError
from kvortex.groups import GroupSet, KVGroup
from kvortex.owner.caches import describe_groups, groups_from
from kvortex.owner.protocol import (
    FIELDS,
    HEADER,
    MAX_BODY_BYTES,
    Arrays,
    Kind,
    as_flags,
    expected,
    flags_of,
    join,
    keys_of,
    numbers,
    pack,
    text_of,
    unpack,
    unpack_header,
)

TAGS = st.integers(0, 2**64 - 1)


def parse(frame: bytes) -> tuple[Kind, int, Arrays]:
    """Kind, tag and fields of a whole frame, read as the two sides read it."""
    kind, count, tag, nbytes = unpack_header(frame[: HEADER.size])
    return kind, tag, unpack(kind, count, frame[HEADER.size :][:nbytes])


@st.composite
def contents(draw: st.DrawFn, kind: Kind) -> list[Any]:
    """Any fields of a kind."""
    fields: list[Any] = []
    for dtype in FIELDS[kind]:
        if dtype is None:
            fields.append(draw(st.text(max_size=20)).encode())
        else:
            size = np.dtype(dtype).itemsize * draw(st.integers(0, 9))
            fields.append(np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype))
    return fields


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(list(FIELDS)))
    return join(pack(kind, draw(TAGS), *draw(contents(kind))))


def as_bytes(fields: Sequence[Any]) -> list[bytes]:
    return [bytes(memoryview(field).cast("B")) if len(field) else b"" for field in fields]


def test_every_kind_has_fields() -> None:
    assert set(FIELDS) == set(Kind)
    assert len({kind.value for kind in Kind}) == len(Kind)


@pytest.mark.parametrize("kind", list(FIELDS))
def test_what_is_packed_comes_back(kind: Kind) -> None:
    @given(contents(kind), TAGS)
    def check(fields: list[Any], tag: int) -> None:
        frame = join(pack(kind, tag, *fields))
        assert len(frame) % 8 == 0
        assert HEADER.size + HEADER.unpack_from(frame)[0] == len(frame)
        found, answered, back = parse(frame)
        assert (found, answered, as_bytes(back)) == (kind, tag, as_bytes(fields))
        assert [field.dtype for field in back] == [np.dtype(dtype or np.uint8) for dtype in FIELDS[kind]]
        assert all(field.ctypes.data % field.itemsize == 0 for field in back if field.size)

    check()


@given(frames(), st.data())
def test_a_frame_that_is_cut_is_refused(frame: bytes, data: st.DataObject) -> None:
    """The header says how much comes; what an older or a broken peer leaves out of the body is noticed."""
    kind, count, _, nbytes = unpack_header(frame[: HEADER.size])
    cut = data.draw(st.integers(0, max(nbytes - 1, 0)))
    body = frame[HEADER.size : HEADER.size + cut]
    try:
        fields = unpack(kind, count, body)
    except OwnerError:
        return
    whole = unpack(kind, count, frame[HEADER.size :])
    assert as_bytes(fields) == as_bytes(whole), "only padding was cut"


@given(frames(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
def test_a_damaged_frame_is_refused_or_is_another_frame(frame: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(frame)
    for place, change in damage:
        damaged[place % len(damaged)] ^= change
    try:
        kind, _, fields = parse(bytes(damaged))
    except OwnerError:
        return
    assert [field.dtype for field in fields] == [np.dtype(dtype or np.uint8) for dtype in FIELDS[kind]]
    assert sum(field.nbytes for field in fields) <= len(damaged)


@given(st.binary(min_size=HEADER.size, max_size=400))
def test_garbage_is_refused_or_is_a_frame(garbage: bytes) -> None:
    try:
        kind, _, fields = parse(garbage)
    except OwnerError:
        return
    assert len(fields) == len(FIELDS[kind])


def test_frames_that_are_too_large_are_refused_on_both_sides() -> None:
    with pytest.raises(OwnerError, match="too large: name fewer blocks"):
        pack(Kind.CONTAINS, 1, np.empty((MAX_BODY_BYTES // 32, 4), np.uint64))
    pack(Kind.CONTAINS, 1, np.empty((MAX_BODY_BYTES // 32 - 1, 4), np.uint64))
    for body, count in ((MAX_BODY_BYTES + 1, 1), (2**32 - 1, 1), (1 << 20, 17), (8, 3)):
        with pytest.raises(OwnerError, match=f"a frame of {body} bytes with {count} fields"):
            unpack_header(HEADER.pack(body, Kind.CONTAINS, count, 1))


def test_frames_of_unknown_kinds_are_refused() -> None:
    for number in (0, 5, 99, 65535):
        with pytest.raises(OwnerError, match=f"kind {number} are not known here"):
            unpack_header(HEADER.pack(8, number, 1, 1))


@given(frames(), st.lists(st.binary(max_size=20), max_size=4))
def test_fields_that_a_newer_peer_adds_are_left_out(frame: bytes, more: list[bytes]) -> None:
    kind, tag, fields = parse(frame)
    longer = join(pack(kind, tag, *fields, *more))
    found, answered, back = parse(longer)
    assert (found, answered, as_bytes(back)) == (kind, tag, as_bytes(fields))


def test_missing_fields_and_broken_items_are_named() -> None:
    with pytest.raises(OwnerError, match="FINISH_LOAD has 1 fields instead of 2"):
        parse(join(pack(Kind.FINISH_LOAD, 0, numbers(1))))
    with pytest.raises(OwnerError, match="CONTAINS has a field of 12 bytes"):
        parse(join(pack(Kind.CONTAINS, 0, b"x" * 12)))


def test_text_keys_and_flags() -> None:
    assert text_of(np.frombuffer("Größe".encode(), np.uint8)) == "Größe"
    assert text_of(np.frombuffer(b"\xff", np.uint8)) == "�"
    assert keys_of(np.arange(8, dtype=np.uint64)).shape == (2, 4)
    with pytest.raises(OwnerError, match="no whole number of keys"):
        keys_of(np.arange(7, dtype=np.uint64))
    assert flags_of(np.empty(0, np.uint8), 3) is None
    mask = flags_of(np.array([0, 2, 1], np.uint8), 3)
    assert mask is not None
    assert mask.tolist() == [False, True, True]
    assert as_flags(mask).tolist() == [0, 1, 1]
    assert as_flags(None).size == 0
    with pytest.raises(OwnerError, match="2 entries instead of 3"):
        flags_of(np.zeros(2, np.uint8), 3)
    with pytest.raises(OwnerError, match="3 entries instead of 4"):
        expected(numbers(1, 2, 3), 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
PART = st.one_of(JSON, st.sampled_from(["full", "window", "state", ["a"], ["b", "c"], 16, 32, None, True]))
GROUP = st.one_of(PART, st.lists(PART, min_size=5, max_size=7))
LISTED = st.one_of(PART, st.lists(GROUP, max_size=3))
DOCUMENT = st.fixed_dictionaries({"hash_block_size": PART, "groups": LISTED, "parts": PART})


@given(st.one_of(st.text(), JSON.map(json.dumps), DOCUMENT.map(json.dumps)))
def test_groups_that_make_no_sense_are_refused(described: str) -> None:
    with contextlib.suppress(OwnerError):
        assert isinstance(groups_from(described)[0], GroupSet)


def test_groups_come_back_as_they_were_described() -> None:
    groups = [KVGroup("a", ("x", "y"), 16), KVGroup("b", ("z",), 16, "window", 40), KVGroup("c", ("s",), 64, "state")]
    described = describe_groups(GroupSet(groups, 16), 3)
    assert describe_groups(*groups_from(described)) == described
    assert groups_from(described)[0].groups == GroupSet(groups, 16).groups
