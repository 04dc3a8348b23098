"""Under which keys a tier has the blocks of one namespace.

A block's key is its hash. Where a codec packs, blocks that rest as they are have other keys: so what the tier says of a
key tells the encoding as well, and with it the size and place that a block needs before it is read.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

KEY_BYTES: Final = 32
_ONE_KEY: Final = np.dtype((np.void, KEY_BYTES))
_KEPT_AS_IS: Final = hashlib.sha256(b"kvortex.kept_as_is.v1").digest()
_KEPT_AS_IS_WORDS: Final = np.frombuffer(_KEPT_AS_IS, dtype=np.uint64)


def split_keys(keys: NDArray[np.uint64]) -> list[bytes]:
    """Packed keys, `uint64 [n, 4]`, one by one."""
    return split_joined(np.ascontiguousarray(keys).tobytes())


def split_joined(joined: bytes) -> list[bytes]:
    """Keys that follow each other, one by one."""
    one_by_one: Any = np.frombuffer(joined, dtype=_ONE_KEY).tolist()
    keys: list[bytes] = one_by_one
    return keys


def join_keys(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Keys of 32 bytes as `uint64 [n, 4]`."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(len(keys), 4)


def key_as_is(block_hash: bytes) -> bytes:
    """The key of a block that rests as it is although the codec packs."""
    return split_keys(keys_as_is(join_keys([block_hash])))[0]


def keys_as_is(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same for many, `uint64 [n, 4]`."""
    other: NDArray[np.uint64] = hashes ^ _KEPT_AS_IS_WORDS
    return other
