"""Parts of the tier over Redis without a server: URLs, the protocol's replies, and pauses between connections."""

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvortex import KVortexConfig
from kvortex.errors import ConfigError, InvalidHashError
from kvortex.testing.tier_conformance import NAMESPACE
from kvortex.tiers import RedisTier, tier_from_url
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.redis.connections import Connections
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.lookup import LookUp
from kvortex.tiers.redis.resp import LONGEST_LINE, ReplyError, Wire, command, commands, integer_of
from kvortex.tiers.redis.servers import Cluster, NoNode
from kvortex.tiers.redis.settings import RedisSettings

# -- URLs ------------------------------------------------------------------------------------------------


def settings_of(url: str) -> RedisSettings:
    tier = tier_from_url(url, NAMESPACE)
    assert isinstance(tier, RedisTier)
    return tier._settings


def test_what_a_url_says(tmp_path: Path) -> None:
    assert settings_of("redis://cache") == RedisSettings(host="cache", port=6379)
    assert settings_of(
        "redis://me:p%40s%2Fs@cache:99/7?ttl_s=60&connections=2&timeout_s=1.5&prefix=a:"
    ) == RedisSettings(
        host="cache",
        port=99,
        username="me",
        password="p@s/s",
        db=7,
        ttl_s=60,
        connections=2,
        timeout_s=1.5,
        prefix="a:",
    )
    assert settings_of("redis://:secret@[::1]:99/") == RedisSettings(host="::1", port=99, password="secret")
    assert settings_of("redis://:secret@[::1]:99/").address == "[::1]:99"
    assert settings_of("unix:///run/a%20b.sock?db=2&capacity_bytes=1GiB") == RedisSettings(
        path="/run/a b.sock", db=2, capacity_bytes=1 << 30
    )
    assert settings_of("unix://me:pw@/run/redis.sock").username == "me"
    assert settings_of("redis+cluster://me:pw@a,b:7,[::1]:8") == RedisSettings(
        seeds=(("a", 6379), ("b", 7), ("::1", 8)), username="me", password="pw"
    )
    assert settings_of("redis+cluster://a,[::1]:8").address == "a:6379,[::1]:8"
    password = tmp_path / "password"
    password.write_text("of-sentinel\n")
    of_sentinels = settings_of(
        f"rediss+sentinel://a/main?sentinel_username=me&sentinel_password_file={password}&sentinel_tls=true"
    )
    assert (of_sentinels.sentinel_username, of_sentinels.sentinel_secret()) == ("me", "of-sentinel")
    assert of_sentinels.sentinel_tls
    assert settings_of("redis+sentinel://a/main").sentinel_secret() is None
    assert settings_of("rediss+sentinel://a,b:7/main/3") == RedisSettings(
        seeds=(("a", 26379), ("b", 7)), service="main", db=3, tls=True
    )
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("")
    assert settings_of(f"rediss://cache?ca_file={ca_file}") == RedisSettings(
        host="cache", tls=True, ca_file=str(ca_file)
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://", "name one server: redis://host:6379"),
        ("redis:///0", "name one server"),
        ("unix://", "name a server"),
        ("unix://run/redis.sock", "three slashes: unix:///run/redis.sock"),
        ("redis://a,b", "name one server"),
        ("redis+cluster://", "name a server"),
        ("redis+cluster://a/1", "a cluster has one database"),
        ("redis+cluster://a?db=1", "unknown option 'db'"),
        ("redis+cluster://a?ca_file=/b", "unknown option 'ca_file'"),
        ("redis+sentinel://a", "name the service behind the sentinels"),
        ("redis+sentinel:///main", "name a server"),
        ("redis+sentinel://a/main?sentinel_tls=1", "unknown option 'sentinel_tls'"),
        ("redis+sentinel://a/main?sentinel_password_file=/no/such", "sentinel_password_file '/no/such' cannot be read"),
        ("redis://a?sentinel_username=b", "unknown option 'sentinel_username'"),
        ("redis+sentinel://a/main/x", "the number of a database, not 'x'"),
        ("redis://cache:port", "no host and port"),
        ("redis://cache:70000", "no host and port"),
        ("redis://cache/seven", "the number of a database, not '/seven'"),
        ("redis://cache?tls=1", "unknown option 'tls'; redis: knows "),
        ("redis://cache?ca_file=/a", "unknown option 'ca_file'"),
        ("redis://cache?db=1", "unknown option 'db'"),
        ("rediss://cache?ca_file=/no/such/file", "ca_file '/no/such/file' cannot be read"),
        ("redis://cache?password_file=/no/such/file", "password_file '/no/such/file' cannot be read"),
        ("redis://:a@cache?password_file=/dev/null", "not both"),
        ("redis://cache?connections=0", "connections must be 1 to 256"),
        ("redis://cache?timeout_s=0", "timeout_s must be above 0"),
        ("redis://cache?timeout_s=nan", "timeout_s must be a finite number"),
        ("redis://cache?ttl_s=0", "ttl_s must be at least 1"),
        ("redis://cache?ttl_s=1.5", "ttl_s"),
        ("redis://cache?capacity_bytes=0", "capacity_bytes must be at least 1"),
        ("redis://cache?prefix=a%20b", "prefix must be printable"),
        ("unix:///a?db=-1", "is not negative"),
    ],
)
def test_what_is_wrong_is_told(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tier_from_url(url, NAMESPACE)


def test_a_namespace_is_32_bytes() -> None:
    with pytest.raises(InvalidHashError):
        tier_from_url("redis://cache", b"short")


def test_without_redis_py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "kvortex.tiers.redis.dialling", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'kvortex\[redis\]'"):
        tier_from_url("redis://cache", NAMESPACE)


def test_passwords_are_not_shown() -> None:
    config = KVortexConfig(tier=["redis://me:s3cret@a:1", "unix://:s3cret@/run/redis.sock?db=1"])
    assert config.lower_tier == "redis://me:***@a:1 unix://:***@/run/redis.sock?db=1"
    assert "s3cret" not in repr(settings_of("redis://me:s3cret@cache"))
    wrong = [
        "redis://me:s3cret@cache:port",
        "redis://me:s3cret@cache?tls=1",
        "redis://me:s3cret@cache/x",
        "redist://:s3cret@a",
    ]
    wrong += ["redis://me:s3cret@cache?ttl_s=1&ttl_s=1", "redis://me:s3cret@cache#a", "redis://me:s3cret@[cache"]
    for url in wrong:
        with pytest.raises(ConfigError) as raised:
            tier_from_url(url, NAMESPACE)
        assert "s3cret" not in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        config.replace(disk="/b")
    assert "s3cret" not in str(raised.value)


# -- the protocol ----------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the other end of it."""
    mine, theirs = socket.socketpair()
    wire = Wire(mine, 5.0)
    with theirs:
        yield wire, theirs
        wire.close()


def test_commands_are_as_the_protocol_wants_them() -> None:
    assert command(b"GET", b"") == b"*2\r\n$3\r\nGET\r\n$0\r\n\r\n"
    assert commands(b"STRLEN", []) == b""
    assert commands(b"EXPIRE", [b"a1", b"a2"], b"60") == command(b"EXPIRE", b"a1", b"60") + command(
        b"EXPIRE", b"a2", b"60"
    )


@pytest.mark.parametrize("piece", [1, 2, 3, 1000])
def test_replies_in_pieces_of_any_length(pair: tuple[Wire, socket.socket], piece: int) -> None:
    wire, theirs = pair
    sent = b"+OK\r\n:-3\r\n$-1\r\n$4\r\na\r\nb\r\n*2\r\n$1\r\n0\r\n*0\r\n-ERR no\r\n$5\r\nhello\r\n:7\r\n-OOM full\r\n"
    pieces = [sent[at : at + piece] for at in range(0, len(sent), piece)]
    sender = threading.Thread(target=lambda: [theirs.send(part) for part in pieces])
    sender.start()
    wire.send(b"?")
    assert [wire.reply() for _ in range(5)] == ["OK", -3, None, b"a\r\nb", [b"0", []]]
    error = wire.reply()
    assert isinstance(error, ReplyError)
    assert (str(error), error.code) == ("ERR no", "ERR")
    assert wire.bulk_bytes(6) == 5
    first, last = memoryview(bytearray(3)), memoryview(bytearray(4))
    wire.fill(first, last)
    assert (bytes(first), bytes(last)) == (b"hel", b"lo\r\n")
    numbers = [integer_of(line) for line in wire.lines(2)]
    assert numbers[0] == 7
    assert isinstance(numbers[1], ReplyError)
    assert wire.is_fresh()
    sender.join()


@pytest.mark.parametrize(
    "sent", [b"HTTP/1.1 400 Bad Request\r\n", b"$x\r\n", b"\r\n", b"*\r\n", b"?" * (LONGEST_LINE + 9)]
)
@pytest.mark.parametrize(
    "take", [Wire.reply, lambda wire: wire.bulk_bytes(10), lambda wire: integer_of(*wire.lines(1))]
)
def test_what_is_no_reply_is_an_error(
    pair: tuple[Wire, socket.socket], sent: bytes, take: Callable[[Wire], Any]
) -> None:
    wire, theirs = pair
    wire.send(b"?")
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        take(wire)


def test_a_connection_that_says_something_unasked_is_of_no_use(pair: tuple[Wire, socket.socket]) -> None:
    wire, theirs = pair
    assert wire.is_fresh()
    theirs.send(b"-ERR")
    assert not wire.is_fresh()


def test_a_peer_that_takes_nothing_ends_in_time() -> None:
    mine, theirs = socket.socketpair()
    wire = Wire(mine, 0.1)
    with theirs:
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            wire.send(bytes(1 << 24))
        wire.close()


# -- connections -----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def lone_wire() -> Wire:
    """A wire whose other end has gone."""
    mine, theirs = socket.socketpair()
    theirs.close()
    return Wire(mine, 1.0)


def test_pauses_between_attempts_grow() -> None:
    clock, attempts = Clock(), []
    is_there = False

    def dial() -> Wire:
        attempts.append(round(clock.now_s - 100.0, 3))
        if not is_there:
            raise ConnectionRefusedError("nobody there")
        return lone_wire()

    connections = Connections(dial, FailureLog("a test"), clock)

    def ask() -> None:
        with pytest.raises(StoreFailure, match="nobody there"), connections.exchange():
            pass

    while clock.now_s < 130.0:
        ask()
        clock.now_s += 0.01
    pauses = [after - before for before, after in itertools.pairwise(attempts)]
    assert [round(pause, 1) for pause in pauses] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2] + [5.0] * (len(pauses) - 6)
    assert len(pauses) > 8
    is_there = True
    clock.now_s += 5.0
    with connections.exchange():
        assert connections.num_open == 1
    connections.abort()
    assert connections.num_open == 0


