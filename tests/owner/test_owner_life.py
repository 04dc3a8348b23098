"""Owners and clients that end, hang or misbehave: nobody waits for ever, reads wrong bytes or loses memory."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvortex import KVortexEngine, MissReason, SaveOutcome
from kvortex.errors import ConfigError, OwnerError
from kvortex.owner import OwnerClient, server
from kvortex.owner.protocol import HEADER, VERSION, Kind, join, numbers, pack, text_of, unpack, unpack_header
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, Parts, chain, make_cache
from tests.owner.client_program import CHAIN_BLOCKS, Churn, config_of
from tests.owner.owner_support import Holding, LocalOwner, local_owner, read_line, served_owner, spawn
from tests.shared_memory import SHM

KILLS = int(os.environ.get("KVORTEX_KILLS", "30"))
"""How many clients are killed; more of them for a long run."""
DEADLINE_S = 0.5
SLACK_S = 1.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv.sock"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No owner leaves a name behind."""
    before = set(os.listdir(SHM))
    yield
    assert not [name for name in set(os.listdir(SHM)) - before if "kvortex" in name]


@contextlib.asynccontextmanager
async def connected(path: Path, seed: int = 0, parts: Parts | None = None) -> AsyncIterator[KVortexEngine]:
    async with KVortexEngine.create(config_of(str(path), DEADLINE_S), parts) as engine:
        engine.register_kv_caches(make_cache(seed=seed), BLOCK_SIZE)
        try:
            yield engine
        finally:
            if isinstance(parts, Holding):
                parts.release()


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    due_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < due_s, "it did not come true"
        await asyncio.sleep(0.01)


def kind_of(path: Path) -> int | None:
    """What a file is; None if there is none."""
    return stat.S_IFMT(os.lstat(path).st_mode) if os.path.lexists(path) else None


def allocated(engine: KVortexEngine) -> int:
    return engine.get_stats().pools[0].allocated_bytes


def cut(engine: KVortexEngine) -> None:
    """Cut the connection of an engine, as if the owner had."""
    engine._control.client._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


def generation(engine: KVortexEngine) -> int:
    return engine._control.client.generation  # type: ignore[union-attr]


# -- clients that end --------------------------------------------------------------------------------


