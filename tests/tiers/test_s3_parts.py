"""The parts of the tier over S3 by themselves: format, URLs, what a store's answers mean, keys, and ranges."""

import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import GenericError

from kvortex.errors import ConfigError
from kvortex.testing.tier_conformance import NAMESPACE, OTHER_NAMESPACE, key_of
from kvortex.tiers import Cause, ReadRequest, WriteRequest, tier_from_url
from kvortex.tiers.s3.block_map import BlockMap
from kvortex.tiers.s3.calls import Move
from kvortex.tiers.s3.failures import StoreFailure, failure_of
from kvortex.tiers.s3.payloads import Payloads
from kvortex.tiers.s3.profiles import ProfileKeys
from kvortex.tiers.s3.reader import GAP_BYTES, RANGE_BYTES, plan_spans
from kvortex.tiers.s3.segment import (
    Footer,
    Removal,
    SegmentId,
    StoredEntry,
    aligned,
    decode_footer,
    encode_footer,
    segment_bytes,
)
from kvortex.tiers.s3.settings import S3Settings
from kvortex.tiers.sealing import PlainFraming
from tests.tiers.s3_support import keys_in_environment, tier_over

ENTRIES = [StoredEntry(key_of(n), 4096 * n, 4096 - n, 8192, n << 60, n) for n in range(4)]
OTHER = SegmentId(5, 6, 7)
OBJECT_BYTES = 1 << 20


def encoded(blocks: list[StoredEntry] = ENTRIES, written_ms: int = 77) -> tuple[SegmentId, bytes]:
    return encode_footer(NAMESPACE, Footer(blocks, [Removal(OTHER, 3)]), written_ms)


# -- the format ------------------------------------------------------------------------------------------


def test_a_footer_comes_back_as_it_was() -> None:
    number, data = encoded()
    footer = decode_footer(data, NAMESPACE, number, OBJECT_BYTES)
    assert isinstance(footer, Footer)
    assert list(footer.blocks) == ENTRIES
    assert footer.removals == [Removal(OTHER, 3)]
    assert SegmentId.of_name(number.name) == SegmentId.of_key(number.key) == number
    assert len(data) == number.footer_bytes
    assert segment_bytes([5, 8]) == 8 + 8 + 72 + 2 * 72  # padding, what a footer has without blocks, and two blocks


def test_every_changed_byte_of_a_footer_is_noticed() -> None:
    number, data = encoded()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        assert decode_footer(bytes(damaged), NAMESPACE, number, OBJECT_BYTES) is Cause.CORRUPT, position


@pytest.mark.parametrize("cut", [1, 8, 71, 200])
def test_a_footer_of_another_length_is_noticed(cut: int) -> None:
    number, data = encoded()
    assert decode_footer(data[:-cut], NAMESPACE, number, OBJECT_BYTES) is Cause.CORRUPT
    assert decode_footer(data + bytes(cut), NAMESPACE, number, OBJECT_BYTES) is Cause.CORRUPT


def test_footers_of_others_are_refused() -> None:
    number, data = encoded()
    assert decode_footer(data, OTHER_NAMESPACE, number, OBJECT_BYTES) is Cause.CORRUPT
    renamed = SegmentId(77, number.checksum ^ 1, number.footer_bytes)
    assert decode_footer(data, NAMESPACE, renamed, OBJECT_BYTES) is Cause.CORRUPT
    room_needed = ENTRIES[-1].end + len(data)
    assert isinstance(decode_footer(data, NAMESPACE, number, room_needed), Footer)
    assert decode_footer(data, NAMESPACE, number, room_needed - 1) is Cause.CORRUPT
    empty_number, empty = encoded([StoredEntry(key_of(0), 0, 0, 1, 1, 0)])
    assert decode_footer(empty, NAMESPACE, empty_number, OBJECT_BYTES) is Cause.CORRUPT


def test_a_footer_of_a_later_version_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("kvortex.tiers.s3.segment.FORMAT_VERSION", 2)
        number, data = encoded()
    assert decode_footer(data, NAMESPACE, number, OBJECT_BYTES) is Cause.UNKNOWN_VERSION


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        encode_footer(NAMESPACE, Footer([StoredEntry(key_of(0), 1 << 64, 1, 1, 1, 0)], ()), 1)