def test_a_connection_in_which_a_caller_fails_is_not_used_again() -> None:
    wires: list[Wire] = []

    def dial() -> Wire:
        wires.append(lone_wire())
        return wires[-1]

    connections = Connections(dial, FailureLog("a test"))
    with pytest.raises(ZeroDivisionError), connections.exchange():
        raise ZeroDivisionError
    assert connections.num_open == 0
    connections.abort()
    with pytest.raises(StoreFailure, match="closed"), connections.exchange():
        pass
    assert len(wires) == 1


# -- the table of a cluster ------------------------------------------------------------------------------


class Halves:
    """Two nodes: one has the names that begin with a letter up to `middle`, the other has those behind it."""

    def __init__(self, middle: bytes) -> None:
        self._middle = middle
        self.nodes = [("left", 1), ("right", 2)]

    def node_of(self, name: bytes) -> tuple[str, int]:
        if name == b"?":
            raise NoNode("nobody has it")
        return self.nodes[name > self._middle]


def test_a_table_in_doubt_is_asked_for_again_and_kept_if_nobody_answers() -> None:
    clock, tables, asked = Clock(), [b"m"], []

    def open_table(known: Iterable[tuple[str, int]]) -> Halves:
        asked.append(list(known))
        if not tables:
            raise ConnectionRefusedError("nobody there")
        return Halves(tables[0])

    cluster = Cluster(open_table, lambda place: lone_wire(), FailureLog("a test"), clock)
    left, right = cluster.of(b"a"), cluster.of(b"z")
    assert cluster.all() == [left, right]
    assert cluster.split([b"a", b"z", b"?", b"b"]) == {left: [b"a", b"b"], right: [b"z"]}
    with pytest.raises(StoreFailure, match="nobody has it"):
        cluster.of(b"?")
    assert len(asked) == 1
    tables[0] = b"y"
    cluster.doubt()
    assert cluster.of(b"x") is right  # the table is young
    clock.now_s += 1.0
    assert cluster.of(b"x") is left
    assert asked[1] == [("left", 1), ("right", 2)]
    tables.clear()
    for _ in range(100):
        cluster.doubt()
        clock.now_s += 0.1
        assert cluster.of(b"x") is left
    assert 3 <= len(asked) <= 10
    cluster.abort()
    with pytest.raises(StoreFailure, match="closed"):
        cluster.of(b"x")


