"""Block hashes as one array, the form that compiled code reads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import InvalidHashError
from kvortex.types import BLOCK_HASH_BYTES

WORDS = BLOCK_HASH_BYTES // 8


def pack_keys(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Block hashes as `uint64 [len(keys), 4]`, read-only.

    Raises:
        InvalidHashError: a key is not 32 bytes.
    """
    try:
        joined = b"".join(keys)
    except TypeError:
        raise InvalidHashError(f"every key must be {BLOCK_HASH_BYTES} bytes") from None
    if set(map(len, keys)) - {BLOCK_HASH_BYTES}:
        raise InvalidHashError(f"every key must be {BLOCK_HASH_BYTES} bytes")
    return np.ndarray((len(keys), WORDS), np.uint64, joined)


def as_packed(keys: Sequence[bytes] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`keys` as `pack_keys` gives them, whichever form they come in.

    Raises:
        InvalidHashError: a key is not 32 bytes, or the array is not `uint64 [n, 4]`.
    """
    if not isinstance(keys, np.ndarray):
        return pack_keys(keys)
    if keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != WORDS:
        raise InvalidHashError(f"packed keys must be uint64 [n, {WORDS}], not {keys.dtype} {list(keys.shape)}")
    if keys.flags.writeable or not keys.flags.c_contiguous:
        keys = np.ascontiguousarray(keys).view()
        keys.flags.writeable = False  # one array type for the kernels: they are compiled once
    return keys
