"""Keys of blocks in a tier.

The key of a block is its hash. If the codec packs, a block that is stored raw nevertheless has another key. So the key
under which the tier has a block tells its encoding, and with it the size of its extent, before the block is read.
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
    """A list of keys, 32 bytes each, from an array `uint64 [n, 4]`."""
    return split_joined(np.ascontiguousarray(keys).tobytes())


def split_joined(joined: bytes) -> list[bytes]:
    """A list of keys, 32 bytes each, from `n * 32` bytes."""
    one_by_one: Any = np.frombuffer(joined, dtype=_ONE_KEY).tolist()
    keys: list[bytes] = one_by_one
    return keys


def join_keys(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """An array `uint64 [n, 4]` from keys of 32 bytes each."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(len(keys), 4)


def key_as_is(block_hash: bytes) -> bytes:
    """The key of a block that is stored raw although the codec packs; 32 bytes."""
    return split_keys(keys_as_is(join_keys([block_hash])))[0]


def keys_as_is(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same for many blocks, `uint64 [n, 4]` both ways."""
    other: NDArray[np.uint64] = hashes ^ _KEPT_AS_IS_WORDS
    return other