def test_names_are_in_the_order_of_time_and_others_are_no_names() -> None:
    names = [encoded(written_ms=ms)[0].name for ms in (1, 15, 16, 1_800_000_000_000, (1 << 48) - 1)]
    assert names == sorted(names)
    for name in ("", "x", names[0].upper(), names[0] + "0", names[0][:-1], "a/" + names[0]):
        assert SegmentId.of_name(name) is None or name == names[0].lower()


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 4095])
def test_nothing_of_the_process_is_in_the_padding(nbytes: int) -> None:
    segment = np.full(5000, 0xAA, dtype=np.uint8)
    payloads = Payloads(PlainFraming(NAMESPACE))
    entry = payloads.put(WriteRequest(key_of(0), b"\x55" * nbytes, 7, 8), segment, 16)
    assert entry == StoredEntry(key_of(0), 16, nbytes, 8, 7, 0)
    end = 16 + aligned(nbytes)
    assert (segment[:16] == 0xAA).all()
    assert (segment[16 : 16 + nbytes] == 0x55).all()
    assert (segment[16 + nbytes : end] == 0).all()
    assert (segment[end:] == 0xAA).all()


# -- which blocks are where ------------------------------------------------------------------------------


def numbered(number: int) -> SegmentId:
    return SegmentId(number, number, 1000)


def entries(*numbers: int) -> list[StoredEntry]:
    return [StoredEntry(key_of(n), 100 * place, 10 + n, 1, 1, 0) for place, n in enumerate(numbers)]


def test_a_block_that_is_stored_twice_is_there_until_both_are_gone() -> None:
    blocks = BlockMap()
    blocks.add(numbered(1), 5000, Footer(entries(1, 2), ()))
    blocks.add(numbered(2), 5000, Footer(entries(2, 3), ()))
    assert blocks.payload_bytes([key_of(n) for n in range(5)]) == [0, 11, 12, 13, 0]
    assert [len(places) for places in blocks.places([key_of(2), key_of(3), key_of(4)])] == [2, 1, 0]
    blocks.bury(numbered(1), 1)
    assert blocks.get(key_of(2)) == (blocks.segment(numbered(2)), 0)
    blocks.drop(numbered(2))
    assert blocks.payload_bytes([key_of(n) for n in range(5)]) == [0, 11, 0, 0, 0]
    assert len(blocks) == 1


def test_a_segment_that_is_seen_twice_is_one_segment() -> None:
    """Its writer and a listing that was on its way both tell of it."""
    blocks = BlockMap()
    first = blocks.add(numbered(1), 5000, Footer(entries(1, 2), ()))
    assert blocks.add(numbered(1), 5000, Footer(entries(1, 2), ())) is first
    assert [len(places) for places in blocks.places([key_of(1), key_of(2)])] == [1, 1]
    blocks.bury(numbered(1), 0)
    assert blocks.payload_bytes([key_of(1), key_of(2)]) == [0, 12]
    blocks.drop(numbered(1))
    assert len(blocks) == 0


def test_a_removal_holds_whatever_is_known_first_and_however_often() -> None:
    for order in ([1, 2], [2, 1]):
        blocks = BlockMap()
        footers = {1: Footer(entries(1, 2), ()), 2: Footer((), [Removal(numbered(1), 0), Removal(numbered(1), 99)])}
        for number in order:
            blocks.add(numbered(number), 5000, footers[number])
        assert blocks.payload_bytes([key_of(1), key_of(2)]) == [0, 12]
        segment = blocks.segment(numbered(1))
        assert segment is not None
        assert [entry.key for entry in blocks.live(segment)] == [key_of(2)]
        blocks.drop(numbered(1))
        blocks.add(numbered(1), 5000, footers[1])  # forgotten, and seen again
        assert blocks.payload_bytes([key_of(1), key_of(2)]) == [0, 12]
        blocks.drop(numbered(1))
        blocks.forget_gone([numbered(1)], before_ms=100)
        blocks.add(numbered(1), 5000, footers[1])
        assert blocks.payload_bytes([key_of(1), key_of(2)]) == [0, 12]


# -- ranges ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 3 << 20), st.integers(0, 2 * GAP_BYTES)), min_size=1, max_size=30), st.data())
def test_every_wanted_block_is_in_one_range_that_is_not_too_long(layout: list[tuple[int, int]], data: Any) -> None:
    blocks, offset, made = BlockMap(), 0, []
    for number, (nbytes, gap) in enumerate(layout):
        made.append(StoredEntry(key_of(number), offset, nbytes, nbytes, 0, 0))
        offset += nbytes + gap
    blocks.add(numbered(1), offset + 1000, Footer(made, ()))
    wanted = data.draw(st.lists(st.integers(0, len(made) - 1), max_size=40))
    moves = [_FakeMove(ReadRequest(key_of(n), np.empty(made[n].stored_bytes, dtype=np.uint8))) for n in wanted]
    spans = plan_spans(moves, blocks)  # type: ignore[arg-type]
    assert sorted(id(move) for span in spans for move, _ in span.parts) == sorted(map(id, moves))
    for span in spans:
        for move, place in span.parts:
            assert span.start <= place.entry.offset
            assert place.entry.end <= span.stop
            assert place.entry.key == move.request.key
        assert span.stop - span.start <= max(RANGE_BYTES, *(place.entry.stored_bytes for _, place in span.parts))
    useful = sum(made[n].stored_bytes for n in set(wanted))
    assert sum(span.stop - span.start for span in spans) <= useful + GAP_BYTES * len(set(wanted))