def test_a_node_that_another_one_names_is_used_before_the_table_has_it() -> None:
    clock, tables = Clock(), [[("left", 1), ("right", 2)]]

    def open_table(known: Iterable[tuple[str, int]]) -> Halves:
        table = Halves(b"m")
        table.nodes = tables[-1]
        return table

    cluster = Cluster(open_table, lambda place: lone_wire(), FailureLog("a test"), clock)
    left = cluster.of(b"a")
    new = cluster.at("new:3", b"a")
    assert new not in cluster.all()
    assert cluster.at("left:1", b"z") is left
    assert cluster.at(":1", b"a") is left  # the same host
    assert cluster.at("::1:6379", b"a") is cluster.at("::1:6379", b"z")
    with new.exchange():
        cluster.doubt()
        clock.now_s += 1.0
        cluster.of(b"a")  # the table is asked for again
        assert new.num_open == 1
    assert cluster.at("new:3", b"a") is new
    nodes = [("left", 1), ("right", 2), ("new", 3)]
    for known in (nodes, nodes[:2]):  # it comes into the table, and leaves it
        tables.append(known)
        cluster.doubt()
        clock.now_s += 1.0
        cluster.of(b"a")
    assert cluster.at("new:3", b"a") is not new
    for address in ("new", "new:", "", "a:b"):
        with pytest.raises(StoreFailure, match="no address of a node"):
            cluster.at(address, b"a")
    cluster.abort()
    with pytest.raises(StoreFailure, match="closed"):
        cluster.at("new:3", b"a")


