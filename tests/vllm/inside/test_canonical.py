"""Engines of one and of two ranks over one lower tier: each finds what the other has written."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_support import BLOCK_SIZE, running, settle_disk
from owner_support import serving
from ranks_support import PROMPT_BLOCKS, run_program
from tiny_model import make_tiny_model
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvortex.codecs import PageEncodings
from kvortex.errors import ConfigError
from kvortex.hashing import Namespace
from kvortex.layout.canonical import BlockShard, CanonicalCache, TensorShard, runs_of
from kvortex.planes.data import pages_of
from kvortex.vllm.model import ServedGroups
from kvortex.vllm.plans import OwnedHandshake
from kvortex.vllm.scheduler.joining import canonical_of as joined
from kvortex.vllm.versions import IS_NEWER, heads_dim
from kvortex.vllm.worker.caches import register
from kvortex.vllm.worker.canonical import Canonical, Ranks, canonical_of
from kvortex.vllm.worker.parts import BlockParts, PartSizes

FIRST, SECOND = ([3 + step * i % 900 for i in range(200)] for step in (7, 11))

# Asks for both prompts, and for a short one that brings the last outcomes in.
PROGRAM = """
import json, sys
import vllm
from vllm.config import KVTransferConfig

def main():
    extra = {"pool": {"bytes": "64MiB", "pin_piece_bytes": 16 << 20}, **json.loads(sys.argv[3])}
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config=extra,
    )
    llm = vllm.LLM(
        model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=512,
        block_size=32, tensor_parallel_size=2, kv_transfer_config=connector, disable_log_stats=False,
    )
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers, cached = [], []
    for step in (7, 11, 5):
        prompt = [3 + step * i % 900 for i in range(200 if step > 5 else 3)]
        (out,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        answers.append(list(out.outputs[0].token_ids))
        cached.append(out.num_cached_tokens or 0)
    print("RESULT " + json.dumps({"answers": answers, "cached": cached}))

if __name__ == "__main__":
    main()
"""


PATIENT = {"pending_wait_s": 60.0}
"""The first request may come before the tier is open."""


def over(directory: Path, **tier: Any) -> dict[str, Any]:
    return {"disk": str(directory), "tier": {"canonical_layout": True, **tier}}


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
@pytest.mark.parametrize("num_heads", [2, 1])
def test_one_rank_and_two_find_what_the_other_has_written(
    tmp_path: Path, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a single KV head both ranks have it, and it is stored once."""
    monkeypatch.setattr("tiny_model.NUM_KV_HEADS", num_heads)
    model, options = make_tiny_model(tmp_path / "model", "qwen3"), {**over(tmp_path / "disk"), **PATIENT}
    with running(str(model), connector=False) as engine:
        expected = engine.generate([FIRST]) + engine.generate([SECOND])
    with running(str(model), options=options) as engine:
        assert engine.generate([FIRST]) == expected[:1]
        settle_disk(engine)
    two_ranks = run_program(tmp_path, model, PROGRAM, extra=options)
    assert two_ranks["cached"][:2] == [PROMPT_BLOCKS, 0]
    assert two_ranks["answers"][:2] == expected
    # The owner of the machine knows which layout its tiers keep.
    with (
        serving(tmp_path / "kv.sock", **over(tmp_path / "disk")) as owner,
        running(str(model), options={"owner": str(owner.path), **PATIENT}) as engine,
    ):
        assert engine.generate([SECOND]) == expected[1:]
        assert engine.loaded_blocks == PROMPT_BLOCKS // BLOCK_SIZE


def test_what_has_no_canonical_layout_stops_the_engine_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiny_model.HEAD_DIM", 32)
    model, options = make_tiny_model(tmp_path / "model", "qwen3"), {**over(tmp_path / "disk"), "codec": "fp8"}
    with (
        pytest.raises(ConfigError, match=r"no canonical layout: .*128: set codec to 'raw'"),
        running(str(model), options=options),
    ):
        pass


# -- what the workers say of their caches --------------------------------------------------------------

NUM_BLOCKS, TOKENS, SIZE = 8, 32, 64
ONE_RANK = Ranks(0, 1)


class Layer:
    """A layer of a model, of which earlier versions ask for its backend."""

    def __init__(self, backend: Any = CPUAttentionBackend) -> None:
        self.get_attn_backend = lambda: backend


def spec(kind: Any = FullAttentionSpec, heads: int = 2, **extra: Any) -> Any:
    arguments = {"block_size": TOKENS, "num_kv_heads": heads, "head_size": SIZE, "dtype": torch.float32, **extra}
    return kind(**{field.name: arguments[field.name] for field in fields(kind) if field.name in arguments})


def tensor_of(of_layer: Any) -> torch.Tensor:
    """As vLLM's CPU backend registers it."""
    heads, size = of_layer.num_kv_heads, of_layer.head_size
    if isinstance(of_layer, MLAAttentionSpec):
        shape: tuple[int, ...] = (NUM_BLOCKS, 1, TOKENS, size) if IS_NEWER else (NUM_BLOCKS, TOKENS, size)
    else:
        shape = (NUM_BLOCKS, heads, TOKENS, 2 * size) if IS_NEWER else (2, NUM_BLOCKS, heads, TOKENS, size)
    return torch.zeros(shape)


def canonical(
    specs: Sequence[tuple[str, Any]],
    ranks: Ranks = ONE_RANK,
    total_heads: int = 2,
    tensors: dict[str, torch.Tensor] | None = None,
    codec: str = "raw",
) -> Canonical | str:
    """Of one group of layers."""
    names = [name for name, _ in specs]
    kinds = {str(of_layer) for _, of_layer in specs}
    of_group = specs[0][1] if len(kinds) == 1 else UniformTypeKVCacheSpecs(TOKENS, dict(specs))
    groups = ServedGroups(SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(names, of_group)]))
    kv_caches = {name: tensor_of(of_layer) for name, of_layer in specs} if tensors is None else tensors
    registered, cache, here = register(kv_caches, groups, NUM_BLOCKS)
    pages = pages_of(cache, codec)
    sizes = PartSizes.of_groups(PageEncodings(pages), [p.sizes for p in pages], here, 1)
    layers = {name: Layer() for name in names}
    vllm_config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total_heads),
    )
    parts = BlockParts([sizes] * ranks.size, ranks.rank)
    return canonical_of(vllm_config, groups, cache, registered, here, ranks, parts, pages)


