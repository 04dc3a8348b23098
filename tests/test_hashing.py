"""Hashes are a storage format: fixed vectors, an independent reference, all ways two prompts may differ."""

import dataclasses
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvortex.errors import ConfigError, InvalidHashError
from kvortex.hashing import ROOT_HASH, Namespace, cache_key, hash_blocks

VECTORS = Path(__file__).parent / "vectors" / "block_hashes.json"
NAMESPACE = Namespace("llama", "main", "bfloat16", bytes(32), 16, tp_rank=1, tp_size=4)

edges = st.integers(0, 9).flatmap(lambda n: st.integers(-3, 3).map(lambda d: d + (1 << (8 * n - 1) if n else 0)))
integers = st.integers(-300, 2**70) | edges | edges.map(lambda n: -n)
extra_key = st.one_of(st.text(max_size=4), st.binary(max_size=4), integers)
extra_key_tuples = st.lists(extra_key, max_size=3).map(tuple)


def naive_encode(keys):
    out = struct.pack("<I", len(keys))
    for key in keys:
        if isinstance(key, str):
            tag, body = b"s", key.encode()
        elif isinstance(key, bytes):
            tag, body = b"b", key
        else:
            size = 1
            while not -(1 << (8 * size - 1)) <= key < 1 << (8 * size - 1):
                size += 1
            tag, body = b"i", bytes((key >> (8 * i)) & 0xFF for i in range(size))
        out += tag + struct.pack("<Q", len(body)) + body
    return out


def naive_hash_blocks(tokens, block_size, parent=None, extra_keys=(), block_extra_keys=None):
    digest = parent or hashlib.sha256(b"kvortex.block_hash.root.v1").digest()
    hashes = []
    for i in range(len(tokens) // block_size):
        message = hashlib.sha256(digest)
        for token in tokens[i * block_size : (i + 1) * block_size]:
            message.update(struct.pack("<I", token))
        message.update(naive_encode(extra_keys if i == 0 else ()))
        message.update(naive_encode((block_extra_keys or {}).get(i, ())))
        digest = message.digest()
        hashes.append(digest)
    return hashes


def vector_arguments(case):
    """JSON -> arguments; bytes are written as {"hex": ...}."""

    def keys(items):
        return tuple(bytes.fromhex(item["hex"]) if isinstance(item, dict) else item for item in items)

    return {
        "token_ids": case["token_ids"],
        "block_size": case["block_size"],
        "parent": bytes.fromhex(case["parent"]) if case["parent"] else None,
        "extra_keys": keys(case["extra_keys"]),
        "block_extra_keys": {int(i): keys(items) for i, items in case["block_extra_keys"].items()},
    }


def vector_results(vectors):
    hashes = [[h.hex() for h in hash_blocks(**vector_arguments(case))] for case in vectors["hash_blocks"]]
    keys = []
    for case in vectors["namespaces"]:
        namespace = Namespace(**{**case["fields"], "layout": bytes.fromhex(case["fields"]["layout"])})
        keys.append([namespace.digest.hex(), cache_key(namespace, bytes(range(32))).hex()])
    return [hashes, keys]


def test_committed_vectors():
    vectors = json.loads(VECTORS.read_text())
    hashes, keys = vector_results(vectors)
    assert hashes == [case["hashes"] for case in vectors["hash_blocks"]]
    assert keys == [[case["digest"], case["cache_key"]] for case in vectors["namespaces"]]
    assert len(hashes) >= 8
    assert len(keys) >= 2


def test_reference_agrees_with_the_vectors():
    for case in json.loads(VECTORS.read_text())["hash_blocks"]:
        arguments = vector_arguments(case)
        assert [h.hex() for h in naive_hash_blocks(arguments.pop("token_ids"), **arguments)] == case["hashes"]


def test_another_process_agrees():
    code = "import json, test_hashing as t; print(json.dumps(t.vector_results(json.load(t.VECTORS.open()))))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=120)
    assert json.loads(done.stdout) == vector_results(json.loads(VECTORS.read_text()))


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    block_size=st.integers(1, 9),
    parent=st.none() | st.binary(min_size=32, max_size=32),
    extra_keys=extra_key_tuples,
    block_extra_keys=st.dictionaries(st.integers(0, 6), extra_key_tuples, max_size=3),
)
def test_agrees_with_reference(tokens, block_size, parent, extra_keys, block_extra_keys):
    arguments = {"parent": parent, "extra_keys": extra_keys, "block_extra_keys": block_extra_keys}
    expected = naive_hash_blocks(tokens, block_size, **arguments)
    assert hash_blocks(tokens, block_size, **arguments) == expected


@given(first=extra_key_tuples, second=extra_key_tuples, in_block=extra_key_tuples, in_other=extra_key_tuples)
def test_different_extra_keys_give_different_hashes(first, second, in_block, in_other):
    one = hash_blocks([1, 2], 2, extra_keys=first, block_extra_keys={0: in_block})
    other = hash_blocks([1, 2], 2, extra_keys=second, block_extra_keys={0: in_other})
    assert (one == other) == ((first, in_block) == (second, in_other))


@pytest.mark.parametrize(
    "keys",
    [
        ("",),
        (b"",),
        (0,),
        ("1",),
        (b"1",),
        (1,),
        ("1", "1"),
        ("11",),
        ("1", ""),
        ("", "1"),
        (-1,),
        ("\ud800",),
        (255,),
        (256,),
    ],
)
def test_lookalike_extra_keys_differ_from_none_and_each_other(keys):
    others = [(), ("?",), ("a",), (b"\xff",), (65,), ("\x00",), (b"\x00",), ("s",)]
    assert hash_blocks([7], 1, extra_keys=keys) not in [hash_blocks([7], 1, extra_keys=k) for k in others]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=24), st.integers(0, 5))
