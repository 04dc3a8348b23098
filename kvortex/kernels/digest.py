"""The block digest: 64 bits over a block's payload, the same value from every implementation.

With the payload as `n` little-endian 64-bit words `w[i]`, all arithmetic modulo 2**64:

    digest = n * LENGTH + sum(mix(w[i] ^ ((i + 1) * POSITION)) for i in range(n))

`mix` is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)
with its first shift at 32. It is a bijection, so a change of a single word always changes the digest. The position
enters before mixing, so swapped words or segments change the digest too. The length term distinguishes a payload
from its own beginning. A sum does not depend on the order: each thread adds the words that it holds. The digest
detects accidents, not attacks.

The term of a word is written once for each machine: `mix` for Python's integers, `digest_reference` for NumPy arrays,
`host.mix` for compiled code on the CPU, `cuda_ops.py` for the GPU.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

POSITION: Final = 0x9E3779B97F4A7C15
FIRST: Final = 0xBF58476D1CE4E5B9
SECOND: Final = 0x94D049BB133111EB
LENGTH: Final = 0xD6E8FEB86659FD93
MASK: Final = (1 << 64) - 1


def mix(word: int, key: int) -> int:
    """The term that one word adds to the digest, in Python's integers.

    Args:
        word: 64 bits of the payload.
        key: `(i + 1) * POSITION` for the word at index `i`; only its lowest 64 bits count.
    """
    x = word ^ (key & MASK)
    x = (x ^ (x >> 32)) * FIRST & MASK
    x = (x ^ (x >> 29)) * SECOND & MASK
    return x ^ (x >> 32)


def digest_reference(payload: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """Digest of a payload whose length is a multiple of 8 bytes; NumPy, plain and slow.

    Raises:
        ValueError: the length is not a multiple of 8.
    """
    data = np.frombuffer(payload, dtype=np.uint8)
    if data.size % 8:
        raise ValueError(f"a payload has whole 8-byte words, not {data.size} bytes")
    return int(digests_of_rows(data.view("<u8")[None])[0])


def digests_of_rows(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The digest of each row of words: `uint64 [n, k]` -> `uint64 [n]`."""
    positions = np.arange(1, rows.shape[1] + 1, dtype=np.uint64) * np.uint64(POSITION)
    mixed = rows ^ positions
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(SECOND)
    mixed = mixed ^ (mixed >> np.uint64(32))
    length = np.uint64(rows.shape[1] * LENGTH & MASK)
    digests: NDArray[np.uint64] = np.add.reduce(mixed, axis=1, dtype=np.uint64) + length
    return digests