def test_while_a_table_is_asked_for_others_use_the_old_one() -> None:
    clock, asking, answered = Clock(), threading.Event(), threading.Event()

    def open_table(known: Iterable[tuple[str, int]]) -> Halves:
        if known:
            asking.set()
            assert answered.wait(30)
        return Halves(b"m")

    cluster = Cluster(open_table, lambda place: lone_wire(), FailureLog("a test"), clock)
    left = cluster.of(b"a")
    cluster.doubt()
    clock.now_s += 1.0
    other = threading.Thread(target=cluster.of, args=(b"a",))
    other.start()
    assert asking.wait(30)
    assert cluster.of(b"a") is left
    answered.set()
    other.join()


# -- blocks that are looked up together ------------------------------------------------------------------


def failure_of(text: str) -> StoreFailure:
    return StoreFailure(ConnectionResetError(text))


def test_a_question_is_asked_once_and_again_if_it_has_failed() -> None:
    asked: list[int] = []

    def ask() -> None:
        asked.append(len(asked))
        if len(asked) < 3:
            raise failure_of(f"attempt {len(asked)}")

    lookup = LookUp(ask)
    for number in (1, 2):
        with pytest.raises(StoreFailure, match=f"attempt {number}"):
            lookup.ensure()
    for _ in range(3):
        lookup.ensure()
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_wait_for_the_answer_of_the_first_and_share_its_failure(fails: bool) -> None:
    """If each asked again, the last of many threads would fail only after as many timeouts."""
    asking, answered, asked, failed = threading.Event(), threading.Event(), [], []

    def ask() -> None:
        asked.append(threading.current_thread())
        asking.set()
        assert answered.wait(30)
        if fails:
            raise failure_of("no answer")

    lookup = LookUp(ask)

    def ensure() -> None:
        try:
            lookup.ensure()
        except StoreFailure as failure:
            failed.append(str(failure))

    threads = [threading.Thread(target=ensure) for _ in range(5)]
    threads[0].start()
    assert asking.wait(30)
    for thread in threads[1:]:
        thread.start()
    waiting_for_lock(threads[1:])
    answered.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert asked == [threads[0]]
    assert failed == ["no answer"] * (5 * fails)


def waiting_for_lock(threads: Iterable[threading.Thread]) -> None:
    """Return once all of these threads wait inside of `LookUp.ensure`."""
    due_s = time.monotonic() + 30
    for thread in threads:
        while True:
            frame = sys._current_frames().get(thread.ident or 0)
            if frame is not None and frame.f_code is LookUp.ensure.__code__ and "before" in frame.f_locals:
                break
            assert time.monotonic() < due_s
            time.sleep(0.001)