def test_a_chain_can_be_continued(tokens, split):
    whole = hash_blocks(tokens, 4, extra_keys=("adapter",))
    split = min(split, len(whole))
    head = whole[:split]
    if head:
        assert head + hash_blocks(tokens[split * 4 :], 4, parent=head[-1]) == whole


def test_a_changed_token_changes_its_block_and_all_after_it():
    tokens = list(range(64))
    before = hash_blocks(tokens)
    tokens[20] += 1
    after = hash_blocks(tokens)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


def test_block_extra_keys_reach_their_block_and_all_after_it():
    plain = hash_blocks(range(64))
    image = hash_blocks(range(64), block_extra_keys={2: ("image",), 99: ("past the end",)})
    assert [a == b for a, b in zip(plain, image, strict=True)] == [True, True, False, False]


def test_equal_tokens_at_other_positions_hash_differently():
    assert len(set(hash_blocks([5] * 64))) == 4


def test_only_full_blocks():
    assert hash_blocks(range(47)) == hash_blocks(range(32))
    assert hash_blocks(range(15)) == hash_blocks([]) == []


def test_root_is_the_default_parent():
    assert hash_blocks(range(16), parent=ROOT_HASH) == hash_blocks(range(16))


CONTAINERS = {
    "tuple": tuple,
    "range": lambda tokens: range(tokens[0], tokens[-1] + 1),
    "big-endian": lambda tokens: np.array(tokens, dtype=">u4"),
    "strided": lambda tokens: np.array([tokens, tokens]).T[:, 0],
    **{dtype: lambda tokens, dtype=dtype: np.array(tokens, dtype=dtype) for dtype in ("i4", "i8", "u2", "u8")},
    "torch int64": torch.tensor,
    "torch int32": lambda tokens: torch.tensor(tokens, dtype=torch.int32),
}


@pytest.mark.parametrize("convert", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_any_container_of_the_same_tokens(convert):
    tokens = list(range(100, 132))
    assert hash_blocks(convert(tokens)) == hash_blocks(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        [-1], [2**32], [2**63], [2**64], [-1, 2**63], [1.0], [True], ["1"], [None], [[1, 2]], [[1], [2, 3]],
        5, "12",
        np.array([-5], dtype=np.int32), np.array([2**40]), torch.tensor([0.5]), torch.tensor([-1]), object(),
    ],
)  # fmt: skip
def test_bad_tokens(tokens):
    with pytest.raises(InvalidHashError, match="token"):
        hash_blocks(tokens, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"block_size": size} for size in (0, -16, 16.0, "16", None, True)),
        *({"parent": parent} for parent in (b"", bytes(31), bytes(33), "x" * 32, bytearray(32), 1)),
        *({"extra_keys": keys} for keys in ("salt", b"salt", (1.0,), (None,), (True,), (("nested",),))),
        *({"block_extra_keys": {0: keys}} for keys in ("salt", (None,))),
        *({"block_extra_keys": {index: ("x",)}} for index in (-1, "0", True)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tokens", [[], list(range(16))], ids=["empty", "full"])
def test_bad_arguments(arguments, tokens):
    with pytest.raises(InvalidHashError):
        hash_blocks(tokens, **arguments)


NAMESPACE_CHANGES = {
    "model": "llama2", "weights_revision": "", "kv_dtype": "float16", "layout": b"\x01" * 32,
    "block_size": 32, "tp_rank": 2, "tp_size": 8, "pp_rank": 1, "pp_size": 2,
    "codec": "fp8", "schema_version": 2, "fingerprint": "other settings",
}  # fmt: skip


def test_every_field_of_a_namespace_counts():
    assert set(NAMESPACE_CHANGES) == {field.name for field in dataclasses.fields(Namespace)}
    base = dataclasses.replace(NAMESPACE, pp_size=4)
    changed = [dataclasses.replace(base, **{name: value}) for name, value in NAMESPACE_CHANGES.items()]
    digests = {namespace.digest for namespace in [base, *changed]}
    assert len(digests) == len(NAMESPACE_CHANGES) + 1
    assert all(len(digest) == 32 for digest in digests)


def test_a_namespace_does_not_confuse_neighbouring_fields():
    assert Namespace("ab", "c", "d", b"l", 1).digest != Namespace("a", "bc", "d", b"l", 1).digest


@pytest.mark.parametrize(
    "change",
    [
        {"model": ""}, {"model": None}, {"weights_revision": None}, {"kv_dtype": ""}, {"codec": ""},
        {"fingerprint": None}, {"layout": b""}, {"layout": "x"}, {"block_size": 0}, {"block_size": True},
        {"tp_rank": 4},
        {"tp_rank": -1}, {"tp_size": 0}, {"pp_rank": 1}, {"pp_size": 0},
        {"schema_version": 0}, {"block_size": 16.0},
    ],
    ids=repr,
)  # fmt: skip
def test_bad_namespaces(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(NAMESPACE, **change)


def test_cache_key_depends_on_both_and_checks_the_hash():
    other = dataclasses.replace(NAMESPACE, tp_rank=0)
    one, two = hash_blocks(range(32))
    keys = {cache_key(namespace, block) for namespace in (NAMESPACE, other) for block in (one, two)}
    assert len(keys) == 4
    assert cache_key(NAMESPACE, one) == hashlib.sha256(NAMESPACE.digest + one).digest()
    with pytest.raises(InvalidHashError):
        cache_key(NAMESPACE, one[:31])