def test_a_long_run_of_blocks_is_several_ranges() -> None:
    blocks, nbytes = BlockMap(), RANGE_BYTES // 4
    made = [StoredEntry(key_of(n), n * nbytes, nbytes, nbytes, 0, 0) for n in range(10)]
    blocks.add(numbered(1), 11 * nbytes, Footer(made, ()))
    moves: list[Move] = [_FakeMove(ReadRequest(key_of(n), np.empty(nbytes, dtype=np.uint8))) for n in range(10)]
    spans = plan_spans(moves, blocks)
    assert [(span.start // nbytes, span.stop // nbytes) for span in spans] == [(0, 4), (4, 8), (8, 10)]


class _FakeMove(Move):
    """Without a loop."""

    def __init__(self, request: ReadRequest) -> None:
        self.request = request
        self.outcome = None


# -- URLs ------------------------------------------------------------------------------------------------


def settings(url: str) -> S3Settings:
    with keys_in_environment():
        return tier_over(url)._settings


def test_a_url_states_bucket_prefix_and_options() -> None:
    found = settings("s3://my-bucket/a/b/?region=eu-west-1&connections=3&segment_bytes=16MiB&ttl_s=60&path_style=true")
    assert found == S3Settings(
        "my-bucket", "a/b", region="eu-west-1", connections=3, segment_bytes=16 << 20, ttl_s=60, path_style=True
    )
    assert settings("s3://my-bucket").prefix == "kvortex"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "no name of a bucket"),
        ("s3://a/b", "no name of a bucket"),
        ("s3://key:s3cret@bucket", "keys do not belong into a URL"),
        ("s3://host:9000/bucket", "endpoint=http://host:9000"),
        ("s3://bucket/../x", "a prefix has"),
        ("s3://bucket/a//b", "a prefix has"),
        ("s3://bucket?endpoint=minio:9000", "an endpoint is a URL"),
        ("s3://bucket?endpoint=http://host/path", "an endpoint is a URL"),
        ("s3://bucket?endpoint=http://user:pass@host", r"http://\*\*\*@host"),
        ("s3://bucket?endpoint=http://host:99999", "an endpoint is a URL"),
        ("s3://bucket?connections=0", "connections must be"),
        ("s3://bucket?timeout_s=0", "timeout_s must be"),
        ("s3://bucket?segment_bytes=1KiB", "segment_bytes must be"),
        ("s3://bucket?linger_s=11", "linger_s must be"),
        ("s3://bucket?rescan_s=0", "rescan_s must be"),
        ("s3://bucket?ttl_s=0", "ttl_s must be"),
        ("s3://bucket?capacity_bytes=0", "capacity_bytes must be"),
        ("s3://bucket?ca_file=/nowhere.pem", "cannot be read"),
        ("s3://bucket?anonymous=true&profile=a", "anonymous"),
        ("s3://bucket?conections=1", "connections"),
        ("s3://bucket?profile=nobody", "profile 'nobody' has no aws_access_key_id"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=says) as error:
        settings(url)
    assert "s3cret" not in str(error.value)
    assert "pass@" not in str(error.value)


def test_an_endpoint_of_the_environment_is_used_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    found = S3Settings("bucket")
    assert found.store_url == "http://127.0.0.1:1"
    assert found.address == "s3://bucket/kvortex at http://127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")
    with pytest.raises(ConfigError, match="an endpoint is a URL"):
        tier_from_url("s3://bucket", NAMESPACE)


@pytest.mark.parametrize(
    ("options", "endpoint", "is_virtual"),
    [
        ("", None, "true"),
        ("&path_style=true", None, "false"),
        ("&endpoint=https://store:9000", "https://store:9000", "false"),
        ("&endpoint=https://store:9000&path_style=false", "https://blocks.store:9000", "true"),
    ],
)
def test_how_a_bucket_is_named_in_requests(options: str, endpoint: str | None, is_virtual: str) -> None:
    with keys_in_environment():
        config = tier_over(f"s3://blocks?region=eu-west-1{options}")._store._store.config
    assert config.get("endpoint") == endpoint
    assert config.get("virtual_hosted_style_request") == is_virtual
    assert (config["region"], config["unsigned_payload"]) == ("eu-west-1", "true")


def test_where_obstore_is_not_installed_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvortex.tiers.s3.store", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvortex\[s3\]'"):
        tier_from_url("s3://bucket", NAMESPACE)


# -- keys ------------------------------------------------------------------------------------------------

