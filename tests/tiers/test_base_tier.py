"""A tier over a store that knows objects by name keeps the contract, whatever the store does."""

import asyncio
import errno
from pathlib import Path
from typing import cast

import pytest

from kvortex import KVortexEngine, MissReason
from kvortex.errors import ConfigError, InvalidHashError
from kvortex.hashing import Namespace
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    NBYTES,
    TierConformance,
    is_right,
    key_of,
    read_request,
    write_request,
)
from kvortex.tiers import Cause, Tier
from kvortex.tiers.frame import SHORT_HEADER_BYTES, FrameHeader, encode_header
from kvortex.types import SaveOutcome
from tests.engine_support import BLOCK_SIZE, Parts, chain, contents, make_cache, small_config
from tests.tiers.object_support import DictTier, UnlistedTier, failing, hanging, keys_in

STORES: dict[Path, dict[str, bytes]] = {}
WHOLE = SHORT_HEADER_BYTES + NBYTES


class TestBaseTier(TierConformance):
    keeps_blocks_after_closing = True

    def make_tier(self, root: Path, namespace: bytes, capacity_bytes: int) -> Tier:
        return DictTier(STORES.setdefault(root, {}), namespace=namespace, capacity_bytes=capacity_bytes)

    def raw_keys(self, tier: Tier) -> set[bytes]:
        return keys_in(cast(DictTier, tier))

    def raw_read(self, tier: Tier, key: bytes) -> bytes:
        mine = cast(DictTier, tier)
        return mine.objects[mine._name(key)]

    def raw_write(self, tier: Tier, key: bytes, data: bytes) -> None:
        mine = cast(DictTier, tier)
        mine.objects[mine._name(key)] = data


@pytest.fixture
def store() -> dict[str, bytes]:
    return {}


async def test_a_store_that_raises_costs_misses(store: dict[str, bytes]) -> None:
    async with DictTier(store, namespace=NAMESPACE) as tier:
        await tier.write([write_request(n) for n in range(4)])
        tier.before = failing("get", "put", "find", "delete", "list")
        (read,) = await tier.read([read_request(0)])
        assert (read.reason, read.cause) == (MissReason.TRANSFER_FAILED, Cause.IO_ERROR)
        assert "ConnectionError: no route to the store" in read.detail
        (written,) = await tier.write([write_request(9)])
        assert (written.outcome, written.cause) == (SaveOutcome.FAILED, Cause.IO_ERROR)
        assert await tier.delete([key_of(0)]) == [False]
        assert await tier.find([key_of(0)]) == [0]
        assert tier.used_bytes == 4 * WHOLE
        assert tier.stats().unsettled == 0
        tier.before = tier._turn
        request = read_request(0)
        assert is_right(request, (await tier.read([request]))[0])


@pytest.mark.parametrize(
    ("error", "outcome", "cause"),
    [
        (OSError(errno.ENOSPC, "full"), SaveOutcome.NO_SPACE, Cause.NO_SPACE),
        (PermissionError(errno.EACCES, "denied"), SaveOutcome.FAILED, Cause.PERMISSION),
        (RuntimeError("?"), SaveOutcome.FAILED, Cause.IO_ERROR),
    ],
)
async def test_what_a_store_raises_is_told(
    store: dict[str, bytes], error: Exception, outcome: SaveOutcome, cause: Cause
) -> None:
    async with DictTier(store, namespace=NAMESPACE) as tier:
        tier.before = failing("put", error=error)
        (written,) = await tier.write([write_request(0)])
        assert (written.outcome, written.cause) == (outcome, cause)
        assert tier.used_bytes == 0
        assert tier.stats().causes[cause] == 1


async def test_a_store_that_hangs_is_left_at_the_deadline(store: dict[str, bytes]) -> None:
    async with DictTier(store, namespace=NAMESPACE) as tier:
        await tier.write([write_request(n) for n in range(64)])
        tier.before = hanging("get", "put", "find", "delete")
        async with asyncio.timeout(5):
            reads = await tier.read([read_request(n) for n in range(64)], deadline_s=0.02)
            assert {(read.reason, read.cause, read.settled) for read in reads} == {
                (MissReason.DEADLINE, Cause.DEADLINE, True)
            }
            (written,) = await tier.write([write_request(99)], deadline_s=0.02)
            assert (written.cause, written.settled) == (Cause.DEADLINE, True)
            assert await tier.find([key_of(0)], deadline_s=0.02) == [0]
            assert await tier.delete([key_of(0)], deadline_s=0.02) == [False]
        tier.before = tier._turn
        assert tier.used_bytes == 64 * WHOLE
        requests = [read_request(n) for n in range(64)]
        assert all(map(is_right, requests, await tier.read(requests)))


