"""Sealed blocks: whatever was changed, exchanged, cut or forged is a miss, and leaves nothing in the buffer."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFCMAC, CounterLocation, Mode
from numpy.typing import NDArray

from kvortex.codecs import Codec
from kvortex.errors import ConfigError, InvalidHashError
from kvortex.testing.tier_conformance import (
    NAMESPACE,
    OTHER_NAMESPACE,
    SIZES,
    digest_of,
    key_of,
    payload_of,
    write_request,
)
from kvortex.tiers import Cause, ReadOutcome, WriteRequest
from kvortex.tiers.frame import HEADER_BYTES, SEALED_HEADER_BYTES, SHORT_HEADER_BYTES, decode_header, encode_header
from kvortex.tiers.sealing import Framing, framing_of
from kvortex.types import MissReason
from tests.tiers.seal_support import SECRETS, write_keys

NBYTES = 200
KEY = key_of(0)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "seal.keys", "old")


@pytest.fixture(params=[False, True], ids=["object", "file"])
def in_files(request: pytest.FixtureRequest) -> bool:
    value: bool = request.param
    return value


@pytest.fixture
def framing(keys: Path, in_files: bool) -> Framing:
    return framing_of(NAMESPACE, str(keys), "a test", in_files=in_files)


def stored_by(framing: Framing, request: WriteRequest) -> bytes:
    head, payload = framing.encode(request)
    assert len(head) == framing.header_bytes
    return head + payload.tobytes()


def opened_by(
    framing: Framing, data: bytes, key: bytes = KEY, room: int = NBYTES
) -> tuple[ReadOutcome, NDArray[np.uint8]]:
    """What a tier does with stored bytes; the outcome, and the buffer."""
    buffer = np.full(room, 0xAA, dtype=np.uint8)
    header = framing.decode(data[: framing.header_bytes], key)
    if isinstance(header, ReadOutcome):
        return header, buffer
    payload = np.frombuffer(data, dtype=np.uint8)[framing.header_bytes :]
    if payload.size != header.payload_bytes or payload.size > room:
        return framing.flawed("another length"), buffer
    target = buffer[: payload.size]
    landing = framing.landing(target)
    landing[:] = payload
    return framing.open(header, landing, target), buffer


def expect_auth(framing: Framing, data: bytes, key: bytes = KEY) -> None:
    outcome, buffer = opened_by(framing, data, key)
    assert (outcome.reason, outcome.cause) == (MissReason.AUTH, Cause.AUTH)
    assert set(buffer.tolist()) <= {0, 0xAA}


def with_checksum(data: bytes, in_files: bool) -> bytes:
    """The same with a header checksum that is right, as whoever forges it would make it."""
    end = HEADER_BYTES if in_files else SHORT_HEADER_BYTES
    checksum = hashlib.blake2b(data[:8] + data[16:end], digest_size=8).digest()
    return data[:8] + checksum + data[16:]


def opened_by_reference(data: bytes, header_bytes: int, secret: bytes) -> bytes:
    """The payload of a sealed frame, as the specifications say it (RFC 5869, NIST SP 800-108r1 and 800-38D)."""
    key = HKDF(hashes.SHA256(), 32, salt=None, info=b"kvortex seal 1").derive(secret)
    nonce, tag, payload = data[144:168], data[168:184], data[header_bytes:]
    derive = KBKDFCMAC(
        algorithms.AES, Mode.CounterMode, 32, 2, None, CounterLocation.BeforeFixed, None, None, b"X\0" + nonce[:12]
    )
    associated = data[16:168] + data[184:header_bytes]
    return AESGCM(derive.derive(key)).decrypt(nonce[12:], payload + tag, associated)


# -- what is right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seals", [True, False], ids=["sealed", "plain"])
@pytest.mark.parametrize("nbytes", SIZES)
def test_what_was_stored_comes_back(keys: Path, in_files: bool, seals: bool, nbytes: int) -> None:
    framing = framing_of(NAMESPACE, str(keys) if seals else "", "a test", in_files=in_files)
    request = write_request(0, nbytes)
    data = stored_by(framing, request)
    outcome, buffer = opened_by(framing, data, room=nbytes)
    assert outcome == ReadOutcome(None, nbytes, 2 * nbytes, Codec.FP8, request.digest)
    assert buffer.tobytes() == payload_of(KEY, nbytes)
    target = np.empty(nbytes, dtype=np.uint8)
    head, payload = framing.encode(request, target)
    assert payload is target
    assert opened_by(framing, head + target.tobytes(), room=nbytes)[0] == outcome
    source = np.frombuffer(data, dtype=np.uint8)[framing.header_bytes :]
    header = framing.decode(data[: framing.header_bytes], KEY)
    assert not isinstance(header, ReadOutcome)
    assert framing.open(header, source, target) == outcome  # from memory of its own, too
    assert target.tobytes() == buffer.tobytes()


def test_plain_frames_are_byte_for_byte_as_ever(in_files: bool) -> None:
    framing = framing_of(NAMESPACE, "", "a test", in_files=in_files)
    data = stored_by(framing, write_request(0, NBYTES))
    expected = {
        False: "927e434634db7bf92dbdb2bc3d929ed30e644bc555e4ebff9d91a4f120e02e6c",
        True: "45b1527ec1ccb33800a52f9297279db02137954da0c92a0c0db38d23ef6511b7",
    }
    assert hashlib.sha256(data).hexdigest() == expected[in_files]


def test_the_documented_layout_of_a_sealed_frame(
    framing: Framing, in_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.urandom", lambda nbytes: bytes(range(100, 100 + nbytes)))
    data = stored_by(framing, write_request(0, NBYTES))
    header_bytes = HEADER_BYTES if in_files else SEALED_HEADER_BYTES
    assert data[:8] == b"KVORTEX\0"
    assert [int.from_bytes(data[at : at + 4], "little") for at in (16, 20, 24, 28)] == [2, header_bytes, 2, 0]
    assert [int.from_bytes(data[at : at + 8], "little") for at in (32, 40, 56)] == [NBYTES, 2 * NBYTES, 0]
    assert data[64:128] == NAMESPACE + KEY
    assert data[128:144] == b"old".ljust(16, b"\0")
    assert data[144:168] == bytes(range(100, 124))
    assert not any(data[184:header_bytes])
    assert with_checksum(data, in_files) == data
    assert opened_by_reference(data, header_bytes, bytes.fromhex(SECRETS["old"])) == payload_of(KEY, NBYTES)


def test_no_two_seals_of_a_block_are_alike_and_none_shows_it(framing: Framing) -> None:
    request = WriteRequest(KEY, bytes(NBYTES), digest_of(bytes(NBYTES)), NBYTES)
    sealed = [stored_by(framing, request) for _ in range(3)]
    assert len({data[144:168] for data in sealed}) == 3
    assert len({data[framing.header_bytes :] for data in sealed}) == 3
    assert all(data.count(0, framing.header_bytes) < NBYTES // 4 for data in sealed)


def test_a_wrong_digest_of_an_authentic_block_is_corrupt(framing: Framing) -> None:
    request = replace(write_request(0, NBYTES), digest=1)
    assert opened_by(framing, stored_by(framing, request))[0].cause is Cause.CORRUPT
    data = stored_by(framing, request)
    header = framing.decode(data[: framing.header_bytes], KEY)
    assert not isinstance(header, ReadOutcome)
    stored, target = np.frombuffer(data, dtype=np.uint8)[framing.header_bytes :], np.empty(NBYTES, dtype=np.uint8)
    assert framing.open(header, stored, target, verify=False).reason is None


# -- what is wrong ---------------------------------------------------------------------------------------


def test_every_flip_is_refused(framing: Framing, in_files: bool) -> None:
    data = stored_by(framing, write_request(0, NBYTES))
    for offset in range(len(data)):
        for mask in (1, 0x80) if offset < 256 or not in_files else (1 << offset % 8,):
            changed = bytearray(data)
            changed[offset] ^= mask
            expect_auth(framing, bytes(changed))


def test_every_flip_in_a_header_with_its_checksum_made_anew_is_refused(framing: Framing, in_files: bool) -> None:
    data = stored_by(framing, write_request(0, NBYTES))
    for offset in range(16, framing.header_bytes):
        for mask in (1, 0x80, 0xFF) if offset < 256 else (1,):
            changed = bytearray(data)
            changed[offset] ^= mask
            expect_auth(framing, with_checksum(bytes(changed), in_files))


@pytest.mark.parametrize(("offset", "value"), [(24, 0), (40, NBYTES), (48, 1)], ids=["codec", "raw bytes", "digest"])
def test_fields_that_others_would_like_to_change_are_authenticated(
    framing: Framing, in_files: bool, offset: int, value: int
) -> None:
    data = bytearray(stored_by(framing, write_request(0, NBYTES)))
    data[offset : offset + 4] = value.to_bytes(4, "little")
    expect_auth(framing, with_checksum(bytes(data), in_files))


def test_every_truncation_and_extension_is_refused(framing: Framing) -> None:
    data = stored_by(framing, write_request(0, NBYTES))
    for length in range(0, len(data), 1 if framing.header_bytes < HEADER_BYTES else 7):
        expect_auth(framing, data[:length])
    for further in (1, 8, 16, 192, 4096):
        expect_auth(framing, data + bytes(further))


def test_a_payload_cut_with_its_header_is_refused(framing: Framing, in_files: bool) -> None:
    data = bytearray(stored_by(framing, write_request(0, NBYTES)))
    data[32:40] = (NBYTES - 8).to_bytes(8, "little")
    expect_auth(framing, with_checksum(bytes(data[:-8]), in_files))


def test_a_block_in_the_place_of_another_is_refused(framing: Framing, in_files: bool) -> None:
    data = stored_by(framing, write_request(1, NBYTES))
    expect_auth(framing, data)
    renamed = data[:96] + KEY + data[128:]
    expect_auth(framing, with_checksum(renamed, in_files))


def test_a_block_of_another_namespace_is_refused(keys: Path, framing: Framing, in_files: bool) -> None:
    other = framing_of(OTHER_NAMESPACE, str(keys), "a test", in_files=in_files)
    data = stored_by(other, write_request(0, NBYTES))
    assert opened_by(other, data)[0].reason is None
    expect_auth(framing, data)
    expect_auth(framing, with_checksum(data[:64] + NAMESPACE + data[96:], in_files))


def test_the_payload_of_another_block_is_refused(framing: Framing) -> None:
    first, second = (stored_by(framing, write_request(number, NBYTES)) for number in (0, 1))
    expect_auth(framing, first[: framing.header_bytes] + second[framing.header_bytes :])
    expect_auth(framing, first[:128] + second[128:])


def test_a_file_is_no_object(keys: Path) -> None:
    """What was sealed for one kind of store does not open in the other, with its length made right."""
    as_file, as_object = (framing_of(NAMESPACE, str(keys), "a test", in_files=kind) for kind in (True, False))
    data = stored_by(as_file, write_request(0, NBYTES))
    cut = bytearray(data[:SEALED_HEADER_BYTES] + data[HEADER_BYTES:])
    cut[20:24] = SEALED_HEADER_BYTES.to_bytes(4, "little")
    expect_auth(as_object, with_checksum(bytes(cut), False))


def forgeries(nbytes: int) -> Iterator[bytes]:
    """What somebody without a key could put there."""
    request = write_request(0, nbytes)
    for in_files in (False, True):
        yield stored_by(framing_of(NAMESPACE, "", "a test", in_files=in_files), request)
    yield b""
    yield b"hello"
    yield bytes(SEALED_HEADER_BYTES + nbytes)
    yield payload_of(KEY, SEALED_HEADER_BYTES + nbytes)


def test_what_was_never_sealed_is_refused(framing: Framing) -> None:
    for data in forgeries(NBYTES):
        expect_auth(framing, data)


def test_a_plain_header_with_the_length_of_a_sealed_one_is_refused(framing: Framing, in_files: bool) -> None:
    plain = framing_of(NAMESPACE, "", "a test", in_files=in_files)
    header = plain.decode(stored_by(plain, write_request(0, NBYTES))[: plain.header_bytes], KEY)
    assert not isinstance(header, ReadOutcome)
    data = encode_header(header, framing.header_bytes) + payload_of(KEY, NBYTES)
    expect_auth(framing, data)
    stated = bytearray(data)
    stated[16:20] = (2).to_bytes(4, "little")
    expect_auth(framing, with_checksum(bytes(stated), in_files))


@pytest.mark.parametrize("version", [0, 3, 1 << 31])
def test_another_version_is_no_excuse(framing: Framing, in_files: bool, version: int) -> None:
    data = bytearray(stored_by(framing, write_request(0, NBYTES)))
    data[16:20] = version.to_bytes(4, "little")
    expect_auth(framing, with_checksum(bytes(data), in_files))


def test_another_secret_under_the_same_id_is_refused(tmp_path: Path, framing: Framing, in_files: bool) -> None:
    other = write_keys(tmp_path / "other.keys", "old", secrets={"old": SECRETS["new"]})
    data = stored_by(framing_of(NAMESPACE, str(other), "a test", in_files=in_files), write_request(0, NBYTES))
    expect_auth(framing, data)


# -- readers without keys --------------------------------------------------------------------------------


def test_a_sealed_block_without_keys_is_a_miss_that_says_so(
    framing: Framing, in_files: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain = framing_of(NAMESPACE, "", "the tier of a test", in_files=in_files)
    data = stored_by(framing, write_request(0, NBYTES))
    for _ in range(3):
        outcome, buffer = opened_by(plain, data)
        assert (outcome.reason, outcome.cause) == (MissReason.AUTH, Cause.SEALED)
        assert (buffer == 0xAA).all()
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == "the tier of a test: a block is refused: it is sealed, and this tier has no keys: give it seal_keys"


def test_a_reader_of_version_1_sees_a_good_frame_of_another_version(framing: Framing, in_files: bool) -> None:
    """It reads as many bytes as its headers have, compares the checksum over them, and then the version."""
    data = stored_by(framing, write_request(0, NBYTES))
    head = data[: HEADER_BYTES if in_files else SHORT_HEADER_BYTES]
    assert head[:8] == b"KVORTEX\0"
    assert head[8:16] == hashlib.blake2b(head[:8] + head[16:], digest_size=8).digest()
    assert int.from_bytes(head[16:20], "little") not in (0, 1)
    assert decode_header(head, NAMESPACE, KEY, len(head)) is Cause.SEALED


# -- keys that change ------------------------------------------------------------------------------------


def test_a_key_is_changed_without_a_miss(tmp_path: Path, in_files: bool) -> None:
    """Two hosts: the new key is added behind the old one everywhere, is moved to the front, and the old one goes."""
    files = [write_keys(tmp_path / f"{number}.keys", "old") for number in range(2)]
    hosts = [framing_of(NAMESPACE, str(file), "a test", in_files=in_files) for file in files]
    stored: list[bytes] = []

    def all_open() -> None:
        stored.extend(stored_by(host, write_request(0, NBYTES)) for host in hosts)
        for host in hosts:
            assert all(opened_by(host, data)[0].reason is None for data in stored)

    all_open()
    for names in (["old", "new"], ["new", "old"]):
        for number, file in enumerate(files):
            write_keys(file, *names)
            hosts[number]._keyring._look()  # type: ignore[attr-defined]
            all_open()
    assert {data[128:131] for data in stored} == {b"old", b"new"}
    write_keys(files[0], "new")
    hosts[0]._keyring._look()  # type: ignore[attr-defined]
    for data in stored:
        outcome, _ = opened_by(hosts[0], data)
        assert outcome.cause is (Cause.AUTH if data[128:131] == b"old" else None)
        assert opened_by(hosts[1], data)[0].reason is None
    assert opened_by(hosts[0], stored[0])[0].detail == "it states the key 'old', which is not in the file of seal_keys"


def test_a_key_that_has_just_been_added_is_found(tmp_path: Path, keys: Path, framing: Framing, in_files: bool) -> None:
    other = framing_of(NAMESPACE, str(write_keys(tmp_path / "b.keys", "new")), "a test", in_files=in_files)
    data = stored_by(other, write_request(0, NBYTES))
    expect_auth(framing, data)
    write_keys(keys, "old", "new")
    assert opened_by(framing, data)[0].reason is None


# -- what is told ----------------------------------------------------------------------------------------


def test_refused_blocks_are_logged_once_a_minute(
    framing: Framing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("kvortex.tiers.sealing.time.monotonic", lambda: now_s)

    def warnings() -> int:
        return sum(record.levelname == "WARNING" for record in caplog.records)

    for _ in range(5):
        expect_auth(framing, b"")
    assert warnings() == 1
    now_s += 60.0
    expect_auth(framing, b"")
    assert warnings() == 2


def test_without_cryptography_the_extra_is_named(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    monkeypatch.delitem(sys.modules, "kvortex.tiers.xaes", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'kvortex\[seal\]'"):
        framing_of(NAMESPACE, str(keys), "a test")
    assert framing_of(NAMESPACE, "", "a test").header_bytes == SHORT_HEADER_BYTES


@pytest.mark.parametrize("path", ["", "keys"])
def test_a_namespace_is_32_bytes(path: str, keys: Path) -> None:
    with pytest.raises(InvalidHashError):
        framing_of(b"short", path and str(keys), "a test")
