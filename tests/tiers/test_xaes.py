"""The cipher is XAES-256-GCM, by the test vectors of its specification (c2sp.org/XAES-256-GCM)."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from kvortex.tiers.xaes import Xaes256Gcm

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
TAG_BYTES = 16


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def sealed(cipher: Xaes256Gcm, nonce: bytes, message: bytes, associated: bytes) -> bytes:
    target = np.full(len(message), 0xAA, dtype=np.uint8)
    tag = cipher.encrypt(nonce, associated, as_array(message), target)
    return target.tobytes() + tag


@pytest.mark.parametrize(
    ("key", "associated", "expected"),
    [
        (b"\x01" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
    ids=["first bit of L is 0", "first bit of L is 1"],
)
def test_the_vectors_of_the_specification(key: bytes, associated: bytes, expected: str) -> None:
    cipher = Xaes256Gcm(key)
    found = sealed(cipher, NONCE, b"XAES-256-GCM", associated)
    assert found.hex() == expected
    target = np.empty(12, dtype=np.uint8)
    assert cipher.decrypt(NONCE, associated, found[-TAG_BYTES:], as_array(found[:-TAG_BYTES]), target)
    assert target.tobytes() == b"XAES-256-GCM"


class Stream:
    """The first bytes of SHAKE-128 of nothing, taken piece by piece."""

    def __init__(self, nbytes: int) -> None:
        self._pieces = iter(hashlib.shake_128(b"").digest(nbytes))

    def take(self, nbytes: int) -> bytes:
        return bytes(next(self._pieces) for _ in range(nbytes))


def messages(count: int) -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """Key, nonce, message and associated bytes of the specification's randomised test."""
    stream = Stream(count * (32 + 24 + 2 + 2 * 255))
    for _ in range(count):
        key, nonce = stream.take(32), stream.take(24)
        message = stream.take(stream.take(1)[0])
        associated = stream.take(stream.take(1)[0])
        yield key, nonce, message, associated


def test_the_accumulated_vectors_of_the_specification() -> None:
    found = hashlib.shake_128()
    for key, nonce, message, associated in messages(10_000):
        cipher = Xaes256Gcm(key)
        data = sealed(cipher, nonce, message, associated)
        found.update(data)
        target = np.empty(len(message), dtype=np.uint8)
        assert cipher.decrypt(nonce, associated, data[-TAG_BYTES:], as_array(data[:-TAG_BYTES]), target)
        assert target.tobytes() == message
    assert found.hexdigest(32) == "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"


def test_what_does_not_belong_together_is_refused_and_wiped() -> None:
    cipher = Xaes256Gcm(bytes(32))
    message = bytes(range(1, 200))
    data = sealed(cipher, NONCE, message, b"associated")
    parts = [NONCE, b"associated", data[-TAG_BYTES:], data[:-TAG_BYTES]]
    target = np.empty(len(message), dtype=np.uint8)
    for number, part in enumerate(parts):
        for position in range(len(part)):
            changed = bytearray(part)
            changed[position] ^= 1
            nonce, associated, tag, stored = [*parts[:number], bytes(changed), *parts[number + 1 :]]
            target[:] = 0xAA
            assert not cipher.decrypt(nonce, associated, tag, as_array(stored), target)
            assert not target.any()
    assert not Xaes256Gcm(b"\x01" * 32).decrypt(*parts[:3], as_array(parts[3]), target)


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 16"):
        Xaes256Gcm(bytes(16))
