"""Helpers for the tests of owners: sessions without I/O, owners in this process and in others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex import KVortexConfig
from kvortex.codecs import Codec, Encodings
from kvortex.config import KIB, MIB
from kvortex.errors import ConfigError
from kvortex.groups import GroupSet, KVGroup
from kvortex.index import pack_keys
from kvortex.owner import Owner
from kvortex.owner.caches import Caches, describe_forms, describe_groups
from kvortex.owner.protocol import HEADER, Arrays, Field, Kind, join, numbers, pack, unpack, unpack_header
from kvortex.owner.session import Session
from kvortex.owner.tiers import MakeTier
from kvortex.planes.control import ControlPlane
from kvortex.runtime.loop_thread import LoopThread
from kvortex.testing import Fault, FaultInjectingExecutor
from kvortex.tiering import tier_of
from kvortex.types import BlockSizes
from tests.engine_support import Parts

Keys = NDArray[np.uint64]

SINGLE = GroupSet([KVGroup("full", ("f",), 16)], 16)
NO_FLAGS, NO_KEYS = np.empty(0, np.uint8), np.empty(0, np.uint64)


class NoProcess:
    """The process of a client that there is not."""

    def __init__(self) -> None:
        self.settled: list[int] = []

    def has_settled(self, client: int) -> None:
        self.settled.append(client)

    def write_for(self, name: str) -> None:
        pass


class Client:
    """A session that is asked through the bytes of frames, as over a socket.

    Args:
        caches: the caches of the pool.
        namespace: a number; clients with the same one share blocks.
    """

    def __init__(self, caches: Caches, namespace: int = 0) -> None:
        self.process = NoProcess()
        self.session = Session(caches, self.process, 7)
        self.namespace = np.full(4, namespace, np.uint64)

    def ask(self, kind: Kind, *fields: Field) -> Arrays:
        answer = self.session.answer(kind, self._through(kind, fields))
        if answer is None:
            return []
        answered, values = answer
        if answered is Kind.REFUSED:
            raise ConfigError(bytes(values[0]).decode())
        return self._through(answered, values)

    @staticmethod
    def _through(kind: Kind, fields: tuple[Field, ...]) -> Arrays:
        frame = join(pack(kind, 1, *fields))
        found, count, _, nbytes = unpack_header(frame[: HEADER.size])
        assert (found, nbytes) == (kind, len(frame) - HEADER.size)
        return unpack(kind, count, frame[HEADER.size :])

    def add(self, sizes: tuple[BlockSizes, ...] = (BlockSizes(4096, 4096),), groups: GroupSet = SINGLE) -> "Client":
        self.ask(Kind.ADD_CACHE, self.namespace, forms_of(sizes), describe_groups(groups).encode())
        return self

    def rank(self, priority: int | None = None, quota_bytes: int | None = None) -> None:
        given = (priority is not None, priority or 0, quota_bytes is not None, quota_bytes or 0)
        self.ask(Kind.RANK, numbers(*given))

    def plan_save(self, keys: Keys, groups: NDArray[np.uint8] | None = None, *, raw: bool = False) -> Arrays:
        of_blocks = np.zeros(len(keys), np.uint8) if groups is None else groups
        return self.ask(Kind.PLAN_SAVE, numbers(raw), keys, of_blocks, NO_KEYS)

    def finish_save(self, slots: NDArray[np.int64], digests: Keys | None = None, *masks: NDArray[np.uint8]) -> None:
        masks += (NO_FLAGS,) * (3 - len(masks))
        self.ask(Kind.FINISH_SAVE, slots, np.zeros(len(slots), np.uint64) if digests is None else digests, *masks)

    def save(self, keys: Keys) -> list[int]:
        states, slots, *_ = self.plan_save(keys)
        self.finish_save(slots)
        return states.tolist()

    def found(self, keys: Keys) -> list[bool]:
        return self.ask(Kind.CONTAINS, keys)[0].astype(bool).tolist()


def forms_of(sizes: tuple[BlockSizes, ...]) -> NDArray[np.int64]:
    """Blocks whose payloads fill their extents; packed ones where these are smaller."""
    extents = [nbytes for s in sizes for nbytes in (s.raw, s.packed)]
    codecs = [codec for s in sizes for codec in (Codec.RAW, Codec.FP8 if s.packs else Codec.RAW)]
    return describe_forms(extents, Encodings(extents, codecs))


def make_caches(pool_bytes: int, piece_bytes: int | None = None, **changes: Any) -> Caches:
    pool = {"bytes": pool_bytes, "pin_piece_bytes": piece_bytes or pool_bytes}
    config = KVortexConfig(pool=pool, eviction={"watermark": 1.0, **changes})
    return Caches(ControlPlane.from_config(config, pool_bytes, ()))


def some_keys(count: int, salt: int = 0) -> Keys:
    return pack_keys([bytes([salt]) * 16 + n.to_bytes(16, "little") for n in range(count)])


class Holding(Parts):
    """Transfers of an engine end when it is said."""

    def __init__(self) -> None:
        super().__init__(wrap_executor=self.wrap)
        self.is_held = False
        self.executor: FaultInjectingExecutor | None = None

    def wrap(self, inner: Any) -> FaultInjectingExecutor:
        self.executor = FaultInjectingExecutor(inner, lambda number, batch: Fault.HOLD if self.is_held else None)
        return self.executor

    def release(self) -> None:
        self.is_held = False
        assert self.executor is not None
        self.executor.release()

    @property
    def num_held(self) -> int:
        assert self.executor is not None
        return self.executor.num_held


# -- owners ------------------------------------------------------------------------------------------


class LocalOwner:
    """An owner on a loop thread of this process.

    Args:
        path: of its socket.
        pool: size of its pool and of the pieces.
        make_tier: makes the lower tier of a namespace; by default as the settings say.
        changes: other settings.
    """

    def __init__(
        self, path: Path, pool: dict[str, int] | None = None, make_tier: MakeTier = tier_of, **changes: Any
    ) -> None:
        self.path = path
        self.thread = LoopThread()
        config = KVortexConfig(pool=pool or {"bytes": 4 * MIB, "pin_piece_bytes": 256 * KIB}, **changes)

        async def start() -> Owner:
            owner = Owner(config, path, make_tier)
            owner.start()
            return owner

        try:
            self.owner = self.thread.run(start())
        except BaseException:
            self.thread.stop()
            raise

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function on the owner's loop."""

        async def run() -> Any:
            return function()

        return self.thread.run(run())

    @property
    def allocated_bytes(self) -> int:
        return int(self.call(lambda: self.owner.control.allocator.allocated_bytes))

    def clear(self) -> None:
        self.call(self.owner.control.clear)

    def stop(self) -> None:
        self.thread.run(self.owner.aclose())
        self.thread.stop()


