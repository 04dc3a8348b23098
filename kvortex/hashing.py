"""Chained block hashes, the namespace in which they are valid, and the keys of a shared tier.

The hash of block `i` of a prompt is

    h[i] = SHA256(h[i-1] || token ids as little-endian uint32 || encode(call's keys) || encode(block's keys))

where `h[-1]` is the parent or `ROOT_HASH`. So a hash identifies a whole prefix, not only the tokens of its block. The
call's `extra_keys` enter the first block only, and are empty for the others. `encode` is a count followed by tagged,
length-prefixed items: two different tuples never have the same encoding, and that of the empty tuple is four zero
bytes. Nothing here depends on the process, the machine or `PYTHONHASHSEED`.

The block size is not hashed: the namespace keeps hashes of different block sizes apart.

Private: it may change in any release; docs/api.md lists what is public.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.errors import ConfigError, InvalidHashError
from kvortex.types import BLOCK_HASH_BYTES, BlockHash

ExtraKey = str | bytes | int

ROOT_HASH = BlockHash(hashlib.sha256(b"kvortex.block_hash.root.v1").digest())
"""Parent of every first block: the SHA-256 of a versioned string, the same on every machine."""

SCHEMA_VERSION = 1
"""Incremented when the meaning of hashed or stored data changes: then older entries of shared tiers never match."""

_TOKEN_BYTES = 4
_TOKEN_LIMIT = 2**32
_COUNT_BYTES = 4
_LENGTH_BYTES = 8
_NO_KEYS = bytes(_COUNT_BYTES)


def hash_blocks(
    token_ids: Sequence[int] | npt.ArrayLike,
    block_size: int = 16,
    *,
    parent: BlockHash | None = None,
    extra_keys: Sequence[ExtraKey] = (),
    block_extra_keys: Mapping[int, Sequence[ExtraKey]] | None = None,
) -> list[BlockHash]:
    """Hash the full blocks of a prompt.

    Args:
        token_ids: `[num_tokens]` integers in `[0, 2**32)`: a sequence, a NumPy array, or any object that
            NumPy can convert (a host tensor). The `num_tokens % block_size` tokens at the end are not hashed.
        block_size: tokens per block, at least 1.
        parent: hash of the block before the first token; `None` stands for `ROOT_HASH`.
        extra_keys: other data that must agree, such as an adapter's id or a cache salt. They enter the first block of
            this call, and through the chain all blocks after it; a call that continues a chain with `parent` need not
            repeat them.
        block_extra_keys: block index, relative to this call's first block -> extra keys of that block, such as the
            identity of an image in it. Indices behind the last full block are ignored.

    Returns:
        `num_tokens // block_size` hashes of 32 bytes, in order.

    Raises:
        InvalidHashError: a token id is out of range or no integer, the block size is invalid, the parent is not 32
            bytes, or an extra key is not `str`, `bytes` or `int`.
    """
    if not _is_int(block_size) or block_size < 1:
        raise InvalidHashError(f"block_size must be an int of at least 1, not {block_size!r}")
    block_size = int(block_size)
    previous = ROOT_HASH if parent is None else parent
    _check_hash(previous, "parent")
    tokens = _token_bytes(token_ids)
    stride = block_size * _TOKEN_BYTES
    num_blocks = len(tokens) // stride
    suffixes = _suffixes(extra_keys, block_extra_keys or {})

    # Plain bytes, because slicing and adding 100 bytes takes less time than memoryviews and a join.
    sha256, suffix_of, no_keys = hashlib.sha256, suffixes.get, _NO_KEYS + _NO_KEYS
    hashes: list[BlockHash] = []
    for index in range(num_blocks):
        start = index * stride
        message = previous + tokens[start : start + stride] + suffix_of(index, no_keys)
        previous = BlockHash(sha256(message).digest())
        hashes.append(previous)
    return hashes


def cache_key(namespace: "Namespace", block_hash: BlockHash) -> bytes:
    """The key of a block in a tier that several namespaces share, 32 bytes: SHA256(namespace digest || hash).

    Raises:
        InvalidHashError: `block_hash` is not 32 bytes.
    """
    _check_hash(block_hash, "block_hash")
    return hashlib.sha256(namespace.digest + block_hash).digest()


@dataclass(frozen=True)
class Namespace:
    """Everything besides the tokens that must agree before stored bytes may be reused.

    Raises:
        ConfigError: a field is empty, of the wrong type or out of range.
    """

    model: str
    """Id of the model."""
    weights_revision: str
    """Revision of the weights, such as a commit; `""` if there is none."""
    kv_dtype: str
    """Element type of the paged cache, such as `"bfloat16"`."""
    layout: bytes
    """Digest of the layout, see `KVLayout.digest`."""
    block_size: int
    """Tokens per block."""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    codec: str = "raw"
    """Name of the codec of stored blocks."""
    fingerprint: str = ""
    """Digest of everything else that changes the bytes, such as the model's configuration; `""` if there is none."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("model", "weights_revision", "kv_dtype", "codec", "fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) or (not value and name not in ("weights_revision", "fingerprint")):
                raise ConfigError(f"{name} must be a non-empty str, not {value!r}")
        if not isinstance(self.layout, bytes) or not self.layout:
            raise ConfigError(f"layout must be the segment table's digest as bytes, not {self.layout!r}")
        for name, least in (("block_size", 1), ("tp_size", 1), ("pp_size", 1), ("schema_version", 1)):
            _check_at_least(name, getattr(self, name), least)
        for name, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            _check_at_least(f"{name}_rank", rank, 0)
            if rank >= size:
                raise ConfigError(f"{name}_rank {rank} is outside {name}_size {size}")

    @cached_property
    def digest(self) -> bytes:
        """Identifies the namespace, 32 bytes: SHA-256 of a version string and of all fields with their names."""
        named = [item for field in fields(self) for item in (field.name, getattr(self, field.name))]
        return hashlib.sha256(_encode_keys(["kvortex.namespace.v1", *named])).digest()

    def canonical(self, layout: bytes) -> "Namespace":
        """That of canonical blocks, the same for any rank and any number of tensor-parallel ranks.

        Args:
            layout: digest of the canonical layout, see `kvortex.layout.canonical.canonical_digest`.
        """
        return replace(self, layout=layout, tp_rank=0, tp_size=1)


