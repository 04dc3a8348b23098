"""Beside other connectors: each hears what is its own, and nothing of ours needs a setting or a place in a list."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import BLOCK_SIZE, count_stats, flip_a_bit, keys_of, ours, prompt, running
from inside_fixtures import PROMPTS
from sibling_connector import SiblingConnector, SiblingHandshake

from kvortex.types import MissReason
from kvortex.vllm.versions import IS_NEWER

REPOSITORY = Path(__file__).parents[3]
WHOLE = ["whole blocks", "ends inside a block", "one token over", "long"]
TOKENS = PROMPTS["long"]
BLOCKS = len(TOKENS) // BLOCK_SIZE


def sibling(role: str) -> dict[str, Any]:
    return {"kv_connector": "SiblingConnector", "kv_connector_module_path": "sibling_connector", "kv_role": role}


ORDERS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "behind a producer": lambda mine: [sibling("kv_producer"), mine],
    "before a producer": lambda mine: [mine, sibling("kv_producer")],
    "behind a consumer": lambda mine: [sibling("kv_consumer"), mine],
    "before a consumer": lambda mine: [mine, sibling("kv_consumer")],
}


@pytest.fixture(autouse=True)
def nothing_sent() -> Iterator[None]:
    yield
    SiblingConnector.sent.clear()
    SiblingConnector.loaded.clear()
    SiblingConnector.hellos.clear()


@pytest.mark.parametrize("order", ["behind a producer", "before a producer"])
def test_hits_and_answers(model: str, expected: dict[str, list[list[int]]], order: str) -> None:
    with running(model, beside=ORDERS[order]) as engine:
        counted = count_stats(engine)
        for round_number in range(3):
            for name in WHOLE:
                assert engine.generate([PROMPTS[name]]) == expected[name], (round_number, name)
                engine.settle()
        assert engine.loaded_blocks == 2 * sum(len(PROMPTS[name]) // BLOCK_SIZE for name in WHOLE)
        assert counted()["saved_blocks"] > 0
        assert not engine.scheduler_half._jobs
    # Nobody is handed another one's hello.
    assert set(SiblingConnector.hellos) <= {SiblingHandshake}


@pytest.mark.parametrize("order", ["behind a consumer", "before a consumer"])
def test_what_a_sibling_loads_is_stored(model: str, expected: dict[str, list[list[int]]], order: str) -> None:
    """A prompt that came from another server is known here from then on."""
    with running(model, beside=ORDERS["behind a producer"]) as engine:
        engine.generate([TOKENS])
    assert tuple(TOKENS) in SiblingConnector.sent
    with running(model, beside=ORDERS[order]) as engine:
        assert engine.generate([TOKENS]) == expected["long"]
        assert len(SiblingConnector.loaded) == 1
        assert engine.loaded_blocks == 0
        engine.settle()
        SiblingConnector.sent.clear()
        assert engine.generate([TOKENS]) == expected["long"]
        engine.settle()
        assert engine.loaded_blocks == BLOCKS


def test_a_crowd_beside_a_consumer(model: str, expected: dict[str, list[list[int]]]) -> None:
    """Loads of both, saves, and few blocks of the device for all of them."""
    with running(model, beside=ORDERS["behind a producer"]) as engine:
        for name in WHOLE[:2]:
            engine.generate([PROMPTS[name]])
    with running(model, beside=ORDERS["before a consumer"], num_gpu_blocks_override=24) as engine:
        for _ in range(4):
            together = engine.generate([PROMPTS[name] for name in WHOLE])
            assert together == [expected[name][0] for name in WHOLE]
        engine.settle()
        assert engine.loaded_blocks > 0


@pytest.mark.parametrize("beside", [None, ORDERS["before a consumer"]], ids=["alone", "before a consumer"])
def test_a_damaged_block_is_computed_whatever_the_policy_says(
    model: str, expected: dict[str, list[list[int]]], beside: Any
) -> None:
    with running(model, beside=beside, transfer={"kv_load_failure_policy": "fail"}) as engine:
        engine.generate([TOKENS])
        engine.settle()
        flip_a_bit(engine, keys_of(engine, TOKENS)[2])
        assert engine.generate([TOKENS]) == expected["long"]
        engine.settle()
        assert engine.misses(MissReason.CORRUPT) == 1


STATS = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
import sys
assert "kvortex.vllm.connector" not in sys.modules, "registering must not import"
stats = MultiConnector.build_kv_connector_stats({"KVortexConnector": {"data": {"loaded_blocks": 1}}})
print("RESULT", type(stats.data["KVortexConnector"]).__name__)
from vllm.config import KVTransferConfig
found = KVConnectorFactory.get_connector_class(KVTransferConfig(kv_connector="KVortexConnector", kv_role="kv_both"))
print("RESULT", found.__module__, found.__name__)
"""


def test_a_process_that_never_made_a_connector_knows_its_name(tmp_path: Path) -> None:
    """An API server reads statistics; what an installed package declares makes vLLM register us in it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    info = tmp_path / "kvortex-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvortex\nVersion: 0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", STATS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results == [
        "RESULT ConnectorStats",
        "RESULT kvortex.vllm.connector KVortexConnector",
    ], done.stdout + done.stderr


@pytest.mark.skipif(not IS_NEWER, reason="the older version's connectors say hello in no step")
def test_a_hello_of_somebody_else_is_not_read(model: str) -> None:
    with running(model) as engine:
        sizes = engine.scheduler_half._sizes
        connector = ours(engine.core.scheduler.connector)
        connector.set_xfer_handshake_metadata({0: SiblingHandshake()})
        connector.set_xfer_handshake_metadata_pp_aware({(0, 0): SiblingHandshake()})
        assert engine.scheduler_half._sizes == sizes
        engine.generate([prompt(70, 1)])
