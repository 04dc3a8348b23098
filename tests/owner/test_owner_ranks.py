"""Engines in processes of their own that get different parts of one pool, and what is refused."""

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvortex import KVortexEngine
from kvortex.errors import OwnerError
from tests.engine_support import BLOCK_NBYTES, BLOCK_SIZE, chain, make_cache
from tests.owner.client_program import config_of
from tests.owner.owner_support import local_owner, read_line, served_owner, spawn

POOL_BLOCKS = 64
QUOTA_BLOCKS = 16


class RankedEngine:
    """The program that runs an engine.

    Args:
        path: the owner's socket.
        model: its model's name.
        priority, quota: its settings.
    """

    def __init__(self, path: Path, model: str, priority: int | None = None, quota: str | None = None) -> None:
        settings = [json.dumps(value) for value in (priority, quota)]
        self.process = spawn(["-m", "tests.owner.ranked_program", str(path), model, *settings])
        assert json.loads(read_line(self.process)) == "ready"

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(read_line(self.process))

    def save(self, salt: int, count: int) -> int:
        return int(self.ask(f"save {salt} {count}"))

    def load(self, salt: int, count: int) -> int:
        return int(self.ask(f"load {salt} {count}"))

    @property
    def share(self) -> tuple[int, int, int]:
        """Priority, and quota and what is taken of it in blocks."""
        figures = self.ask("figures")
        return (
            figures["priority"],
            figures["quota_bytes"] // BLOCK_NBYTES,
            figures["quota_used_bytes"] // BLOCK_NBYTES,
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@contextlib.contextmanager
def ranked_engine(*arguments: Any) -> Iterator[RankedEngine]:
    engine = RankedEngine(*arguments)
    try:
        yield engine
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.process.communicate(timeout=20)
        engine.kill()


@pytest.mark.slow
def test_two_engines_get_different_parts_of_one_pool(tmp_path: Path) -> None:
    path = tmp_path / "kv.sock"
    quota = f"{QUOTA_BLOCKS * BLOCK_NBYTES // 1024}KiB"
    with (
        served_owner(path, f"{POOL_BLOCKS * BLOCK_NBYTES // 1024}KiB") as owner,
        ranked_engine(path, "chat", 1) as chat,
    ):
        with ranked_engine(path, "batch", -1, quota) as batch:
            assert (chat.share, batch.share) == ((1, 0, 0), (-1, QUOTA_BLOCKS, 0))
            assert chat.save(0, 30) == 30
            for salt in range(8):
                assert batch.save(salt, 6) == 6
                assert batch.load(salt, 6) == 6
                assert 6 <= batch.share[2] <= QUOTA_BLOCKS
            assert batch.save(20, 40) == QUOTA_BLOCKS, "the head of a prompt that is longer than the quota"
            assert chat.load(0, 30) == 30, "what batch needed, it took from itself"
            assert chat.save(1, 25) == 25
            assert chat.load(0, 30) == 30
            assert batch.load(20, 40) < QUOTA_BLOCKS, "what chat needed, it took from batch"
            batch.kill()
        with ranked_engine(path, "batch", 2) as again:
            assert again.share[:2] == (2, QUOTA_BLOCKS), "it says no quota, so the one that was said before holds"
            assert again.save(3, 20) == QUOTA_BLOCKS
            assert again.load(3, 20) == QUOTA_BLOCKS
        _, errors = owner.end(signal.SIGTERM)
    assert "has priority -1 and a quota of 128.0 KiB instead of priority 0 and no quota now" in errors
    assert "has priority 2 and a quota of 128.0 KiB instead of priority -1 and a quota of 128.0 KiB now" in errors
    assert "extents still held" not in errors


async def test_a_quota_that_holds_no_block_is_refused_and_another_one_taken(tmp_path: Path) -> None:
    with local_owner(tmp_path / "kv.sock") as owner:
        config = config_of(str(owner.path))
        async with KVortexEngine.create(config.replace(owner={"quota": BLOCK_NBYTES - 1})) as engine:
            with pytest.raises(
                OwnerError, match=r"a block takes 8192 bytes, and the quota has 8191: raise owner\.quota"
            ):
                engine.register_kv_caches(make_cache(), BLOCK_SIZE)
            assert owner.allocated_bytes == 0
        async with KVortexEngine.create(config.replace(owner={"quota": BLOCK_NBYTES})) as engine:
            engine.register_kv_caches(make_cache(), BLOCK_SIZE)
            assert (await engine.save_blocks(chain(3), range(3))).num_stored == 1
        owner.clear()