KEYS = """[default]
aws_access_key_id = one
aws_secret_access_key = s3cret

[work]
aws_access_key_id = two
aws_secret_access_key = hidden
aws_session_token = token
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "credentials").write_text(KEYS)
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n\n[profile work]\nregion = us-west-2\n")
    return tmp_path


def test_keys_of_a_profile(files: Path) -> None:
    work, default = ProfileKeys("work"), ProfileKeys("default")
    assert (work()["access_key_id"], work()["secret_access_key"], work()["token"]) == ("two", "hidden", "token")
    assert (work.region(), default.region(), default()["token"]) == ("us-west-2", "eu-north-1", None)
    (files / "credentials").write_text(KEYS.replace("two", "three"))
    assert work()["access_key_id"] == "three"  # they may change
    (files / "credentials").unlink()
    (files / "config").write_text(KEYS.replace("[work]", "[profile work]"))
    assert work()["access_key_id"] == "two"


def test_a_file_that_cannot_be_read_is_named_without_its_lines(files: Path) -> None:
    (files / "credentials").write_text("aws_secret_access_key = s3cret\n")
    with pytest.raises(ConfigError, match="MissingSectionHeaderError") as error:
        ProfileKeys("default")
    assert "s3cret" not in str(error.value)
    assert error.value.__suppress_context__


def test_keys_are_not_shown(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tier = tier_over("s3://bucket?profile=work&endpoint=http://127.0.0.1:1")
    assert "hidden" not in json.dumps([repr(tier), repr(tier._settings), repr(vars(tier)), caplog.text])


# -- what answers mean -----------------------------------------------------------------------------------


def answer(status: int, body: str = "") -> StoreFailure:
    return failure_of(GenericError(f"Error performing GET http://h/b in 1ms - non-2xx status code: {status} X: {body}"))


@pytest.mark.parametrize(
    ("failure", "kind", "cause", "is_lasting", "says"),
    [
        (answer(404, "<Code>NoSuchKey</Code>"), "NoSuchKey", Cause.IO_ERROR, True, "NoSuchKey"),
        (answer(404, "<Code>NoSuchBucket</Code>"), "NoSuchBucket", Cause.IO_ERROR, True, "create the bucket"),
        (answer(403, "<Code>AccessDenied</Code>"), "AccessDenied", Cause.PERMISSION, True, "s3:GetObject"),
        (answer(403), "403", Cause.PERMISSION, True, "s3:GetObject"),
        (answer(403, "<Code>SignatureDoesNotMatch</Code>"), "SignatureDoesNotMatch", Cause.PERMISSION, True, "SECRET"),
        (answer(401), "401", Cause.PERMISSION, True, "401"),
        (answer(301, "<Code>PermanentRedirect</Code>"), "PermanentRedirect", Cause.IO_ERROR, True, "region"),
        (answer(503, "<Code>SlowDown</Code>"), "SlowDown", Cause.IO_ERROR, False, "503"),
        (answer(429), "429", Cause.IO_ERROR, False, "429"),
        (answer(507, "<Code>XMinioStorageFull</Code>"), "XMinioStorageFull", Cause.NO_SPACE, False, "507"),
        (answer(403, "<Code>QuotaExceeded</Code>"), "QuotaExceeded", Cause.NO_SPACE, True, "Quota"),
        (
            failure_of(GenericError("DeleteObjects request failed for key a/b: Access Denied (code: AccessDenied)")),
            "AccessDenied",
            Cause.PERMISSION,
            True,
            "s3:DeleteObject",
        ),
        (failure_of(GenericError("dns error")), "Dns", Cause.IO_ERROR, False, "endpoint"),
        (failure_of(GenericError("x\nInvalidCertificate(UnknownIssuer)")), "TLS", Cause.IO_ERROR, True, "ca_file"),
        (failure_of(GenericError("PUT http://169.254.169.254/latest")), "NoKeys", Cause.IO_ERROR, True, "AWS_ACCESS"),
        (failure_of(GenericError("one line\nand more")), "GenericError", Cause.IO_ERROR, False, "one line"),
    ],
)
def test_an_answer_is_told_in_a_line(
    failure: StoreFailure, kind: str, cause: Cause, is_lasting: bool, says: str
) -> None:
    assert (failure.kind, failure.cause, failure.is_lasting) == (kind, cause, is_lasting)
    assert says in str(failure)
    assert "\n" not in str(failure)
    assert len(str(failure)) <= 300


def test_names_of_random_numbers_come_back() -> None:
    rng = random.Random(0)
    for _ in range(100):
        number = SegmentId(rng.getrandbits(48), rng.getrandbits(64), rng.getrandbits(32))
        assert SegmentId.of_name(number.name) == number == SegmentId.of_key(number.key)
