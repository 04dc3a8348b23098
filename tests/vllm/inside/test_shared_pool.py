"""Two ranks of a latent-attention model in two processes over one pool, their scheduler played by hand."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from shared_memory import mapped_by
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MLAAttentionSpec

from kvortex.errors import DeviceError
from kvortex.hashing import hash_blocks
from kvortex.index import pack_keys
from kvortex.planes.control import ControlPlane
from kvortex.planes.plans import LoadPlan, SavePlan
from kvortex.types import BlockSizes
from kvortex.vllm.options import ConnectorOptions
from kvortex.vllm.plans import ConnectorPlan, JobOutcome, LoadJob, SaveJob
from kvortex.vllm.worker.ranks import Peers

BLOCK_SIZE, NUM_BLOCKS, WIDTH = 16, 32, 64
BLOCK_NBYTES = BLOCK_SIZE * WIDTH * 4
OPTIONS = {"pool": {"bytes": 16 * BLOCK_NBYTES, "pin_piece_bytes": 8 * BLOCK_NBYTES}}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kvortex.vllm.worker.half", "vllm.v1.kv_cache_interface"])  # once for all ranks
HASHES = hash_blocks(range(100 * BLOCK_SIZE), block_size=BLOCK_SIZE)


class PipeGroup:
    """The other rank is reached through the parent."""

    def __init__(self, connection: Connection, rank: int, blind: bool) -> None:
        self.rank, self.size = rank, 2
        self._connection, self._blind = connection, blind

    def exchange(self, value: Any) -> list[Any]:
        self._connection.send(value)
        values = self._connection.recv()
        if self._blind and hasattr(values[0], "process_id"):  # as a rank on another machine would see it
            values[0] = type(values[0])(1 << 30, values[0].descriptor, values[0].label, values[0].nbytes)
        return values


def work(connection: Connection, rank: int, blind: bool) -> None:
    """A rank: registers its cache, then does what it is told until the pipe closes."""
    from kvortex.vllm.worker.half import WorkerHalf

    spec = MLAAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=WIDTH, dtype=torch.float32)
    config = SimpleNamespace(num_blocks=NUM_BLOCKS, kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, WIDTH)
    model = SimpleNamespace(model="latent", revision=None)
    parallel = SimpleNamespace(rank=rank, tensor_parallel_size=2, pipeline_parallel_size=1)
    vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel)
    half = WorkerHalf(
        vllm_config, config, ConnectorOptions.from_extra_config(OPTIONS), Peers(PipeGroup(connection, rank, blind))
    )
    half.register_kv_caches({"layer": cache})
    assert half._data is not None
    kernels = half._data._executor._kernels[0]
    gather = kernels.gather

    def refuse(*_: object) -> None:
        raise DeviceError("injected")

    def step(plan: ConnectorPlan) -> list[JobOutcome]:
        wanted = len(plan.saves) + len(plan.loads)
        half.begin_step(plan)
        half.start_loads()
        half.start_saves()
        outcomes: list[JobOutcome] = []
        while len(outcomes) < wanted:
            half.take_finished()
            message = half.take_reports()
            outcomes += message.reports if message is not None else []
        return outcomes

    commands: dict[str, Callable[..., Any]] = {
        "step": step,
        "fill": lambda block, value: cache[block].fill_(value) is None,
        "read": lambda block: (float(cache[block].min()), float(cache[block].max())),
        "break": lambda broken: setattr(kernels, "gather", refuse if broken else gather),
        "share": lambda: (half._share.size, int((half._share.digests != 0).sum())),
        "damage": lambda offset: half._data.pool.bytes.__setitem__(offset, half._data.pool.bytes[offset] ^ 1),
        "forget": lambda: half._share.forget(),
        "names": mapped_by,
    }
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            break
        connection.send(commands[name](*arguments))
    half.shutdown()


class Server:
    """Both ranks and a control plane over their pool."""

    def __init__(self, blind: bool = False) -> None:
        pipes = [SERVER.Pipe() for _ in range(2)]
        self.pipes = [here for here, _ in pipes]
        self.ranks = [SERVER.Process(target=work, args=(pipe[1], rank, blind)) for rank, pipe in enumerate(pipes)]
        for rank, (_, there) in zip(self.ranks, pipes, strict=True):
            rank.start()
            there.close()
        for _ in range(2):
            values = [self.receive(pipe) for pipe in self.pipes]
            for pipe in self.pipes:
                pipe.send(values)
        engine = ConnectorOptions.from_extra_config(OPTIONS).engine
        self.control = ControlPlane.from_config(engine, engine.pool.bytes, [BlockSizes(BLOCK_NBYTES, BLOCK_NBYTES)])

    @staticmethod
    def receive(pipe: Connection) -> Any:
        assert pipe.poll(120), "a rank does not answer"
        return pipe.recv()

    def tell(self, rank: int, name: str, *arguments: Any) -> Any:
        self.pipes[rank].send((name, arguments))
        return self.receive(self.pipes[rank])

    def both(self, name: str, *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return [self.receive(pipe) for pipe in self.pipes]

    def run(self, plan: SavePlan | LoadPlan) -> tuple[list[JobOutcome], list[Any]]:
        """What each rank said of a plan, and what became of its blocks."""
        if isinstance(plan, SavePlan):
            step = ConnectorPlan(saves=[SaveJob(1, plan.transfer)])
        else:
            step = ConnectorPlan(loads=[LoadJob(1, "r", plan.transfer)])
        said = [outcome for (outcome,) in self.both("step", step)]
        succeeded, intact = (np.ones(plan.transfer.num_blocks, dtype=np.bool_) for _ in range(2))
        for outcome in said:
            succeeded[list(outcome.failed)] = False
            intact[list(outcome.corrupt)] = False
        if isinstance(plan, SavePlan):
            return said, self.control.finish_save(plan, np.zeros(len(succeeded), dtype=np.uint64), succeeded)
        return said, self.control.finish_load(plan, intact, succeeded)

    def save(self, which: range, block_ids: Sequence[int]) -> tuple[list[JobOutcome], list[Any]]:
        keys = pack_keys([HASHES[i] for i in which])
        return self.run(self.control.plan_save(keys, np.array(block_ids, dtype=np.int32), "save"))

    def load(self, which: range, block_ids: Sequence[int]) -> tuple[list[JobOutcome], list[Any]]:
        keys = pack_keys([HASHES[i] for i in which])
        return self.run(self.control.plan_load(keys, np.array(block_ids, dtype=np.int32)))

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for rank in self.ranks:
            rank.join(30)
            rank.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.end()
    assert [rank.exitcode for rank in server.ranks] == [0, 0]


def test_each_rank_saves_its_share_and_loads_all(server: Server) -> None:
    for block in range(6):
        # The second rank's copy differs, to tell whose bytes were saved.
        server.tell(0, "fill", block, 10.0 + block)
        server.tell(1, "fill", block, 20.0 + block)
    _, outcomes = server.save(range(6), range(6))
    assert {outcome.value for outcome in outcomes} == {"stored"}
    assert server.both("share") == [(2, 6), (2, 6)]
    said, outcomes = server.load(range(6), range(10, 16))
    assert [(outcome.failed, outcome.corrupt) for outcome in said] == [((), ()), ((), ())]
    assert outcomes == [None] * 6
    for rank in range(2):
        read = [server.tell(rank, "read", 10 + i) for i in range(6)]
        assert read == [(value, value) for value in (10.0, 21.0, 12.0, 23.0, 14.0, 25.0)]


def test_one_block_is_saved_by_one_rank(server: Server) -> None:
    server.both("break", True)
    said, _ = server.save(range(20, 21), [0])
    server.both("break", False)
    assert sorted(outcome.failed for outcome in said) == [(), (0,)]


def test_a_rank_that_fails_makes_its_blocks_misses_for_all(server: Server) -> None:
    server.tell(1, "break", True)
    said, outcomes = server.save(range(30, 34), range(4))
    server.tell(1, "break", False)
    assert said[0].failed == ()
    assert len(said[1].failed) == 2
    assert [outcome.value for outcome in outcomes].count("failed") == 2
    lost = [HASHES[30 + i] for i in said[1].failed]
    assert not server.control.index.contains_mask(lost).any()
    assert server.control.allocator.allocated_bytes == server.control.index.committed_bytes


def test_damage_is_seen_by_the_rank_that_did_not_save(server: Server) -> None:
    server.save(range(40, 42), [0, 1])
    plan = server.control.plan_load(pack_keys(HASHES[40:42]), np.array([20, 21], dtype=np.int32))
    server.tell(0, "damage", int(plan.transfer.offsets[1]) + 77)
    said, outcomes = server.run(plan)
    assert [outcome.corrupt for outcome in said] == [(1,), (1,)]
    assert outcomes[0] is None
    assert outcomes[1].value == "corrupt"


def test_what_is_forgotten_fails_its_check_on_every_rank(server: Server) -> None:
    server.save(range(50, 52), [0, 1])
    server.both("forget")
    said, _ = server.load(range(50, 52), [22, 23])
    assert [outcome.corrupt for outcome in said] == [(0, 1), (0, 1)]


def test_nothing_is_left_when_a_rank_is_killed() -> None:
    server = Server()
    assert [server.tell(rank, "names") for rank in range(2)] == [set(), set()]  # nothing with a name that could stay
    pid = server.ranks[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    server.ranks[0].join(30)
    assert server.tell(1, "share") == (2, 0)  # the other one goes on
    server.end()


def test_ranks_that_cannot_share_store_a_copy_each() -> None:
    server = Server(blind=True)
    for block in range(4):
        server.tell(0, "fill", block, 10.0)
        server.tell(1, "fill", block, 20.0)
    server.save(range(4), range(4))
    assert server.both("share") == [(1, 4), (1, 4)]
    server.load(range(4), range(10, 14))
    assert [server.tell(rank, "read", 10) for rank in range(2)] == [(10.0, 10.0), (20.0, 20.0)]
    server.end()
