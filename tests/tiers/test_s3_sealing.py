"""Sealed blocks in a bucket to which others write too: what they put there, and keys that change."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvortex.testing.tier_conformance import NAMESPACE, NBYTES, OTHER_NAMESPACE, is_right, key_of, payload_of
from kvortex.testing.tier_conformance import read_request as read_request_of
from kvortex.tiers import Cause, S3Tier
from kvortex.tiers.frame import SEALED_HEADER_BYTES
from kvortex.types import MissReason, SaveOutcome
from tests.tiers.one_block import read_one, write_one
from tests.tiers.s3_support import Moto, S3Server, keys_in_environment
from tests.tiers.seal_support import write_keys


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with keys_in_environment(), Moto() as running:
        yield running


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "-").replace("]", "")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "seal.keys", "old")


def sealed(server: S3Server, prefix: str, keys: Path, namespace: bytes = NAMESPACE) -> S3Tier:
    return server.tier(f"&seal_keys={keys}", prefix=prefix, namespace=namespace)


def objects(server: S3Server, prefix: str, namespace: bytes = NAMESPACE) -> list[str]:
    return server.names(f"{prefix}/{namespace.hex()}-sealed")


async def expect_auth(tier: S3Tier, number: int) -> None:
    outcome = await read_one(tier, number)
    assert (outcome.reason, outcome.cause) == (MissReason.AUTH, Cause.AUTH)
    assert tier.lookup([key_of(number)]) == [0], "it is no block for this process any more"


async def test_the_bucket_never_has_a_payload(server: S3Server, prefix: str, keys: Path) -> None:
    async with sealed(server, prefix, keys) as tier:
        await write_one(tier, 0)
        (name,) = objects(server, prefix)
        data, payload = server.get(name), payload_of(key_of(0))
        assert not any(payload[at : at + 8] in data for at in range(0, NBYTES, 64))
        assert await tier.find([key_of(0)]) == tier.lookup([key_of(0)]) == [NBYTES]
        assert (await read_one(tier, 0)).reason is None


async def test_what_others_have_changed_is_refused_and_left(server: S3Server, prefix: str, keys: Path) -> None:
    async with sealed(server, prefix, keys) as tier:
        await write_one(tier, 0)
    (name,) = objects(server, prefix)
    whole = server.get(name)
    end = SEALED_HEADER_BYTES + NBYTES
    for at in [*range(0, SEALED_HEADER_BYTES, 5), SEALED_HEADER_BYTES, end - 1]:
        server.put(name, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        async with sealed(server, prefix, keys) as tier:
            assert await tier.find([key_of(0)]) == [NBYTES]
            await expect_auth(tier, 0)
        assert objects(server, prefix) == [name], "hosts that have its key may read it"
    async with sealed(server, prefix, keys) as tier:
        await tier.find([key_of(0)])
        await expect_auth(tier, 0)
        assert (await write_one(tier, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(tier, 0)).reason is None
        assert len(objects(server, prefix)) == 2


async def test_blocks_in_the_places_of_others_are_refused(server: S3Server, prefix: str, keys: Path) -> None:
    async with sealed(server, prefix, keys) as tier:
        await write_one(tier, 0)
        await write_one(tier, 1)
    first, second = objects(server, prefix)
    one, other = server.get(first), server.get(second)
    end = SEALED_HEADER_BYTES + NBYTES
    server.put(first, other[:end] + one[end:])
    server.put(second, one[:end] + other[end:])
    async with sealed(server, prefix, keys) as tier:
        assert await tier.find([key_of(0), key_of(1)]) == [NBYTES] * 2
        for number in (0, 1):
            await expect_auth(tier, number)


async def test_blocks_of_other_namespaces_are_refused(server: S3Server, prefix: str, keys: Path) -> None:
    async with (
        sealed(server, prefix, keys) as tier,
        sealed(server, prefix, keys, OTHER_NAMESPACE) as other,
    ):
        await write_one(tier, 0)
        await write_one(other, 0)
        (mine,), (theirs,) = objects(server, prefix), objects(server, prefix, OTHER_NAMESPACE)
        end = SEALED_HEADER_BYTES + NBYTES
        server.put(mine, server.get(theirs)[:end] + server.get(mine)[end:])
        await expect_auth(tier, 0)
        assert (await read_one(other, 0)).reason is None


async def test_plain_objects_among_sealed_ones_are_refused(server: S3Server, prefix: str, keys: Path) -> None:
    async with server.tier(prefix=prefix) as plain:
        await write_one(plain, 0)
    (name,) = server.names(f"{prefix}/{NAMESPACE.hex()}")
    folder = f"{prefix}/{NAMESPACE.hex()}-sealed"
    server.put(f"{folder}/{name.rpartition('/')[2]}", server.get(name))
    async with sealed(server, prefix, keys) as tier:
        await tier.find([key_of(0)])
        request = read_request_of(0)
        (outcome,) = await tier.read([request])
        assert (outcome.reason, outcome.cause) == (MissReason.AUTH, Cause.AUTH)
        assert not is_right(request, outcome)


async def test_who_has_no_keys_does_not_see_sealed_blocks(server: S3Server, prefix: str, keys: Path) -> None:
    async with sealed(server, prefix, keys) as tier, server.tier(prefix=prefix) as plain:
        await write_one(tier, 0)
        assert await plain.find([key_of(0)]) == [0]
        assert (await read_one(plain, 0)).reason is MissReason.NEVER_STORED
        assert (await write_one(plain, 0)).outcome is SaveOutcome.STORED


async def test_keys_change_one_host_after_the_other(server: S3Server, prefix: str, tmp_path: Path) -> None:
    files = {name: write_keys(tmp_path / name, *name.split("-")) for name in ("old", "old-new", "new-old", "new")}
    for number, (writer, reader) in enumerate([("old", "old-new"), ("new-old", "old-new"), ("new-old", "new")]):
        async with sealed(server, prefix, files[writer]) as tier:
            await write_one(tier, number)
        async with sealed(server, prefix, files[reader]) as tier:
            assert (await read_one(tier, number)).reason is None
    async with sealed(server, prefix, files["new"]) as late:
        await late.find([key_of(0)])
        await expect_auth(late, 0)
        assert (await write_one(late, 0)).outcome is SaveOutcome.STORED
        assert (await read_one(late, 0)).reason is None
