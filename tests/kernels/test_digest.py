"""The digest finds what it promises to find."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvortex.kernels import digest_reference
from kvortex.kernels.digest import FIRST, LENGTH, MASK, POSITION, SECOND

# Computed once, with plain integers.
KNOWN = {"one zero word": 0x1C218D271D3CBBE0, "bytes 0 to 63": 0xD4B6415FD93AE138}


def plain(payload: bytes) -> int:
    total = len(payload) // 8 * LENGTH
    for i in range(len(payload) // 8):
        x = int.from_bytes(payload[8 * i : 8 * i + 8], "little") ^ ((i + 1) * POSITION & MASK)
        x = (x ^ (x >> 32)) * FIRST & MASK
        x = (x ^ (x >> 29)) * SECOND & MASK
        total += x ^ (x >> 32)
    return total & MASK


@given(st.binary(max_size=256).map(lambda b: b[: len(b) // 8 * 8]))
def test_it_is_what_its_definition_says(payload: bytes) -> None:
    assert digest_reference(payload) == plain(payload)


def test_known_values() -> None:
    assert digest_reference(b"") == 0
    assert digest_reference(bytes(8)) == plain(bytes(8)) == KNOWN["one zero word"]
    assert digest_reference(bytes(range(64))) == KNOWN["bytes 0 to 63"]


def test_every_single_bit_flip_changes_it() -> None:
    payload = np.random.default_rng(0).integers(0, 256, 128, dtype=np.uint8)
    digest = digest_reference(payload)
    for bit in range(payload.size * 8):
        payload[bit // 8] ^= 1 << (bit % 8)
        assert digest_reference(payload) != digest
        payload[bit // 8] ^= 1 << (bit % 8)


def test_two_flips_of_equal_weight_do_not_cancel() -> None:
    """The top bits of two words: they cancel in a digest that mixes too little."""
    for seed in range(20):
        words = np.random.default_rng(seed).integers(0, 2**63, 16, dtype=np.uint64)
        digest = digest_reference(words.view(np.uint8))
        for bit in (0, 31, 32, 63):
            for a, b in itertools.combinations(range(16), 2):
                changed = words.copy()
                changed[[a, b]] ^= np.uint64(1 << bit)
                assert digest_reference(changed.view(np.uint8)) != digest


def test_words_and_segments_that_trade_places_are_found() -> None:
    words = np.random.default_rng(1).integers(0, 2**63, 64, dtype=np.uint64)
    digest = digest_reference(words.view(np.uint8))
    for a, b in itertools.combinations(range(64), 2):
        swapped = words.copy()
        swapped[[a, b]] = swapped[[b, a]]
        assert digest_reference(swapped.view(np.uint8)) != digest
    assert digest_reference(np.roll(words, 16).view(np.uint8)) != digest


def test_truncation_and_zero_extension_are_found() -> None:
    for payload in (bytes(256), bytes(range(256))):
        digests = {digest_reference(payload[:n]) for n in range(0, 257, 8)}
        assert len(digests) == 33
        assert digest_reference(payload + bytes(8)) not in digests


def test_half_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="whole 8-byte words"):
        digest_reference(bytes(12))
