"""The engine over a cache with several groups of layers: bytes, codecs, misses and matches."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kvortex import KVortexEngine, MissReason, SaveOutcome
from kvortex.groups import KVGroup, Match, MissingKV
from kvortex.index import pack_keys
from kvortex.sched.batcher import Batch
from kvortex.testing import Fault
from tests.engine_support import BLOCK_SIZE
from tests.groups_support import (
    CACHES,
    GROUPS,
    GroupedCache,
    Tables,
    apart,
    grouped_engine,
    groups_config,
    ids_of,
    in_shared_pages,
    places,
    request,
    tables,
)

NUM_TOKENS = 12 * BLOCK_SIZE


def expect(cache: GroupedCache, into: Tables, content: dict[str, list[bytes]]) -> dict[str, bytes]:
    """All bytes of the cache if just these blocks get these contents. The cache itself stays as it is."""
    before = {name: tensor.clone() for name, tensor in cache.tensors.items()}
    for group, ids in into.items():
        for block_id, piece in zip([b for b in ids if b >= 0], content[group], strict=True):
            cache.write(group, block_id, piece)
    expected = cache.snapshot()
    for name, tensor in cache.tensors.items():
        tensor.copy_(before[name])
    return expected


# -- bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3, 0])
@pytest.mark.parametrize("name", CACHES)
async def test_blocks_of_all_groups_come_back_and_nothing_else_changes(name: str, window: int | None) -> None:
    cache, hashes = CACHES[name](), request()
    cache.fill(seed=1)
    shared = name == "in shared pages"
    source, target = tables(12, places(shared, 0), window), tables(12, places(shared, 1), window)
    async with grouped_engine(cache) as engine:
        saved = await engine.save_blocks(hashes, source)
        assert saved.ok
        assert saved.num_stored == ids_of(source)
        expected = expect(cache, target, cache.blocks(source))
        loaded = await engine.load_blocks(hashes, target)
        assert loaded.ok
        assert loaded.block_ids == tuple(b for ids in target.values() for b in ids if b >= 0)
        assert loaded.groups == tuple(group for group, ids in target.items() for b in ids if b >= 0)
        assert cache.snapshot() == expected


def paged(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def many_kinds() -> GroupedCache:
    """Six groups whose blocks have 8 to 64 tokens, in layouts of all sorts; a block hash stands for 8 tokens."""
    pages = torch.zeros(20, 3, 16, 2, 64, dtype=torch.float16)  # three layers side by side in a page
    tensors = {
        "k and v first": paged(2, 20, 16, 2, 64),
        "heads first": paged(2, 20, 2, 16, 64).transpose(2, 3),
        "side by side.0": pages[:, 0],
        "side by side.1": pages[:, 1],
        "side by side.2": pages[:, 2],
        "latent": paged(26, 8, 576, dtype=torch.bfloat16),
        "bytes": paged(28, 32, 656, dtype=torch.uint8),
        "state": paged(10, 4, 16, 32, dtype=torch.float32),
    }
    dims = dict.fromkeys(tensors, 0) | {"k and v first": 1, "heads first": 1}
    groups = (
        KVGroup("window", ("k and v first",), 16, "window", 24),
        KVGroup("full", ("heads first", "side by side.1"), 16),
        KVGroup("other full", ("side by side.0", "side by side.2"), 16),
        KVGroup("latent", ("latent",), 8, "chunk", 48),
        KVGroup("bytes", ("bytes",), 32, exact=True),
        KVGroup("state", ("state",), 64, "state"),
    )
    return GroupedCache(tensors, dims, groups)


async def test_groups_of_any_layout_and_block_size_on_interleaved_memory() -> None:
    cache = many_kinds()
    cache.fill(seed=2)
    hashes = request(16)  # of 8 tokens each: 128 tokens
    counts = {"window": 8, "full": 8, "other full": 8, "latent": 16, "bytes": 4, "state": 2}
    source = {group: list(range(count)) for group, count in counts.items()}
    first = {"window": 12, "full": 11, "other full": 10, "latent": 9, "bytes": 20, "state": 5}
    target = {group: list(range(first[group], first[group] + count))[::-1] for group, count in counts.items()}
    target = {group: ids if group != "latent" else list(range(10, 26)) for group, ids in target.items()}
    async with KVortexEngine.create(groups_config()) as engine:
        cache.register(engine, hash_block_size=8)
        assert (await engine.save_blocks(hashes, source)).num_stored == sum(counts.values())
        expected = expect(cache, target, cache.blocks(source))
        assert (await engine.load_blocks(hashes, target)).ok
        assert cache.snapshot() == expected
        assert engine.match_request(hashes) == Match(128, None)
        assert engine.match_prefix(hashes) == 16
        assert engine.check_blocks(hashes).tolist() == ([False] * 7 + [True]) * 2


async def test_the_same_hash_in_two_groups_is_two_blocks() -> None:
    cache, hashes = in_shared_pages(), request(4)
    cache.fill(seed=3)
    full, window = [0, 1, 2, 3], [4, 5, 6, 7]
    async with grouped_engine(cache) as engine:
        await engine.save_blocks(hashes, {"full": full})
        assert engine.check_blocks(hashes, "full").tolist() == [True] * 4
        assert engine.check_blocks(hashes, "window").tolist() == [False] * 4
        await engine.save_blocks(hashes, {"window": window})
        expected = cache.blocks({"full": full, "window": window})
        target = {"window": [20, 21, 22, 23], "full": [24, 25, 26, 27]}
        assert (await engine.load_blocks(hashes, target)).ok
        assert cache.blocks(target) == expected


async def test_a_part_of_the_groups_and_outcomes_in_the_order_of_the_call() -> None:
    cache, hashes = apart(), request()
    cache.fill(seed=4)
    async with grouped_engine(cache) as engine:
        saved = await engine.save_blocks(hashes, {"state": [0, -1, 2], "full": [*range(4), *[-1] * 8]})
        assert saved.groups == ("state",) * 2 + ("full",) * 4
        assert saved.outcomes == (SaveOutcome.STORED,) * 6
        loaded = await engine.load_blocks(hashes, {"full": [10, 11, -1, -1, 12, *[-1] * 7], "state": [20, 21, 22]})
        assert loaded.block_ids == (10, 11, 12, 20, 21, 22)
        assert loaded.groups == ("full",) * 3 + ("state",) * 3
        missed = MissReason.NEVER_STORED
        assert loaded.outcomes == (None, None, missed, None, missed, None)
        assert loaded.missed_block_ids == (12, 21)
        again = await engine.save_blocks(hashes, {"full": range(12), "state": [0, 1, 2]})
        already, stored = SaveOutcome.ALREADY_STORED, SaveOutcome.STORED
        assert again.outcomes == (*[already] * 4, *[stored] * 8, already, stored, already)


@pytest.mark.usefixtures("short_parts")
async def test_a_long_request_is_planned_in_parts() -> None:
    layers = {"f": paged(400, 16, 16), "w": paged(400, 16, 16), "s": paged(100, 64, 16)}
    groups = (KVGroup("f", ("f",), 16), KVGroup("w", ("w",), 16, "window", 40), KVGroup("s", ("s",), 64, "state"))
    cache = GroupedCache(layers, dict.fromkeys(layers, 0), groups)
    cache.fill(seed=5)
    hashes = request(200)
    source: Tables = {"f": list(range(200)), "w": list(range(200)), "s": list(range(50))}
    target: Tables = {"f": list(range(200, 400)), "w": [-1] * 197 + [397, 398, 399], "s": [-1] * 49 + [99]}
    async with grouped_engine(cache) as engine:
        assert (await engine.save_blocks(hashes, source)).num_stored == 450
        content = cache.blocks({"f": source["f"], "w": source["w"][-3:], "s": source["s"][-1:]})
        expected = expect(cache, target, content)
        assert (await engine.load_blocks(hashes, target)).num_loaded == 204
        assert cache.snapshot() == expected


async def test_a_call_moves_the_blocks_of_each_group_together() -> None:
    """A request names its blocks from its beginning on; a batch for each of them would take a hundred times as long."""
    cache = in_shared_pages()
    batches: list[Batch] = []

    def note(_: int, batch: Batch) -> None:
        batches.append(batch)

    config = groups_config(transfer={"max_batch_bytes": "64MiB", "linger_s": 0.0})
    async with grouped_engine(cache, config, note) as engine:
        assert (await engine.save_blocks(request(), tables(12, places(True, 0)))).ok
        assert (await engine.load_blocks(request(), tables(12, places(True, 1)))).ok
    assert [(batch.form, batch.num_blocks) for batch in batches] == [(0, 12), (2, 12), (4, 3)] * 2


async def test_windows_over_the_same_pages_move_in_one_batch() -> None:
    """Their blocks have the same bytes at the same addresses, so a load is not a batch a group."""
    pages = torch.zeros(64, 2, BLOCK_SIZE, 2, 64, dtype=torch.bfloat16)
    groups = [KVGroup("full", ("full",), BLOCK_SIZE)]
    groups += [KVGroup(name, (name,), BLOCK_SIZE, "window", reach) for name, reach in (("near", 40), ("far", 80))]
    names = [group.name for group in groups]
    cache = GroupedCache(dict.fromkeys(names, pages), dict.fromkeys(names, 0), groups)
    cache.fill(seed=6)
    batches: list[Batch] = []

    def note(_: int, batch: Batch) -> None:
        batches.append(batch)

    source = {name: list(range(8 * n, 8 * n + 8)) for n, name in enumerate(names)}
    target = {name: list(range(56 - 8 * n, 64 - 8 * n)) for n, name in enumerate(names)}
    config = groups_config(transfer={"max_batch_bytes": "64MiB", "linger_s": 0.0})
    async with grouped_engine(cache, config, note) as engine:
        assert (await engine.save_blocks(request(8), source)).ok
        content = cache.blocks(source)
        assert (await engine.load_blocks(request(8), target)).ok
    assert cache.blocks(target) == content
    assert [(batch.form, batch.num_blocks) for batch in batches] == [(0, 24)] * 2


@pytest.mark.parametrize("call", ["save_blocks", "load_blocks"])
@pytest.mark.parametrize(
    "named", [{}, {"full": [-1] * 12}, {"full": [-1] * 12, "window": [-1] * 12, "state": [-1] * 3}]
)
async def test_a_call_without_blocks(call: str, named: Tables) -> None:
    async with grouped_engine(apart()) as engine:
        result = await getattr(engine, call)(request(), named)
        assert (result.outcomes, result.groups) == ((), ())


# -- codecs ------------------------------------------------------------------------------------------


EXACT = KVGroup("exact", ("exact",), BLOCK_SIZE, exact=True)
FP8 = {"codec": {"name": "fp8"}}


def with_an_exact_group() -> GroupedCache:
    cache = apart((*GROUPS, EXACT))
    cache.tensors["exact"] = torch.zeros(30, BLOCK_SIZE, 2, 64, dtype=torch.bfloat16)
    cache.block_dims["exact"] = 0
    return cache


async def test_a_codec_packs_floats_and_never_states_or_what_must_stay_exact() -> None:
    cache, hashes = with_an_exact_group(), request()
    cache.fill_with_numbers(seed=6)
    source = tables(12, places(False, 0)) | {"exact": list(range(12))}
    target = tables(12, places(False, 1)) | {"exact": list(range(12, 24))}
    async with grouped_engine(cache, groups_config(**FP8)) as engine:
        assert (await engine.save_blocks(hashes, source)).ok
        assert (await engine.load_blocks(hashes, target)).ok
        used = engine.get_stats().pools[0].allocated_bytes
        raw = {group: len(cache.block(group, 0)) for group in cache.groups}
        assert used < 12 * 0.52 * (raw["full"] + raw["window"]) + 12 * raw["exact"] + 3 * raw["state"] + 4096
        first, second = cache.blocks(source), cache.blocks(target)
        assert second["state"] == first["state"]
        assert second["exact"] == first["exact"]
        for group in ("full", "window"):
            assert second[group] != first[group], "packing rounds"
            for a, b in zip(source[group], target[group], strict=True):
                for saved, loaded in zip(cache.parts(group, a), cache.parts(group, b), strict=True):
                    error = (loaded.float() - saved.float()).norm() / saved.float().norm()
                    assert error < 0.05


async def test_what_packing_would_hurt_is_kept_as_it_is_in_its_group_alone() -> None:
    cache, hashes = apart(), request(4)
    cache.fill_with_numbers(seed=7)
    cache.tensors["window.0"][2, 3, 1, 5] = float("inf")
    cache.tensors["ssm"][0, 1, 2, 3] = float("nan")
    source, target = tables(4, places(False, 0)), tables(4, places(False, 1))
    async with grouped_engine(cache, groups_config(**FP8)) as engine:
        assert (await engine.save_blocks(hashes, source)).outcomes == (SaveOutcome.STORED,) * 9
        assert engine.get_stats().kept_as_is_blocks == 1
        assert (await engine.load_blocks(hashes, target)).ok
        exact = [a == b for a, b in zip(*(cache.blocks(named)["window"] for named in (source, target)), strict=True)]
        assert exact == [False, False, True, False]
        assert cache.blocks(source)["state"] == cache.blocks(target)["state"]


# -- misses and matches ------------------------------------------------------------------------------


def key_of(engine: KVortexEngine, block_hash: bytes, group: str) -> np.ndarray:
    groups = engine._planes()[1].cache.groups
    return groups.tagged(pack_keys([block_hash]), groups.number_of(group))


def flip_a_bit(engine: KVortexEngine, block_hash: bytes, group: str) -> None:
    """Flip a bit of a block's bytes in the pool."""
    control, data = engine._planes()
    held = control.hold(key_of(engine, block_hash, group))
    data.pool.bytes[int(held.offsets[0]) + 5] ^= 4
    control.release(held.slots)


