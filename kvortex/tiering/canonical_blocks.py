"""What re-lays the blocks of a cache, and which caches have a canonical layout."""

import numpy as np
from numpy.typing import NDArray

from kvortex.codecs import Encodings, Pages, packed_shards
from kvortex.errors import LayoutError
from kvortex.groups import GroupSet, KVKind
from kvortex.kernels.relayout import from_canonical, to_canonical
from kvortex.layout.canonical import BlockRuns, CanonicalCache, TensorShard, runs_of
from kvortex.tiers.payload import payload_digest


class CanonicalBlock:
    """Re-lays the blocks of one form.

    Args:
        runs: of which they consist.
        raw_nbytes: bytes of a canonical payload of the same group that is not packed; None if these are such blocks.
    """

    def __init__(self, runs: BlockRuns, raw_nbytes: int | None = None) -> None:
        self._runs = runs
        self.payload_nbytes = runs.payload_nbytes
        """Bytes of the payload in the pool."""
        self.nbytes = runs.nbytes
        """Bytes of the canonical payload."""
        self.raw_nbytes = runs.nbytes if raw_nbytes is None else raw_nbytes
        """Bytes of it when it is decoded."""

    def down(self, payload: NDArray[np.uint8], canonical: NDArray[np.uint8], digest: int) -> int | str:
        """Lay a block out canonically.

        Args:
            payload: the block in the pool, `uint8 [payload_nbytes]`.
            canonical: takes it, `uint8 [nbytes]`.
            digest: of the payload; where it has several parts, their own digests, which stand in it, count.

        Returns:
            The digest of the canonical payload, or why the block must not be stored.
        """
        agrees = to_canonical(self._runs, payload, canonical)
        behind = self._runs.digests
        expected = [digest] if behind is None else payload[behind].view(np.uint64).tolist()
        # Checked after it was read: so nothing that is damaged meanwhile passes.
        if self._digests(payload) != expected:
            return "the block is damaged in the pool"
        return payload_digest(canonical) if agrees else "ranks that should hold the same KV do not"

    def up(self, canonical: NDArray[np.uint8], payload: NDArray[np.uint8], digest: int) -> int | None:
        """Lay a canonical payload out as the pool has it.

        Args:
            canonical: what the tier has, `uint8 [nbytes]`.
            payload: takes the block, `uint8 [payload_nbytes]`.
            digest: of the canonical payload.

        Returns:
            The digest of the payload; None if the canonical payload is damaged.
        """
        from_canonical(self._runs, payload, canonical)
        if payload_digest(canonical) != digest:
            return None
        digests = self._digests(payload)
        if self._runs.digests is None:
            return digests[0]
        payload[self._runs.digests].view(np.uint64)[:] = digests
        return payload_digest(payload)

    def _digests(self, payload: NDArray[np.uint8]) -> list[int]:
        return [payload_digest(payload[part.place]) for part in self._runs.parts]


def why_not_canonical(groups: GroupSet) -> str:
    """Why the blocks of these groups have no canonical layout, and what to do; empty if they can have one."""
    if states := [group.name for group in groups.groups if group.kind is KVKind.STATE]:
        return (
            f"group {states[0]!r} has states, which ranks do not divide by KV heads: leave tier.canonical_layout out "
            "for this model"
        )
    return ""


def shards_by_form(pages: Pages, shards: tuple[TensorShard, ...]) -> tuple[tuple[TensorShard, ...], ...]:
    """The shards of the raw and of the packed blocks of one group; none of these if they are not packed.

    Args:
        pages: the blocks of the group.
        shards: those of raw blocks.

    Raises:
        LayoutError: packed blocks have no canonical layout.
    """
    return shards, packed_shards(pages.layout, shards, pages.packing) if pages.packing else ()


def canonical_blocks(cache: CanonicalCache, encodings: Encodings, num_parts: int) -> list[CanonicalBlock | None]:
    """What re-lays the blocks of a cache, by their forms.

    Args:
        cache: how blocks become canonical.
        encodings: how they are encoded in the pool.
        num_parts: how many parts a block has.

    Raises:
        LayoutError: the parts of a block are not those of its payload.
    """
    there = [form % 2 == 0 or encodings.packs[form // 2] for form in range(len(encodings.payloads))]
    if [len(parts) for parts in cache.parts] != [num_parts * has_form for has_form in there]:
        raise LayoutError(
            f"canonical layouts of {[len(parts) for parts in cache.parts]} parts, for blocks of {num_parts} parts in "
            f"{there.count(True)} of {len(there)} forms"
        )
    blocks: list[CanonicalBlock | None] = []
    for form, parts in enumerate(cache.parts):
        if not parts:
            blocks.append(None)
            continue
        raw = blocks[form - 1] if form % 2 else None
        blocks.append(CanonicalBlock(runs_of(parts, encodings.payloads[form]), raw.nbytes if raw else None))
    return blocks