@contextlib.contextmanager
def local_owner(
    path: Path, pool: dict[str, int] | None = None, make_tier: MakeTier = tier_of, **changes: Any
) -> Iterator[LocalOwner]:
    owner = LocalOwner(path, pool, make_tier, **changes)
    try:
        yield owner
    finally:
        owner.stop()


class ServedOwner:
    """`kvortex serve` in a process of its own.

    Args:
        path: of its socket.
        pool: size of its pool.
    """

    def __init__(self, path: Path, pool: str = "64MiB") -> None:
        self.path = path
        self.process = spawn(["-m", "kvortex", "serve", "--pool", pool, "--socket", str(path), "--json"])
        self.said = json.loads(read_line(self.process))

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it; returns its exit status and what it has logged."""
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(number)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@contextlib.contextmanager
def served_owner(path: Path, pool: str = "64MiB") -> Iterator[ServedOwner]:
    owner = ServedOwner(path, pool)
    try:
        yield owner
    finally:
        owner.end()


def spawn(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def read_line(process: "subprocess.Popen[str]") -> str:
    """The next line that a process prints; fails with its errors if it ends instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, errors = process.communicate(timeout=20)
        raise AssertionError(f"it ended with status {process.returncode}: {errors}")
    return line


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    due_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < due_s, "it did not come true"
        time.sleep(0.01)
