"""Groups of layers whose KV is kept alike, and what each kind of KV needs before a request can resume.

Most models have one group: full attention. Others mix kinds, such as sliding windows or states. A block is then named
by its hash *and* its group, and a request can resume only at a boundary at which every group has what it needs:

| kind | needed to resume after `n` tokens |
|---|---|
| full attention | all blocks of the `n` tokens |
| sliding window | the blocks of the last `reach - 1` tokens |
| chunked local attention | the blocks of the chunk of `reach` tokens that token `n` is in |
| state | the one block that ends at token `n` |

Private: it may change in any release; docs/api.md lists what is public.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError
from kvortex.types import BLOCK_HASH_BYTES, MAX_GROUPS, MissReason


class KVKind(StrEnum):
    """What the KV of a group of layers is, and so which of its blocks a request needs to resume."""

    FULL = "full"
    WINDOW = "window"
    CHUNK = "chunk"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers of one kind, whose blocks are keyed, moved and evicted together.

    Args:
        name: the group's name, by which calls name it.
        layers: names of the layers' tensors, as in `kv_caches`.
        block_size: tokens of a block; for a state, tokens between two snapshots.
        kind: full attention, sliding window, chunked local attention or state.
        reach: tokens that a query attends to, itself included (WINDOW), or tokens of a chunk (CHUNK); 0 for the others.
        exact: True if its bytes must never be packed, because they are quantised already. States never are.

    Raises:
        ConfigError: a field is empty or out of range.
    """

    name: str
    layers: tuple[str, ...]
    block_size: int
    kind: KVKind = KVKind.FULL
    reach: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        try:
            object.__setattr__(self, "kind", KVKind(self.kind))
        except ValueError:
            raise ConfigError(f"group {self.name!r}: kind is {self.kind!r}; it is one of {', '.join(KVKind)}") from None
        if not self.name:
            raise ConfigError("a group of layers needs a name")
        if self.block_size < 1:
            raise ConfigError(f"group {self.name!r}: block_size is {self.block_size}; it counts tokens, pass 1 or more")
        reaches = self.kind in (KVKind.WINDOW, KVKind.CHUNK)
        if reaches and self.reach < 1:
            raise ConfigError(f"group {self.name!r}: reach is {self.reach}; pass the tokens of a {self.kind.value}")
        if not reaches and self.reach:
            raise ConfigError(f"group {self.name!r}: {self.kind.value} attention has no reach, leave it out")

    @property
    def may_pack(self) -> bool:
        """True if a codec may store its blocks with a loss."""
        return not self.exact and self.kind is not KVKind.STATE

    def needed(self, num_tokens: int) -> range:
        """The blocks, by their number in a request, that are needed to resume after `num_tokens` whole blocks."""
        stop = num_tokens // self.block_size
        if self.kind is KVKind.STATE:
            return range(max(stop - 1, 0), stop)
        if self.kind is KVKind.WINDOW:
            return range(max(stop - -(-(self.reach - 1) // self.block_size), 0), stop)
        if self.kind is KVKind.CHUNK:
            return range(num_tokens // self.reach * self.reach // self.block_size, stop)
        return range(stop)


class MissingKV(NamedTuple):
    """What keeps a request from resuming further on: a block that is not there."""

    group: str
    num_tokens: int
    """The boundary at which it is missing."""
    block: int
    """Its number in the request, counted in blocks of its group."""
    reason: MissReason = MissReason.NEVER_STORED


class Match(NamedTuple):
    """How much of a request can be resumed.

    Attributes:
        num_tokens: tokens at which every group has what it needs.
        missing: what is missing to get further; None if nothing is.
    """

    num_tokens: int
    missing: MissingKV | None


class GroupSet:
    """The groups of one cache, in the order of their numbers.

    Args:
        groups: one or more groups.
        hash_block_size: tokens that one block hash stands for; it divides the block size of every group.

    Raises:
        ConfigError: there is no group, or too many; names or layers occur twice; or the block sizes do not fit.
    """

    def __init__(self, groups: Iterable[KVGroup], hash_block_size: int) -> None:
        self.groups = tuple(groups)
        self.hash_block_size = hash_block_size
        self._check()
        self.alignment = math.lcm(*(group.block_size for group in self.groups))
        """Tokens between two boundaries at which a request can resume."""
        self.anchor = next((n for n, group in enumerate(self.groups) if group.kind is KVKind.FULL), 0)
        """Number of the group without whose blocks those of all others are useless: the first with full attention."""
        self.tags = np.stack([self._tag(number) for number in range(len(self.groups))])
        """`uint64 [num_groups, 4]`: a block's key is its hash XOR the tag of its group. That of the anchor is zero."""
        self.tags.flags.writeable = False
        rules: dict[tuple[KVKind, int, int], list[int]] = {}
        for number, group in enumerate(self.groups):
            rules.setdefault((group.kind, group.block_size, group.reach), []).append(number)
        self._alike = [(self.groups[numbers[0]], numbers) for numbers in rules.values()]  # need the same blocks

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def is_single(self) -> bool:
        """True for a cache with one group."""
        return len(self.groups) == 1

    def number_of(self, name: str) -> int:
        """The number of a group; `ConfigError` if there is none of that name."""
        for number, group in enumerate(self.groups):
            if group.name == name:
                return number
        raise ConfigError(f"no group of layers is named {name!r}; there are {', '.join(g.name for g in self.groups)}")

    def hashes_a_block(self, number: int) -> int:
        """How many block hashes one block of a group spans. The last of them is the block's own."""
        return self.groups[number].block_size // self.hash_block_size

    def keys(self, hashes: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        """Keys of a group's blocks, `uint64 [m, 4]`, from the hashes of a whole request, `uint64 [n, 4]`."""
        step = self.hashes_a_block(number)
        return self.tagged(hashes[step - 1 :: step], number)

    def tagged(self, hashes: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        """Keys of a group's blocks from their own hashes, `uint64 [n, 4]` both ways."""
        if number == self.anchor:
            return hashes
        keys: NDArray[np.uint64] = hashes ^ self.tags[number]
        return keys

    def longest_match(self, found: Sequence[NDArray[np.bool_]], num_tokens: int) -> Match:
        """The last boundary at which every group has what it needs.

        Args:
            found: for each group which of a request's blocks are there, `bool [blocks of num_tokens]`.
            num_tokens: tokens of the request that may be resumed.
        """
        boundaries, served = self._boundaries(found, num_tokens)
        last = int(np.flatnonzero(np.logical_and.reduce(served))[-1])
        return Match(int(boundaries[last]), self._missing(found, served, boundaries, last))

    def resumable(self, found: Sequence[NDArray[np.bool_]], num_tokens: int) -> NDArray[np.int64]:
        """All boundaries, in tokens, at which every group has what it needs; arguments as in `longest_match`."""
        alike = [np.logical_and.reduce([found[number] for number in numbers]) for _, numbers in self._alike]
        boundaries = np.arange(num_tokens // self.alignment + 1, dtype=np.int64) * self.alignment
        served = [self._served(group, mask, boundaries) for (group, _), mask in zip(self._alike, alike, strict=True)]
        return boundaries[np.logical_and.reduce(served)]

    def _boundaries(
        self, found: Sequence[NDArray[np.bool_]], num_tokens: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.bool_]]]:
        boundaries = np.arange(num_tokens // self.alignment + 1, dtype=np.int64) * self.alignment
        served = [self._served(group, mask, boundaries) for group, mask in zip(self.groups, found, strict=True)]
        return boundaries, served

    def needed_keys(self, hashes: NDArray[np.uint64], num_tokens: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Keys of all blocks that are needed to resume after `num_tokens`, in the order of their worth.

        Args:
            hashes: hashes of the whole request, `uint64 [n, 4]`.
            num_tokens: a boundary.

        Returns:
            Keys, `uint64 [m, 4]`, and the number of each block's group, `uint8 [m]`.
        """
        blocks = [np.array(group.needed(num_tokens), dtype=np.int64) for group in self.groups]
        numbers = np.repeat(np.arange(len(self)), [len(b) for b in blocks])
        ends = np.concatenate([(b + 1) * g.block_size for b, g in zip(blocks, self.groups, strict=True)])
        keys = np.concatenate([self.keys(hashes, number)[b] for number, b in enumerate(blocks)])
        order = self.order(numbers, ends)
        return keys[order], numbers[order].astype(np.uint8)

    def _served(self, group: KVGroup, mask: NDArray[np.bool_], boundaries: NDArray[np.int64]) -> NDArray[np.bool_]:
        """At which boundaries a group has what it needs, `bool [num_boundaries]`."""
        stops = boundaries // group.block_size
        positions = np.arange(1, len(mask) + 1)
        runs = np.zeros(len(mask) + 1, dtype=np.int64)  # consecutive blocks that end before each position
        runs[1:] = positions - np.maximum.accumulate(np.where(mask, 0, positions))
        if group.kind is KVKind.STATE:
            needed = np.minimum(stops, 1)
        elif group.kind is KVKind.WINDOW:
            needed = np.minimum(stops, -(-(group.reach - 1) // group.block_size))
        elif group.kind is KVKind.CHUNK:
            needed = stops - boundaries // group.reach * group.reach // group.block_size
        else:
            needed = stops
        return np.asarray(runs[stops] >= needed)

    def _missing(
        self,
        found: Sequence[NDArray[np.bool_]],
        served: Sequence[NDArray[np.bool_]],
        boundaries: NDArray[np.int64],
        last: int,
    ) -> MissingKV | None:
        """What is missing at the boundary that full attention alone would reach, or, if that is this one, behind it."""
        if last + 1 == len(boundaries):
            return None
        anchor = served[self.anchor]
        reached = int(np.flatnonzero(anchor)[-1]) if self.groups[self.anchor].kind is KVKind.FULL else last
        boundary = reached if reached > last else last + 1
        num_tokens = int(boundaries[boundary])
        order = sorted(range(len(self.groups)), key=lambda number: number != self.anchor)
        number = next(number for number in order if not served[number][boundary])
        block = next(block for block in self.groups[number].needed(num_tokens) if not found[number][block])
        return MissingKV(self.groups[number].name, num_tokens, block)

    def order(self, numbers: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.intp]:
        """The order in which blocks of a request enter the eviction order, `intp [n]`: what is worth more comes first.

        Blocks go by the token at which they end; at one token the anchor comes first. So a request's tail is evicted
        before its head, and at each boundary what only serves that boundary goes before the prefix behind it.

        Args:
            numbers: the number of each block's group, `int64 [n]`.
            ends: tokens up to the end of each block, `int64 [n]`.
        """
        ranks = np.array([self._worth(group, n) for n, group in enumerate(self.groups)], dtype=np.int64)
        return np.lexsort((ranks[numbers], ends))

    def _worth(self, group: KVGroup, number: int) -> int:
        if number == self.anchor:
            return 0
        return 1 + (KVKind.FULL, KVKind.CHUNK, KVKind.WINDOW, KVKind.STATE).index(group.kind)

    def _tag(self, number: int) -> NDArray[np.uint64]:
        if number == self.anchor:
            return np.zeros(BLOCK_HASH_BYTES // 8, dtype=np.uint64)
        return np.frombuffer(hashlib.sha256(b"kvortex.group.v1 %d" % number).digest(), dtype=np.uint64)

    def _check(self) -> None:
        if not 1 <= len(self.groups) <= MAX_GROUPS:
            raise ConfigError(f"a cache has 1 to {MAX_GROUPS} groups of layers, not {len(self.groups)}")
        if self.hash_block_size < 1:
            raise ConfigError(f"hash_block_size is {self.hash_block_size}; it counts tokens, pass 1 or more")
        for what, values in (
            ("group", [group.name for group in self.groups]),
            ("layer", [layer for group in self.groups for layer in group.layers]),
        ):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ConfigError(f"{what} {twice[0]!r} is named twice")
        for group in self.groups:
            if group.block_size % self.hash_block_size:
                raise ConfigError(
                    f"group {group.name!r} has blocks of {group.block_size} tokens, which is no multiple of the "
                    f"{self.hash_block_size} tokens of a block hash: hash smaller blocks"
                )