class Clients:
    """The program that forks clients."""

    def __init__(self, path: Path) -> None:
        self.process = spawn(["-m", "tests.owner.client_program", str(path)])
        self.running: list[int] = []

    def start(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self.running.append(int(read_line(self.process)))

    def kill(self, place: int) -> None:
        os.kill(self.running.pop(place), signal.SIGKILL)

    def end(self) -> str:
        """Returns what its clients have printed."""
        return self.process.communicate(timeout=20)[1]


@pytest.fixture
def clients(path: Path) -> Iterator[Clients]:
    made = Clients(path)
    yield made
    for pid in made.running:
        os.kill(pid, signal.SIGKILL)
    assert "wrong bytes" not in made.end()


async def test_what_a_killed_client_was_saving_is_never_found(path: Path, clients: Clients) -> None:
    with served_owner(path):
        async with connected(path) as engine:
            clients.start("hold")
            await until(lambda: allocated(engine) == 12 * BLOCK_NBYTES)
            hashes = chain(12)
            assert engine.match_prefix(hashes) == 0
            assert set((await engine.save_blocks(hashes, range(12))).outcomes) == {SaveOutcome.PENDING}
            clients.kill(0)
            await until(lambda: allocated(engine) == 0)
            assert not engine.check_blocks(hashes).any()
            assert (await engine.save_blocks(hashes, range(12))).num_stored == 12
            assert (await engine.load_blocks(hashes, range(20, 32))).ok
            assert allocated(engine) == 12 * BLOCK_NBYTES
            engine.clear()
            assert allocated(engine) == 0


async def test_what_a_client_may_write_to_is_freed_when_its_process_ends(path: Path, clients: Clients) -> None:
    with local_owner(path) as owner:
        clients.start("leave")
        await until(lambda: owner.allocated_bytes == BLOCK_NBYTES)
        await until(lambda: owner.owner.num_clients == 0)
        await asyncio.sleep(0.3)
        assert owner.allocated_bytes == BLOCK_NBYTES, "its device may still write"
        clients.kill(0)
        await until(lambda: owner.allocated_bytes == 0)


FORKS = """
import os, sys, time
from kvortex.owner import OwnerClient
from kvortex.owner.protocol import Kind, numbers
client = OwnerClient(sys.argv[1], 5.0)
client.ask(Kind.SCRATCH, numbers(4096))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


async def test_a_child_that_has_a_dead_clients_connection_open_keeps_nothing_of_it(path: Path) -> None:
    with local_owner(path) as owner:
        process = spawn(["-c", FORKS, str(path)])
        child = int(await asyncio.to_thread(read_line, process))
        try:
            assert owner.allocated_bytes == 4096
            process.kill()
            await until(lambda: owner.owner.num_clients == 0 and owner.allocated_bytes == 0)
        finally:
            os.kill(child, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
async def test_clients_that_are_killed_at_any_moment_harm_nobody(path: Path, clients: Clients) -> None:
    """The pool has room for two thirds of what they save, so that extents are used again all the time."""
    moments = random.Random(0)
    with served_owner(path, "512KiB"):
        async with KVortexEngine.create(config_of(str(path))) as engine:
            work = Churn(engine, 1000)
            for seed in range(KILLS):
                clients.start(f"churn {seed}")
                end_s = time.monotonic() + moments.uniform(0.02, 0.25)
                while time.monotonic() < end_s:
                    await work.step()
                if len(clients.running) == 3:
                    clients.kill(moments.randrange(3))
            while clients.running:
                clients.kill(0)
            for _ in range(50):
                await work.step()
            assert work.num_loaded > 500
            misses = {reason for reason, count in engine.get_stats().misses.items() if count}
            assert misses <= {MissReason.EVICTED, MissReason.NEVER_STORED, MissReason.PENDING}
            engine.clear()
            await until(lambda: allocated(engine) == 0)


async def test_extents_of_a_lost_connection_are_freed_when_its_transfers_have_ended(path: Path) -> None:
    """Its process lives on, so that the device may still write."""
    parts, hashes = Holding(), chain(12)
    with local_owner(path) as owner:
        async with connected(path, 1, parts) as engine, connected(path, 2) as other:
            parts.is_held = True
            saving = asyncio.create_task(engine.save_blocks(hashes, range(12)))
            await until(lambda: parts.num_held)
            cut(engine)
            await until(lambda: owner.owner.num_clients == 1)
            assert engine.match_prefix(hashes) == 0
            await until(lambda: generation(engine) == 1)
            assert (await other.save_blocks(hashes, range(12))).num_stored == 12
            assert owner.allocated_bytes == 24 * BLOCK_NBYTES, "the device may still write to the first twelve"
            parts.release()
            result = await saving
            assert set(result.outcomes) == {SaveOutcome.FAILED}
            await until(lambda: owner.allocated_bytes == 12 * BLOCK_NBYTES)
            assert (await engine.load_blocks(hashes, range(20, 32))).ok
            other.clear()
            assert owner.allocated_bytes == 0


async def test_an_engine_that_has_settled_says_nothing_of_another_in_its_process(path: Path) -> None:
    parts = Holding()
    with local_owner(path) as owner:
        async with connected(path, 1, parts) as engine, connected(path, 2) as other:
            parts.is_held = True
            saving = asyncio.create_task(engine.save_blocks(chain(12), range(12)))
            await until(lambda: parts.num_held)
            cut(engine)
            cut(other)
            assert engine.match_prefix(chain(12)) == other.match_prefix(chain(12)) == 0
            await until(lambda: generation(engine) == generation(other) == 1)
            assert owner.allocated_bytes == 12 * BLOCK_NBYTES, "the device may still write"
            parts.release()
            await saving
            await until(lambda: owner.allocated_bytes == 0)


async def test_loads_of_a_lost_connection_end(path: Path) -> None:
    parts, hashes = Holding(), chain(12)
    with local_owner(path) as owner:
        async with connected(path, 1, parts) as engine:
            assert (await engine.save_blocks(hashes, range(12))).ok
            parts.is_held = True
            loading = asyncio.create_task(engine.load_blocks(hashes, range(20, 32)))
            await until(lambda: parts.num_held)
            cut(engine)
            assert engine.match_prefix(hashes) == 0
            assert engine.miss_reason(hashes[0]) is MissReason.OWNER_LOST
            await until(lambda: generation(engine) == 1)
            parts.release()
            assert (await loading).ok
            assert engine.match_prefix(hashes) == 12
            engine.clear()
            assert owner.allocated_bytes == 0, "nothing is pinned any more"


async def test_a_lease_of_a_lost_connection_harms_nothing(path: Path) -> None:
    with local_owner(path) as owner:
        async with connected(path) as engine:
            hashes = chain(12)
            assert (await engine.save_blocks(hashes, range(12))).ok
            lease = engine.pin(hashes, ttl_s=60)
            cut(engine)
            assert engine.match_prefix(hashes) == 0
            await until(lambda: generation(engine) == 1)
            with engine.pin(hashes, ttl_s=60) as second:
                lease.release()
                assert second.num_blocks == 12
                engine.clear()
                assert owner.allocated_bytes == 12 * BLOCK_NBYTES
            await until(lambda: owner.allocated_bytes == 0)


# -- owners that end or hang -------------------------------------------------------------------------


@pytest.mark.slow
async def test_an_owner_that_is_killed_at_any_moment_harms_no_engine(path: Path) -> None:
    """Whatever was asked just then: the engine goes on within its deadline, and its bytes are right."""
    moments = random.Random(0)
    for seed in range(KILLS // 3):
        with served_owner(path, "512KiB") as owner:
            async with KVortexEngine.create(config_of(str(path), DEADLINE_S)) as engine:
                work, delay_s = Churn(engine, seed), moments.uniform(0.0, 0.2)
                asyncio.get_running_loop().call_later(delay_s, owner.process.kill)
                end_s = time.monotonic() + delay_s + 0.1
                while time.monotonic() < end_s:
                    start_s = time.monotonic()
                    await work.step()
                    assert time.monotonic() - start_s < DEADLINE_S + SLACK_S
                assert engine.match_prefix(chain(CHAIN_BLOCKS, 0)) == 0


async def test_engines_go_on_without_an_owner_that_was_killed(path: Path) -> None:
    parts = Holding()
    with served_owner(path) as owner:
        async with connected(path, 1, parts) as engine:
            hashes = chain(12)
            assert (await engine.save_blocks(hashes, range(12))).ok
            parts.is_held = True
            saving = asyncio.create_task(engine.save_blocks(chain(12, 1), range(12)))
            await until(lambda: parts.num_held)
            owner.end(signal.SIGKILL)
            parts.release()
            assert set((await saving).outcomes) == {SaveOutcome.FAILED}
            start_s = time.monotonic()
            for _ in range(20):
                assert engine.match_prefix(hashes) == 0
                assert engine.miss_reason(hashes[0]) is MissReason.OWNER_LOST
                assert set((await engine.save_blocks(hashes, range(12))).outcomes) == {SaveOutcome.FAILED}
                assert set((await engine.load_blocks(hashes, range(20, 32))).outcomes) == {MissReason.OWNER_LOST}
                assert engine.pin(hashes, ttl_s=60).num_blocks == 0
                assert allocated(engine) == 0
            for forget in (lambda: engine.invalidate(hashes), lambda: asyncio.to_thread(engine.clear)):
                with pytest.raises(OwnerError):
                    await forget()
            assert time.monotonic() - start_s < DEADLINE_S
            start_s = time.monotonic()
        assert time.monotonic() - start_s < DEADLINE_S + SLACK_S


async def test_an_owner_that_hangs_costs_one_deadline_and_is_found_again(path: Path) -> None:
    with served_owner(path) as owner:
        async with connected(path, 1) as engine, connected(path, 2) as other:
            hashes = chain(12)
            assert (await engine.save_blocks(hashes, range(12))).ok
            owner.send(signal.SIGSTOP)
            start_s = time.monotonic()
            answers = await asyncio.gather(*(asyncio.to_thread(engine.match_prefix, hashes) for _ in range(4)))
            assert answers == [0] * 4
            assert set((await engine.load_blocks(hashes, range(20, 32))).outcomes) == {MissReason.OWNER_LOST}
            assert set((await engine.save_blocks(hashes, range(12))).outcomes) == {SaveOutcome.FAILED}
            assert DEADLINE_S * 0.9 < time.monotonic() - start_s < DEADLINE_S + SLACK_S
            await asyncio.sleep(2.5)  # it tries to connect meanwhile
            owner.send(signal.SIGCONT)
            await until(lambda: generation(engine) == 1)
            assert engine.match_prefix(hashes) == 12
            assert (await engine.load_blocks(hashes, range(20, 32))).ok
            assert other.match_prefix(hashes) == 12
            assert generation(other) == 0
            engine.clear()
            assert allocated(engine) == 0


async def test_an_owner_that_was_started_anew_serves_new_engines(path: Path) -> None:
    """A killed owner leaves its socket; the next one takes it over, with other memory. Engines that run move to it."""
    with served_owner(path) as first:
        async with connected(path) as engine:
            hashes = chain(12)
            assert (await engine.save_blocks(hashes, range(12))).ok
            first.end(signal.SIGKILL)
            assert kind_of(path) == stat.S_IFSOCK
            with served_owner(path) as second:
                assert second.said["pid"] != first.said["pid"]
                async with connected(path) as new:
                    assert new.match_prefix(hashes) == 0
                    assert (await new.save_blocks(hashes, range(12))).ok
                    await until(lambda: engine.match_prefix(hashes) == 12)
    assert kind_of(path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_owner_and_leaves_no_file(path: Path, number: signal.Signals) -> None:
    with served_owner(path) as owner:
        assert owner.said == {"socket": str(path), "pool_bytes": 64 << 20, "lower_tier": "", "pid": owner.process.pid}
        assert os.stat(path).st_mode & 0o777 == 0o600
        async with connected(path) as engine:
            assert (await engine.save_blocks(chain(12), range(12))).ok
            status, errors = owner.end(number)
        assert (status, list(path.parent.iterdir())) == (0, [])
        assert "ERROR" not in errors
        assert "Traceback" not in errors


async def test_a_second_owner_of_a_socket_is_refused(path: Path) -> None:
    with served_owner(path) as owner:
        second = spawn(["-m", "kvortex", "serve", "--pool", "64MiB", "--socket", str(path)])
        try:
            said, errors = second.communicate(timeout=20)
        finally:
            second.kill()
        assert (second.returncode, said) == (2, "")
        assert f"another owner listens at {path}: end it first, or take another socket" in errors
        assert "Traceback" not in errors
        async with connected(path) as engine:
            assert (await engine.save_blocks(chain(12), range(12))).ok
        assert owner.process.poll() is None


@pytest.mark.parametrize("place", ["file", "folder", "file/below", "x" * 120])
def test_a_socket_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("something")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot listen at"):
        LocalOwner(tmp_path / place)
    assert (tmp_path / "file").read_text() == "something"


# -- sockets -----------------------------------------------------------------------------------------


async def test_a_deleted_socket_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SOCKET_CHECK_S", 0.05)
    with local_owner(path) as owner:
        async with connected(path, 1) as engine:
            hashes = chain(12)
            assert (await engine.save_blocks(hashes, range(12))).ok
            for round_ in range(4):
                os.unlink(path)
                assert engine.match_prefix(hashes) == 12
                await until(lambda: kind_of(path))
                with raw_client(path, pause_s=0.1):
                    async with connected(path, 2 + round_) as other:
                        assert (await other.load_blocks(hashes, range(12))).ok
            engine.clear()
        assert owner.allocated_bytes == 0
    assert list(path.parent.iterdir()) == []


def hello(version: int = VERSION) -> bytes:
    return join(pack(Kind.HELLO, 1, numbers(version)))


def raw_client(path: Path, version: int = VERSION, pause_s: float = 0.0) -> socket.socket:
    """A connection that has said hello, half of it after a pause."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5.0)
    client.connect(str(path))
    client.sendall(hello(version)[:20])
    time.sleep(pause_s)
    client.sendall(hello(version)[20:])
    return client


def receive(client: socket.socket) -> tuple[Kind, list[np.ndarray]]:
    kind, count, _, nbytes = unpack_header(client.recv(HEADER.size, socket.MSG_WAITALL))
    return kind, unpack(kind, count, client.recv(nbytes, socket.MSG_WAITALL))


def is_closed(client: socket.socket) -> bool:
    """Whether the owner has closed the connection, after what it has still said."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.fixture
def owner(path: Path) -> Iterator[LocalOwner]:
    with local_owner(path) as made:
        yield made


def test_a_client_whose_end_the_owner_could_not_see_is_refused(path: Path) -> None:
    """In a container of its own a process has no number that means anything to the owner."""
    apart = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("this user may not make a PID namespace")
    command = [*apart, sys.executable, "-m", "kvortex", "serve", "--pool", "1MiB", "--socket", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        try:
            read_line(owner)
            with pytest.raises(OwnerError, match="PID namespace"):
                OwnerClient(path, 5.0)
        finally:
            owner.kill()


def test_a_client_of_another_version_is_told_both(owner: LocalOwner) -> None:
    with raw_client(owner.path, VERSION + 1) as client:
        kind, (why,) = receive(client)
        assert kind is Kind.REFUSED
        assert f"speaks version {VERSION} of the protocol, and this engine {VERSION + 1}" in text_of(why)
        assert is_closed(client)


def test_an_owner_of_another_version_is_named(owner: LocalOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.owner.client.VERSION", 99)
    with pytest.raises(OwnerError, match=f"speaks version {VERSION} of the protocol, and this engine 99"):
        OwnerClient(owner.path, DEADLINE_S)


def test_a_connection_that_says_nothing_is_dropped(owner: LocalOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 0.2)
    silent, slow = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with silent, slow:
        for client in (silent, slow):
            client.settimeout(3.0)
            client.connect(str(owner.path))
        slow.sendall(hello()[:10])
        assert is_closed(silent)
        assert is_closed(slow)
    with raw_client(owner.path) as client:
        assert receive(client)[0] is Kind.WELCOME
        time.sleep(0.4)
        client.sendall(join(pack(Kind.SCRATCH, 2, numbers(4096))))
        assert receive(client)[0] is Kind.SCRATCH_GIVEN, "afterwards it may be silent"


UNEXPECTED = {
    "noise": os.urandom(256),
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a large frame": HEADER.pack(2**32 - 1, Kind.HELLO, 1, 1) + b"x" * 64,
    "a large hello": HEADER.pack(8192, Kind.HELLO, 1, 1),
    "another first frame": join(pack(Kind.CLEAR, 1)),
    "a hello without a version": join(pack(Kind.HELLO, 1, numbers())),
    "half a hello": hello()[:12],
}


@pytest.mark.parametrize("what", list(UNEXPECTED))
async def test_garbage_at_first_harms_nobody(owner: LocalOwner, what: str, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(owner.path) as engine:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(3.0)
            client.connect(str(owner.path))
            client.sendall(UNEXPECTED[what])
            client.shutdown(socket.SHUT_WR)
            assert is_closed(client)
        assert (await engine.save_blocks(chain(12), range(12))).ok
        engine.clear()
    assert "unexpected error" not in caplog.text


AFTER_HELLO = {
    "noise": b"\xa5" * 256,
    "a wrong frame": join(pack(Kind.CLEAR, 1)),
    "an answer": join(pack(Kind.DONE, 1)),
    "half a frame": join(pack(Kind.SCRATCH, 3, numbers(4096)))[:20],
}


@pytest.mark.parametrize("what", list(AFTER_HELLO))
async def test_garbage_later_ends_one_connection_and_gives_back_what_it_held(owner: LocalOwner, what: str) -> None:
    async with connected(owner.path) as engine:
        with raw_client(owner.path) as client:
            assert receive(client)[0] is Kind.WELCOME
            client.sendall(join(pack(Kind.SCRATCH, 2, numbers(4096))))
            assert receive(client)[0] is Kind.SCRATCH_GIVEN
            client.sendall(AFTER_HELLO[what])
            client.shutdown(socket.SHUT_WR)
            assert is_closed(client)
        assert (await engine.save_blocks(chain(12), range(12))).ok
        engine.clear()
        await until(lambda: owner.owner.num_clients == 1)


async def test_a_client_that_does_not_read_its_answers_harms_nobody(owner: LocalOwner) -> None:
    """It is dropped while answers to it still wait; the next connections may get its descriptor."""
    async with connected(owner.path) as engine:
        keys = np.zeros((8192, 4), np.uint64)
        for count in range(24, 40):
            with raw_client(owner.path) as client:
                assert receive(client)[0] is Kind.WELCOME
                client.setblocking(False)
                frames = join(pack(Kind.SCRATCH, 1, numbers(-1))) * (count * 100) + b"\xa5" * 64
                with contextlib.suppress(BlockingIOError):
                    client.sendall(frames)
                await asyncio.sleep(0.02)
                others = [raw_client(owner.path, pause_s=0.005) for _ in range(3)]
                for other in others:
                    assert receive(other)[0] is Kind.WELCOME
                    other.sendall(join(pack(Kind.SCRATCH_DONE, 7)))
                    assert receive(other)[0] is Kind.DONE
                    other.close()
        assert engine.match_prefix(keys) == 0
        await until(lambda: owner.owner.num_clients == 1)