def evict(engine: KVortexEngine, block_hash: bytes, group: str) -> None:
    """Take a block out of the pool as an eviction would."""
    control, _ = engine._planes()
    control._remove(control.index.drop_keys(key_of(engine, block_hash, group), MissReason.EVICTED))


def block_hash_of(hashes: Sequence[bytes], group: str, block: int) -> bytes:
    """The hash of a group's block: the last of those that it spans."""
    return hashes[4 * block + 3] if group == "state" else hashes[block]


LOST = [
    # The lost block, and how far the request still resumes: what is missing further on.
    ("full", 0, Match(0, MissingKV("full", 64, 0))),
    ("full", 5, Match(64, MissingKV("full", 128, 5))),
    ("full", 11, Match(128, MissingKV("full", 192, 11))),
    ("window", 11, Match(128, MissingKV("window", 192, 11))),
    ("window", 9, Match(128, MissingKV("window", 192, 9))),
    ("window", 8, Match(192, None)),  # 24 tokens before the window
    ("state", 2, Match(128, MissingKV("state", 192, 2))),
    ("state", 1, Match(192, None)),
]


@pytest.mark.parametrize("why", [MissReason.EVICTED, MissReason.CORRUPT, MissReason.NEVER_STORED])
@pytest.mark.parametrize(("group", "block", "match"), LOST)
async def test_a_match_names_what_is_missing(group: str, block: int, match: Match, why: MissReason) -> None:
    cache, hashes = apart(), request()
    cache.fill(seed=8)
    source, target = tables(12, places(False, 0)), tables(12, places(False, 1))
    if why is MissReason.NEVER_STORED:
        source[group][block] = -1
    async with grouped_engine(cache) as engine:
        await engine.save_blocks(hashes, source)
        lost = block_hash_of(hashes, group, block)
        if why is MissReason.EVICTED:
            evict(engine, lost, group)
        elif why is MissReason.CORRUPT:
            flip_a_bit(engine, lost, group)
            loaded = await engine.load_blocks(hashes, target)
            missed = [(g, o) for g, o in zip(loaded.groups, loaded.outcomes, strict=True) if o is not None]
            assert missed == [(group, why)]
            assert loaded.missed_block_ids == (target[group][block],)
        if match.missing is not None:
            match = match._replace(missing=match.missing._replace(reason=why))
        assert engine.match_request(hashes) == match
        assert engine.match_prefix(hashes) * BLOCK_SIZE == match.num_tokens
        for name in cache.groups:
            there = engine.check_blocks(hashes, name).tolist()
            assert there == [(name, number) != (group, block) for number in range(len(source[name]))]
        assert engine.miss_reason(lost, group) is why
        assert engine.miss_reason(lost, "full") is (why if group == "full" else None)
        assert (await engine.save_blocks(hashes, tables(12, places(False, 0)))).num_stored == 1
        assert engine.match_request(hashes) == Match(NUM_TOKENS, None)