def namespace_of_parts(parts: Sequence[Namespace]) -> bytes:
    """Digest of the namespace of blocks that several ranks fill together, 32 bytes.

    Args:
        parts: the namespace of each rank's part, in the order of the parts. That of a single part stays as it is.
    """
    if len(parts) == 1:
        return parts[0].digest
    return hashlib.sha256(_encode_keys(["kvortex.parts.v1", *(part.digest for part in parts)])).digest()


def _token_bytes(token_ids: Any) -> bytes:
    """Token ids as consecutive little-endian uint32."""
    try:
        array = np.asarray(token_ids)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidHashError(
            f"token_ids must be convertible to a NumPy array (move a device tensor to the host): {error}"
        ) from error
    if array.ndim != 1:
        raise InvalidHashError(f"token_ids must be one-dimensional, not of shape {array.shape}")
    if array.size == 0:
        return b""
    if array.dtype.kind not in "iu":
        raise InvalidHashError(f"token_ids must be integers in [0, 2**32), not of dtype {array.dtype}")
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest >= _TOKEN_LIMIT:
        raise InvalidHashError(f"token ids must lie in [0, 2**32), found [{lowest}, {highest}]")
    return array.astype("<u4").tobytes()


def _suffixes(extra_keys: Sequence[ExtraKey], block_extra_keys: Mapping[int, Sequence[ExtraKey]]) -> dict[int, bytes]:
    """Block index -> encoded extra keys, for the blocks that have any."""
    first = _encode_keys(extra_keys)
    suffixes = {0: first + _NO_KEYS}
    for index, keys in block_extra_keys.items():
        if not _is_int(index) or index < 0:
            raise InvalidHashError(f"block_extra_keys: {index!r} is no block index")
        suffixes[int(index)] = (_NO_KEYS if index else first) + _encode_keys(keys)
    return suffixes


def _encode_keys(keys: Sequence[ExtraKey]) -> bytes:
    """An injective encoding: uint32 count, then for each key a tag, a uint64 length and the bytes, little-endian."""
    if not isinstance(keys, tuple | list):
        raise InvalidHashError(f"extra keys must be a tuple or list, not {type(keys).__name__}")
    parts = [len(keys).to_bytes(_COUNT_BYTES, "little")]
    for key in keys:
        tag, payload = _encode_key(key)
        parts += (tag, len(payload).to_bytes(_LENGTH_BYTES, "little"), payload)
    return b"".join(parts)


def _encode_key(key: ExtraKey) -> tuple[bytes, bytes]:
    """Tag and bytes of one key: UTF-8, the bytes themselves, or the shortest two's complement."""
    if isinstance(key, str):
        return b"s", key.encode("utf-8", "surrogatepass")
    if isinstance(key, bytes):
        return b"b", key
    if _is_int(key):
        key = int(key)
        size = (key if key >= 0 else ~key).bit_length() // 8 + 1
        return b"i", key.to_bytes(size, "little", signed=True)
    raise InvalidHashError(f"an extra key must be str, bytes or int, not {type(key).__name__}")


def _check_hash(value: object, name: str) -> None:
    if not isinstance(value, bytes) or len(value) != BLOCK_HASH_BYTES:
        raise InvalidHashError(f"{name} must be {BLOCK_HASH_BYTES} bytes, not {value!r}")


def _check_at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an int of at least {least}, not {value!r}")


def _is_int(value: object) -> bool:
    """True for integers, those of NumPy included, but not for a `bool`: `True` must not count as 1."""
    return isinstance(value, Integral) and not isinstance(value, bool)