def shard_of(found: Canonical | str, number: int = 0) -> TensorShard:
    assert isinstance(found, Canonical)
    assert found.parts[0] is not None
    return found.parts[0].tensors[number]


def test_the_dimension_of_heads_is_that_of_the_backend() -> None:
    expected = (1, 1) if IS_NEWER else (2, 3)
    backends = (CPUAttentionBackend, TritonAttentionBackend)
    assert tuple(heads_dim(Layer(backend), spec()) for backend in backends) == expected


@pytest.mark.parametrize(
    ("heads", "total", "size", "held"),
    [
        (2, 2, 1, [(0, 2)]),
        (2, 4, 2, [(0, 4), (2, 4)]),
        (1, 4, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (1, 2, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (1, 1, 2, [(0, 1), (0, 1)]),
        (1, 8, 2, [(0, 2), (1, 2)]),  # a layer with fewer heads than the model says
    ],
)
def test_which_heads_a_rank_has(heads: int, total: int, size: int, held: list[tuple[int, int]]) -> None:
    found = [canonical([("layer", spec(heads=heads))], Ranks(rank, size), total) for rank in range(size)]
    assert [(shard_of(one).heads.first, shard_of(one).heads.total) for one in found] == held
    assert len({one.layout for one in found if isinstance(one, Canonical)}) == 1


def test_parts_begin_where_those_of_earlier_ranks_end() -> None:
    nbytes = 2 * TOKENS * 2 * SIZE * 4
    for rank in range(2):
        found = canonical([("layer", spec())], Ranks(rank, 2))
        assert isinstance(found, Canonical)
        raw, packed = found.parts
        assert raw is not None
        assert (raw.offset, raw.nbytes, packed) == (rank * nbytes, nbytes, None)


@pytest.mark.skipif(not IS_NEWER, reason="the older version does not say how many shards a layer has")
def test_a_spec_that_knows_its_shards_is_believed() -> None:
    found = [canonical([("layer", spec(max_tp_shards=2))], Ranks(rank, 4), 99) for rank in range(4)]
    assert [(shard_of(one).heads.first, shard_of(one).heads.total) for one in found] == [(0, 4), (0, 4), (2, 4), (2, 4)]
    assert "shards of its KV heads are not those of 4 ranks" in str(
        canonical([("layer", spec(max_tp_shards=3))], Ranks(0, 4))
    )


def test_latents_are_the_same_on_all_ranks() -> None:
    layers = [("heads", spec()), ("latent", spec(MLAAttentionSpec, heads=1, head_size=128))]
    for rank in range(2):
        found = canonical(layers, Ranks(rank, 2), 4)
        assert shard_of(found, 0).heads.total == 4
        assert (shard_of(found, 1).heads.first, shard_of(found, 1).heads.total) == (0, 1)
        assert shard_of(found, 1).canonical_nbytes == TOKENS * 128 * 4


def test_one_rank_alone_has_the_layout_of_several() -> None:
    alone = canonical([("layer", spec(heads=4))], Ranks(0, 1), 4)
    half = canonical([("layer", spec(heads=2))], Ranks(1, 2), 4)
    assert isinstance(alone, Canonical)
    assert isinstance(half, Canonical)
    assert alone.layout == half.layout
    window = canonical([("layer", spec(SlidingWindowSpec, heads=4, sliding_window=64))], Ranks(0, 1), 4)
    assert isinstance(window, Canonical)
    assert window.layout != alone.layout


def test_what_cannot_be_described_says_why() -> None:
    wide = torch.zeros(NUM_BLOCKS, 3, TOKENS, 128) if IS_NEWER else torch.zeros(2, NUM_BLOCKS, 3, TOKENS, 64)
    assert "in which 2 KV heads are not found: leave tier.canonical_layout out" in str(
        canonical([("layer", spec())], tensors={"layer": wide})
    )
    narrow = spec(head_size=32)  # a group of 128 elements is of two tokens
    assert "are not made of groups of 128: set codec to 'raw'" in str(canonical([("layer", narrow)], codec="fp8"))
    if "kv_quant_mode" in {field.name for field in fields(FullAttentionSpec)}:
        quantised = spec(kv_quant_mode=2, dtype=torch.int8)
        assert "has pages of quantised KV" in str(canonical([("layer", quantised)]))


def member(stage: int, stages: int, rank: int, ranks: int) -> OwnedHandshake:
    """What a worker says: a stage has one layer of its own."""
    found = canonical([(f"layer{stage}", spec(heads=4 // ranks))], Ranks(rank, ranks), 4)
    assert isinstance(found, Canonical)
    part = stage * ranks + rank
    raw = found.parts[0]
    assert raw is not None
    identity = {"tp_rank": rank, "tp_size": ranks, "pp_rank": stage, "pp_size": stages}
    namespace = Namespace("a", "1", "float32", b"layout", TOKENS, **identity)
    placed = (BlockShard(part * raw.nbytes, raw.tensors), None)
    return OwnedHandshake(
        "socket", "pool", namespace, part, stages * ranks, str(part), (), (), placed, namespace.canonical(found.layout)
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_of_one_rank_and_of_two_share_a_namespace_and_an_order(stages: int) -> None:
    found = []
    for ranks in (1, 2):
        members = [member(stage, stages, rank, ranks) for stage in range(stages) for rank in range(ranks)]
        cache = joined(members)
        assert isinstance(cache, CanonicalCache)
        (parts, packed) = cache.parts
        payload = sum(part.nbytes for part in parts)
        runs = runs_of(parts, payload + (8 * len(parts) if len(parts) > 1 else 0))
        found.append((cache.namespace, runs.nbytes, len(packed)))
    assert found[0] == found[1]
    other = joined([member(stage, 3 - stages, 0, 1) for stage in range(3 - stages)])
    assert isinstance(other, CanonicalCache)
    assert other.namespace != found[0][0]


def test_one_rank_without_a_canonical_layout_says_why_for_all() -> None:
    members = [member(0, 1, rank, 2) for rank in range(2)]
    members[1] = replace(members[1], canonical="because", canonical_namespace=None)
    assert joined(members) == "because"


def test_states_have_no_canonical_layout() -> None:
    state = MambaSpec(block_size=TOKENS, shapes=((4, 8),), dtypes=(torch.float32,), mamba_cache_mode="align")
    assert "has states, which ranks do not divide by KV heads" in str(
        canonical([("state", state)], tensors={"state": torch.zeros(NUM_BLOCKS, 32)})
    )
