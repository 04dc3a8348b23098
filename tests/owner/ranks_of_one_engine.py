"""The ranks of one engine that fill the blocks of an owner's pool together, as the workers of vLLM do, without vLLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvortex.codecs import PageEncodings, Pages
from kvortex.hashing import Namespace, namespace_of_parts
from kvortex.index import pack_keys
from kvortex.kernels import HostKernels, HostPackKernels
from kvortex.kernels.digest import digests_of_rows
from kvortex.layout import PagedCache
from kvortex.layout.canonical import BlockShard, CanonicalCache, Heads, canonical_digest, shards_of
from kvortex.owner import OwnerClient, RemoteControl, RemoteTiering
from kvortex.planes.data import pages_of
from kvortex.tiering.canonical_blocks import shards_by_form
from kvortex.types import BlockHash, MissReason, SaveOutcome
from kvortex.vllm.worker.parts import WORD_BYTES, BlockParts, PartSizes
from tests.engine_support import BLOCK_SIZE

DEADLINE_S = 30.0


class RanksOfOneEngine:
    """Has the calls of an engine, over the tensors of several ranks.

    Args:
        path: the owner's socket.
        tensors: those of each rank.
        heads_dim: the dimension that counts KV heads.
        codec: name of the codec.
    """

    def __init__(
        self, path: Path, tensors: Sequence[Mapping[str, torch.Tensor]], heads_dim: int, codec: str = "raw"
    ) -> None:
        self._client = OwnerClient(path, DEADLINE_S)
        self._bytes = np.frombuffer(self._client.memory.map(0, self._client.pool_bytes), np.uint8)
        self._tensors = tensors
        caches = [PagedCache.from_tensors(of_rank, BLOCK_SIZE) for of_rank in tensors]
        pages = [pages_of(cache, codec) for cache in caches]
        sizes = [PartSizes.of_groups(PageEncodings(p), [p[0].sizes], [0], 1) for p in pages]
        count, groups = len(tensors), caches[0].groups
        self._parts = [BlockParts(sizes, own) for own in range(count)]
        self._form = int(codec != "raw")
        self._kernels = [kernels_of(of_rank[0], self._bytes) for of_rank in pages]
        namespaces, of_ranks = [], []
        for rank, (of_rank, cache) in enumerate(zip(tensors, caches, strict=True)):
            heads = {
                name: Heads(heads_dim, rank * tensor.shape[heads_dim], count * tensor.shape[heads_dim])
                for name, tensor in of_rank.items()
            }
            shards = shards_of(cache.layouts[0], {name: tensor.shape for name, tensor in of_rank.items()}, heads)
            by_form = shards_by_form(pages[rank][0], shards)
            offset = self._parts[rank].offset
            of_ranks.append([BlockShard(offset(form), of_form) for form, of_form in enumerate(by_form)])
            namespaces.append(
                Namespace(
                    "a",
                    "1",
                    "/".join(cache.dtypes),
                    cache.digest,
                    BLOCK_SIZE,
                    tp_rank=rank,
                    tp_size=count,
                    codec="raw" if codec == "raw" else f"{codec} within 0.05",
                )
            )
        in_tier = namespaces[0].canonical(canonical_digest(groups, [of_ranks[0][0].tensors]))
        parts = tuple(tuple(of_form) if of_form[0].tensors else () for of_form in zip(*of_ranks, strict=True))
        self.control = RemoteControl(
            self._client,
            namespace_of_parts(namespaces),
            self._parts[0].sizes,
            self._parts[0].encodings,
            groups,
            num_parts=count,
            canonical=CanonicalCache(in_tier.digest, parts),
        )
        self.tiering = RemoteTiering(self.control)

    async def __aenter__(self) -> "RanksOfOneEngine":
        assert await self.tiering.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tiering.aclose()
        self.control.close()

    async def save(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> list[SaveOutcome]:
        """Save blocks, and wait until they are written to the lower tier."""
        plan = self.control.plan_save(pack_keys(hashes), np.array(block_ids, np.int32), "save")
        transfer, words = plan.transfer, self._bytes.view(np.uint64)
        for parts, kernels in zip(self._parts, self._kernels, strict=True):
            digests = kernels.gather(transfer.block_ids, parts.place(transfer).offsets)
            digests = digests[0] if isinstance(digests, tuple) else digests
            parts.write_digests(words, transfer, digests)
        payload = self._parts[0].encodings.payloads[self._form]
        tails = (transfer.offsets + payload) // WORD_BYTES - len(self._parts)
        rows = words[tails[:, None] + np.arange(len(self._parts))]
        outcomes = self.control.finish_save(plan, digests_of_rows(rows))
        await self.tiering.flush()
        return list(outcomes)

    async def load(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> list[MissReason | None]:
        """Load blocks, those of the lower tier too; each rank checks its part."""
        keys = pack_keys(hashes)
        await self.tiering.fetch(keys).wait(timeout_s=DEADLINE_S)
        plan = self.control.plan_load(keys, np.array(block_ids, np.int32))
        transfer, intact = plan.transfer, np.ones(plan.transfer.num_blocks, np.bool_)
        for parts, kernels in zip(self._parts, self._kernels, strict=True):
            digests = kernels.scatter(transfer.block_ids, parts.place(transfer).offsets)
            intact &= parts.are_intact(self._bytes.view(np.uint64), transfer, plan.pins.digests, digests)
        return list(self.control.finish_load(plan, intact))


def kernels_of(pages: Pages, pool: NDArray[np.uint8]) -> HostKernels | HostPackKernels:
    """What moves the blocks of a rank in the form in which they are usually stored."""
    if pages.packing is None:
        return HostKernels(pages.layout, pool)
    return HostPackKernels(pages.layout, pages.packing, pool)


def shards(cache: Mapping[str, torch.Tensor], size: int, heads_dim: int) -> list[dict[str, torch.Tensor]]:
    """The tensors of each of some ranks, with copies of their KV heads."""
    return [
        {name: tensor.chunk(size, heads_dim)[rank].contiguous().clone() for name, tensor in cache.items()}
        for rank in range(size)
    ]


def together(tensors: Sequence[Mapping[str, torch.Tensor]], heads_dim: int) -> dict[str, Any]:
    """The tensors with the KV heads of all ranks."""
    return {name: torch.cat([of_rank[name] for of_rank in tensors], heads_dim) for name in tensors[0]}
