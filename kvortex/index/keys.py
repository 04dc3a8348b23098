"""Packs block hashes into one array, which compiled code reads."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import InvalidHashError
from kvortex.types import BLOCK_HASH_BYTES

WORDS = BLOCK_HASH_BYTES // 8

_WANTED = f"pass a list of hashes of {BLOCK_HASH_BYTES} bytes each, as hash_blocks gives them"


def pack_keys(keys: Iterable[bytes] | NDArray[np.generic]) -> NDArray[np.uint64]:
    """Copy block hashes into a read-only array `uint64 [n, 4]`.

    Args:
        keys: an ordered iterable of `bytes` of length 32, such as a list or a generator; or an array with 32 bytes per
            row: `S32`, `V32` or `object` `[n]`, `uint8 [n, 32]` or `uint64 [n, 4]`.

    Raises:
        InvalidHashError: a key is not 32 bytes, or `keys` has no order (a set) or is a single `bytes`.
    """
    if not isinstance(keys, list | tuple):
        if hasattr(keys, "__array__"):
            return _pack_array(keys)
        keys = _listed(keys)
    try:
        joined = b"".join(keys)
    except TypeError:
        _refuse(keys)
    if set(map(len, keys)) - {BLOCK_HASH_BYTES} or len(joined) != BLOCK_HASH_BYTES * len(keys):
        _refuse(keys)
    return np.ndarray((len(keys), WORDS), np.uint64, joined)


def as_packed(keys: Sequence[bytes] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `keys` in the form of `pack_keys`. A packed array that is read-only and contiguous is not copied.

    Args:
        keys: block hashes as `bytes` of length 32, or packed as `uint64 [n, 4]`.

    Raises:
        InvalidHashError: a key is not 32 bytes, or the array is not `uint64 [n, 4]`.
    """
    if not isinstance(keys, np.ndarray):
        return pack_keys(keys)
    if keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != WORDS:
        raise InvalidHashError(f"packed keys must be uint64 [n, {WORDS}], not {keys.dtype} {list(keys.shape)}")
    if keys.flags.writeable or not keys.flags.c_contiguous:
        keys = np.ascontiguousarray(keys).view()
        keys.flags.writeable = False  # compiled steps see one array type only, so each is compiled once
    return keys


def _pack_array(given: Any) -> NDArray[np.uint64]:
    try:
        keys = np.asarray(given)
    except (TypeError, RuntimeError) as error:  # a tensor on a GPU, or one that needs gradients
        raise InvalidHashError(f"a {type(given).__name__} is not an array on the host ({error}): {_WANTED}") from error
    if keys.ndim == 1 and (keys.dtype == np.object_ or not keys.size):
        return pack_keys(keys.tolist())
    rows = keys.ndim == 1 and keys.dtype.kind in "SV"
    words = keys.ndim == 2 and keys.dtype in (np.dtype(np.uint8), np.dtype(np.uint64))
    if not (rows or words) or keys.itemsize * keys[:1].size != BLOCK_HASH_BYTES * len(keys[:1]):
        raise InvalidHashError(f"an array of {keys.dtype} and shape {list(keys.shape)} holds no hashes: {_WANTED}")
    return np.ndarray((len(keys), WORDS), np.uint64, keys.tobytes())


def _listed(keys: Iterable[bytes]) -> list[bytes]:
    if isinstance(keys, str | bytes | bytearray | memoryview):
        raise InvalidHashError(f"a single {type(keys).__name__} was passed as hashes: {_WANTED}")
    if isinstance(keys, set | frozenset | Mapping) or not isinstance(keys, Iterable):
        raise InvalidHashError(f"{type(keys).__name__} has no hashes in an order: {_WANTED}")
    return list(keys)


def _refuse(keys: Sequence[bytes]) -> NoReturn:
    for position, key in enumerate(keys):
        if not isinstance(key, bytes | bytearray):
            raise InvalidHashError(f"hash {position} is {type(key).__name__}, not 32 bytes: {_WANTED}")
        if len(key) != BLOCK_HASH_BYTES:
            raise InvalidHashError(f"hash {position} has {len(key)} bytes, not {BLOCK_HASH_BYTES} bytes: {_WANTED}")
    raise InvalidHashError(f"every key must be {BLOCK_HASH_BYTES} bytes: {_WANTED}")
