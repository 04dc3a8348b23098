"""The frame format: no byte changes unnoticed."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvortex.kernels.digest import digest_reference
from kvortex.testing.tier_conformance import NAMESPACE, digest_of, key_of, payload_of
from kvortex.tiers import Cause, DiskTier, ReadRequest
from kvortex.tiers.frame import (
    ALIGNMENT_BYTES,
    HEADER_BYTES,
    FrameHeader,
    decode_header,
    encode_header,
    frame_bytes,
    padded,
)
from kvortex.tiers.payload import copy_payload, payload_digest
from kvortex.types import MissReason
from tests.tiers.disk_support import disk_tier, file_of

NBYTES = 4096 + 100
HEADER = FrameHeader(NAMESPACE, key_of(0), 2, NBYTES, 2 * NBYTES, 0x0123456789ABCDEF)


def frame_of(number: int) -> bytes:
    payload = payload_of(key_of(number), NBYTES)
    header = replace(HEADER, key=key_of(number), digest=digest_of(payload))
    return encode_header(header) + payload + bytes(padded(NBYTES) - NBYTES)


def test_a_header_says_what_was_put_in() -> None:
    block = encode_header(HEADER)
    assert len(block) == HEADER_BYTES == ALIGNMENT_BYTES
    assert decode_header(block, NAMESPACE, key_of(0)) == HEADER


def test_the_documented_layout_of_a_header() -> None:
    block = encode_header(HEADER)
    fields = [(16, 4, 1), (20, 4, 4096), (24, 4, 2), (28, 4, 0), (32, 8, NBYTES), (40, 8, 2 * NBYTES), (56, 8, 0)]
    for start, size, value in fields:
        assert int.from_bytes(block[start : start + size], "little") == value
    assert block[:8] == b"KVORTEX\0"
    assert block[48:56] == HEADER.digest.to_bytes(8, "little")
    assert block[64:96] == NAMESPACE
    assert block[96:128] == key_of(0)
    assert not any(block[128:])


def test_a_frame_written_by_version_1_stays_readable() -> None:
    """The checksum as it has always been: a change of the format must change the version."""
    header = FrameHeader(bytes(32), bytes(32), 0, 1, 1, 0)
    assert encode_header(header)[8:16].hex() == "cf285f831bb19fbd"


def test_every_flip_in_a_header_is_corrupt() -> None:
    block = encode_header(HEADER)
    for offset in range(HEADER_BYTES):
        for mask in (1, 0x80, 0xFF):
            flipped = bytearray(block)
            flipped[offset] ^= mask
            assert decode_header(bytes(flipped), NAMESPACE, key_of(0)) is Cause.CORRUPT


def test_another_key_or_namespace_is_corrupt() -> None:
    block = encode_header(HEADER)
    assert decode_header(block, NAMESPACE, key_of(1)) is Cause.CORRUPT
    assert decode_header(block, bytes(32), key_of(0)) is Cause.CORRUPT
    assert decode_header(block[:-1], NAMESPACE, key_of(0)) is Cause.CORRUPT


@pytest.mark.parametrize(
    "field", [{"codec": 1 << 32}, {"digest": -1}, {"payload_bytes": 1 << 64}], ids=["codec", "digest", "length"]
)
def test_what_does_not_fit_a_header_raises(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        encode_header(replace(HEADER, **field))  # type: ignore[arg-type]


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 15, 16, 4095, 4096, 100_003])
def test_digests_are_those_of_the_kernels(nbytes: int) -> None:
    payload = random.Random(nbytes).randbytes(nbytes)
    expected = digest_reference(payload + bytes(-nbytes % 8))
    for shift in (0, 1, 8):
        source = np.frombuffer(bytes(shift) + payload, dtype=np.uint8)[shift:]
        target = np.full(nbytes + 1, 0xAA, dtype=np.uint8)
        assert payload_digest(source) == expected
        assert copy_payload(source, target[:nbytes]) == expected
        assert target[:nbytes].tobytes() == payload
        assert target[nbytes] == 0xAA


class Damage:
    """Files that each hold one damaged frame, read in batches through one tier."""

    BATCH = 128

    def __init__(self, root: Path, tier: DiskTier) -> None:
        self.tier = tier
        self.frames = [frame_of(number) for number in range(self.BATCH)]
        self.files = [file_of(root, key_of(number)) for number in range(self.BATCH)]
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.buffers = np.empty((self.BATCH, 4 * 4096), dtype=np.uint8)
        self.count = 0

    async def expect_corrupt(self, damaged: list[bytes]) -> None:
        """Frame `i` of the list, damaged, in the place of block `i`."""
        for file, data in zip(self.files, damaged, strict=False):
            file.write_bytes(data)
        reads = [ReadRequest(key_of(n), self.buffers[n]) for n in range(len(damaged))]
        outcomes = await self.tier.read(reads)
        assert {(outcome.reason, outcome.cause) for outcome in outcomes} == {(MissReason.CORRUPT, Cause.CORRUPT)}
        assert not any(file.exists() for file in self.files)
        self.count += len(damaged)
        assert self.tier.stats().removed_corrupt == self.count


@pytest.fixture(params=[None, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool | None:
    value: bool | None = request.param
    return value


async def test_undamaged_frames_are_hits(tmp_path: Path, direct: bool | None) -> None:
    """Or else the tests below would pass with nothing."""
    async with disk_tier(tmp_path, direct=direct) as tier:
        damage = Damage(tmp_path, tier)
        for file, data in zip(damage.files, damage.frames, strict=True):
            file.write_bytes(data)
        outcomes = await tier.read([ReadRequest(key_of(n), damage.buffers[n]) for n in range(damage.BATCH)])
        assert all(outcome.reason is None and outcome.payload_bytes == NBYTES for outcome in outcomes)


async def test_every_flip_of_a_file_is_corrupt(tmp_path: Path, direct: bool | None) -> None:
    async with disk_tier(tmp_path, direct=direct) as tier:
        damage = Damage(tmp_path, tier)
        payload = range(HEADER_BYTES, frame_bytes(NBYTES), 11)  # padding included
        header = range(0, HEADER_BYTES, 13 if direct is False else 1)  # all of them once is enough
        offsets = [*header, *payload, frame_bytes(NBYTES) - 1]
        for start in range(0, len(offsets), damage.BATCH):
            damaged = []
            for number, offset in enumerate(offsets[start : start + damage.BATCH]):
                frame = bytearray(damage.frames[number])
                frame[offset] ^= 1 << offset % 8
                damaged.append(bytes(frame))
            await damage.expect_corrupt(damaged)


async def test_every_truncation_and_extension_is_corrupt(tmp_path: Path, direct: bool | None) -> None:
    async with disk_tier(tmp_path, direct=direct) as tier:
        damage = Damage(tmp_path, tier)
        whole = frame_bytes(NBYTES)
        lengths = [*range(0, whole, 5), *range(4090, 4100), *range(whole - 8, whole), *range(whole + 1, 3 * whole, 997)]
        lengths += [2 * 4096, 4 * 4096, 5 * 4096]
        for start in range(0, len(lengths), damage.BATCH):
            part = lengths[start : start + damage.BATCH]
            await damage.expect_corrupt(
                [(damage.frames[n] + bytes(2 * whole))[:length] for n, length in enumerate(part)]
            )