async def test_no_more_objects_move_at_a_time_than_allowed(store: dict[str, bytes]) -> None:
    async with DictTier(store, namespace=NAMESPACE) as tier:
        most = now = 0

        async def before(call: str, name: str) -> None:
            nonlocal most, now
            now += call == "put"
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= call == "put"

        tier.before = before
        await tier.write([write_request(n) for n in range(3 * tier.concurrency)])
        assert most == tier.concurrency


async def test_what_others_store_is_found_but_not_known(store: dict[str, bytes]) -> None:
    async with DictTier(store, namespace=NAMESPACE) as mine, UnlistedTier(store, namespace=NAMESPACE) as other:
        await mine.write([write_request(0)])
        assert other.lookup([key_of(0), key_of(1)]) == [0, 0]
        assert await other.find([key_of(0), key_of(1)]) == [NBYTES, 0]
        assert other.lookup([key_of(0)]) == [NBYTES]
        assert (await other.write([write_request(0)]))[0].outcome is SaveOutcome.ALREADY_STORED
        await mine.delete([key_of(0)])
        assert await other.find([key_of(0)]) == [0]
        assert other.lookup([key_of(0)]) == [0]


async def test_many_keys_are_asked_for_together(store: dict[str, bytes]) -> None:
    async with UnlistedTier(store, namespace=NAMESPACE) as tier:
        assert await tier.find([key_of(n) for n in range(600)]) == [0] * 600
        assert tier.calls.count("find") == 3


async def test_a_store_that_cannot_tell_what_it_has(store: dict[str, bytes]) -> None:
    async with UnlistedTier(store, namespace=NAMESPACE) as tier:
        await tier.scanned()
        await tier.write([write_request(0)])
        assert [block.key async for block in tier.scan()] == [key_of(0)]
        assert "list" not in tier.calls


async def test_a_listing_that_fails_is_no_reason_not_to_serve(store: dict[str, bytes]) -> None:
    tier = DictTier(store, namespace=NAMESPACE)
    tier.before = failing("list")
    async with tier:
        await tier.scanned()
        assert not tier.stats().scan.complete
        assert (await tier.write([write_request(0)]))[0].outcome is SaveOutcome.STORED


async def test_names_that_are_no_blocks_are_left_alone(store: dict[str, bytes]) -> None:
    store |= {f"{NAMESPACE.hex()}/{name}": b"something" for name in ("readme", "00ff", "")}
    async with DictTier(store, namespace=NAMESPACE) as tier:
        await tier.scanned()
        assert [block async for block in tier.scan()] == []
        assert tier.used_bytes == 0


async def test_a_frame_of_a_later_version_is_left_as_it_is(
    store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with DictTier(store, namespace=NAMESPACE) as tier:
        with monkeypatch.context() as patch:
            patch.setattr("kvortex.tiers.frame.FORMAT_VERSION", 3)
            header = FrameHeader(NAMESPACE, key_of(0), 0, NBYTES, NBYTES, 0)
            store[tier._name(key_of(0))] = encode_header(header, SHORT_HEADER_BYTES) + bytes(NBYTES)
        (outcome,) = await tier.read([read_request(0)])
        assert outcome.cause is Cause.UNKNOWN_VERSION
        before = dict(store)
        (written,) = await tier.write([write_request(0)])
        assert (written.outcome, written.cause) == (SaveOutcome.FAILED, Cause.UNKNOWN_VERSION)
        assert store == before
        store.clear()
        (written,) = await tier.write([write_request(0)])
        assert written.outcome is SaveOutcome.STORED


async def test_opening(store: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="capacity_bytes"):
        DictTier(store, namespace=NAMESPACE, capacity_bytes=0)
    with pytest.raises(InvalidHashError):
        DictTier(store, namespace=b"short")
    tier = DictTier(store, namespace=NAMESPACE)
    tier.before = failing("connect", error=ConfigError("no password: set it"))
    with pytest.raises(ConfigError, match="no password"):
        await tier.open()
    assert tier.calls == ["connect", "disconnect"]


async def test_engines_share_a_store_that_none_of_them_has_listed(store: dict[str, bytes]) -> None:
    """What one engine has written another one finds, which was there first and had looked for it before."""
    cache, hashes = make_cache(), chain(8)

    def make_tier(namespace: Namespace) -> Tier:
        return UnlistedTier(store, namespace=namespace.digest)

    async with (
        KVortexEngine.create(small_config(), Parts(make_tier=make_tier)) as late,
        KVortexEngine.create(small_config(), Parts(make_tier=make_tier)) as early,
    ):
        for engine in (late, early):
            engine.register_kv_caches(cache, BLOCK_SIZE)
            assert await engine.wait_tier()
        assert (await late.load_blocks(hashes, range(8, 16))).num_loaded == 0
        await early.save_blocks(hashes, range(8))
        await early.flush()
        assert (await late.load_blocks(hashes, range(8, 16))).ok
        assert contents(cache, range(8)) == contents(cache, range(8, 16))
        assert await late.invalidate(hashes)
        assert not store