async def test_look_ups_agree_whatever_is_there() -> None:
    generator = np.random.default_rng(9)
    cache, hashes = apart(), request()
    async with grouped_engine(cache) as engine:
        for _ in range(60):
            engine.clear()
            source = tables(12, places(False, 0))
            for ids in source.values():
                for position in range(len(ids)):
                    if generator.random() < 0.15:
                        ids[position] = -1
            await engine.save_blocks(hashes, source)
            for count in range(13):
                match = engine.match_request(hashes[:count])
                assert engine.match_prefix(hashes[:count]) * BLOCK_SIZE == match.num_tokens
                resumable = np.flatnonzero(engine.check_blocks(hashes[:count]))
                assert match.num_tokens == (int(resumable[-1]) + 1 if resumable.size else 0) * BLOCK_SIZE
                for boundary in resumable.tolist():
                    assert engine.match_request(hashes[: boundary + 1]).num_tokens == (boundary + 1) * BLOCK_SIZE
                if match.missing is not None:
                    name, _, block, reason = match.missing
                    assert reason is MissReason.NEVER_STORED
                    assert not engine.check_blocks(hashes[:count], name)[block]
                    assert engine.miss_reason(block_hash_of(hashes, name, block), name) is reason
                needed = {
                    g: [b in cache.groups[g].needed(match.num_tokens) for b in range(len(source[g]))] for g in source
                }
                load = {g: [i + 12 if n else -1 for i, n in enumerate(needed[g])] for g in source}
                load["state"] = [i + 3 if n else -1 for i, n in enumerate(needed["state"])]
                if count == 12:
                    assert (await engine.load_blocks(hashes, load)).ok


async def test_a_failed_transfer_and_a_save_under_way_have_their_reasons() -> None:
    faults: dict[str, Fault | None] = {"state": Fault.FAIL}
    cache, hashes = apart(), request(4)
    async with grouped_engine(
        cache, fault_of=lambda _, batch: faults.get("state") if batch.form == 4 else None
    ) as engine:
        saved = await engine.save_blocks(hashes, tables(4, places(False, 0)))
        assert saved.outcomes == (SaveOutcome.STORED,) * 8 + (SaveOutcome.FAILED,)
        missing = MissingKV("state", 64, 0, MissReason.TRANSFER_FAILED)
        assert engine.match_request(hashes) == Match(0, missing)
        faults["state"] = Fault.HOLD
        task = asyncio.ensure_future(engine.save_blocks(hashes, {"state": [0]}))
        executor = engine._planes()[1]._scheduler._executor
        while not executor.num_held:
            await asyncio.sleep(0.001)
        assert engine.match_request(hashes) == Match(0, missing._replace(reason=MissReason.PENDING))
        executor.release()
        assert (await task).ok
        assert engine.match_request(hashes) == Match(64, None)
