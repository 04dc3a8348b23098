"""One disk directory, servers that differ: each says what it would say without a connector, and equal KV is shared.

Every row is a server that comes after the first over the same directory. What changes the bytes of KV must have keys of
its own; what does not must hit.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import BLOCK_SIZE, Engine, prompt, running, settle_disk
from forked import Program
from lora_support import make_adapter, request_of
from owner_support import serving
from tiny_model import make_tiny_model, quantization, quantize

from kvortex.vllm.versions import IS_NEWER

TOKENS = prompt(4 * BLOCK_SIZE + 5, 1)
BLOCKS = len(TOKENS) // BLOCK_SIZE
HEAD_DIM_PAIRS = 32


@dataclass(frozen=True)
class Server:
    """How a server is started, and what it is asked with."""

    model: str = "models/name"
    adapter: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, home: Path, disk: Path | None) -> tuple[list[int], int]:
        """Its answer, and the blocks that it loaded; `disk` None for no connector."""
        model = str(home / self.model)
        lora = {"enable_lora": True, "max_lora_rank": 8} if self.adapter else {}
        adapter = request_of(home / self.adapter) if self.adapter else None
        if disk is None:
            with running(model, connector=False, **lora, **self.settings) as engine:
                return ask(engine, adapter), 0
        options = {name: value for name, value in self.options.items() if name != "pool"}
        pool = self.options.get("pool", "64MiB")
        with (
            serving(home / "kv.sock", pool=pool, disk={"path": str(disk), "capacity_bytes": "1GiB"}) as owner,
            running(model, options={"owner": str(owner.path), **options}, **lora, **self.settings) as engine,
        ):
            answer = ask(engine, adapter)
            settle_disk(engine)
            return answer, engine.loaded_blocks


def ask(engine: Engine, adapter: Any = None) -> list[int]:
    return engine.generate([TOKENS], adapter=adapter)[0]


def rope(**parameters: Any) -> dict[str, Any]:
    """Position encoding that is set from outside, as each version of transformers reads it."""
    values = {"rope_type": "default", "rope_theta": 1_000_000.0, **parameters}
    scaling = {} if values["rope_type"] == "default" else {"rope_scaling": values}
    return {"hf_overrides": {"rope_parameters": values, "rope_theta": values["rope_theta"], **scaling}}


def longrope(max_model_len: int) -> dict[str, Any]:
    short, long = [1.0] * HEAD_DIM_PAIRS, [4.0] * HEAD_DIM_PAIRS
    overrides = rope(rope_type="longrope", short_factor=short, long_factor=long, original_max_position_embeddings=256)
    overrides["hf_overrides"] |= {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    return overrides | {"max_model_len": max_model_len}


DIFFERENT = {
    "dtype": Server(settings={"dtype": "bfloat16"}),
    "base of the position encoding": Server(settings=rope(rope_theta=500.0)),
    "scaled position encoding": Server(settings=rope(rope_type="linear", factor=4.0)),
    "long position encoding, below its reach": Server(settings=longrope(200)),
    "long position encoding, beyond its reach": Server(settings=longrope(512)),
    "epsilon of the norms": Server(settings={"hf_overrides": {"rms_norm_eps": 0.3}}),
    "quantisation that the config names": Server(settings={"hf_overrides": {"quantization_config": quantization()}}),
    "weights, in a folder of the same name": Server("others/name"),
    "weights, copied into the same folder later": Server("replaced/name"),
    "block size": Server(settings={"block_size": 64}),
    "adapter of the same name": Server(adapter="adapters/2/name"),
    "adapter whose files were replaced": Server(adapter="adapters/replaced/name"),
    "revision that the user names": Server(options={"identity": {"weights_revision": "2"}}),
    "packed in the pool": Server(options={"codec": "fp8"}),
}
SAME = {
    "again": Server(),
    "longer prompts": Server(settings={"max_model_len": 1024}),
    "smaller steps": Server(settings={"max_num_batched_tokens": 64, "enable_chunked_prefill": True}),
    "vLLM's own prefix cache": Server(settings={"enable_prefix_caching": True}),
    "moved folder": Server("moved/name"),
    "folder behind a link": Server("link/name"),
    "a server of adapters asked for none": Server(settings={"enable_lora": True, "max_lora_rank": 8}),
    "pool size": Server(options={"pool": {"bytes": "32MiB"}}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters, and `disk`, where the first server has stored its blocks."""
    home = tmp_path_factory.mktemp("mismatch")
    first = make_tiny_model(home / "models" / "name", "qwen3")
    make_tiny_model(home / "others" / "name", "qwen3", seed=5)
    shutil.copytree(first, home / "moved" / "name")
    (home / "link").mkdir()
    (home / "link" / "name").symlink_to(first)
    shutil.copytree(first, home / "replaced" / "name")
    for number in (1, 2):
        make_adapter(home / "adapters" / str(number) / "name", first, seed=number)
    shutil.copytree(home / "adapters" / "1" / "name", home / "adapters" / "replaced" / "name")
    return home


@pytest.fixture(scope="module")
def disk(home: Path) -> Path:
    first = (Server(adapter=f"adapters/{name}/name") for name in ("1", "replaced"))
    for server in (Server(), Server("replaced/name"), *first):
        server.run(home, home / "disk")
    shutil.copy(home / "others" / "name" / "model.safetensors", home / "replaced" / "name" / "model.safetensors")
    weights = "adapter_model.safetensors"
    shutil.copy(home / "adapters" / "2" / "name" / weights, home / "adapters" / "replaced" / "name" / weights)
    return home / "disk"


@pytest.fixture(scope="module")
def without(home: Path) -> Callable[[Server], list[int]]:
    """What a server says without a connector."""
    known: dict[str, list[int]] = {}

    def answer(server: Server) -> list[int]:
        name = json.dumps([server.model, server.adapter, server.settings])
        if name not in known:
            known[name], _ = server.run(home, None)
        return known[name]

    return answer


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_bytes_have_other_keys(home: Path, disk: Path, without: Callable[[Server], list[int]], name: str) -> None:
    answer, loaded = DIFFERENT[name].run(home, disk)
    assert loaded == 0
    assert answer == without(DIFFERENT[name])


@pytest.mark.skipif(not IS_NEWER, reason="the older version applies an adapter to all layers that it names")
def test_an_adapter_that_is_applied_to_other_layers_has_keys_of_its_own(
    home: Path, disk: Path, without: Callable[[Server], list[int]]
) -> None:
    server = Server(adapter="adapters/1/name", settings={"lora_target_modules": ["o_proj"]})
    assert server.run(home, disk) == (without(server), 0)


def test_an_adapter_finds_its_own(home: Path, disk: Path, without: Callable[[Server], list[int]]) -> None:
    server = Server(adapter="adapters/1/name")
    answer, loaded = server.run(home, disk)
    assert loaded == BLOCKS
    assert answer == without(server) != without(Server())


@pytest.mark.parametrize("name", SAME)
def test_equal_bytes_are_shared(home: Path, disk: Path, without: Callable[[Server], list[int]], name: str) -> None:
    answer, loaded = SAME[name].run(home, disk)
    assert loaded == BLOCKS
    assert answer == without(Server())


@pytest.mark.skipif(not IS_NEWER, reason="the older version has no FP8 cache on CPUs")
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache needs AVX-512 on CPUs")
@pytest.mark.parametrize("kind", ["fp8", "fp8_e5m2"])
def test_two_kinds_of_fp8_have_keys_of_their_own(
    home: Path, disk: Path, without: Callable[[Server], list[int]], kind: str
) -> None:
    server = Server(settings={"kv_cache_dtype": kind})
    assert server.run(home, disk) == (without(server), 0)
    assert server.run(home, disk) == (without(server), BLOCKS)


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have no stand-ins for 8-bit weights")
def test_quantised_weights_have_keys_of_their_own(
    home: Path, disk: Path, without: Callable[[Server], list[int]]
) -> None:
    shutil.copytree(home / "models" / "name", home / "quantised" / "name")
    quantize(home / "quantised" / "name")
    for model in ("models/name", "quantised/name"):
        server = Server(model, settings={"dtype": "bfloat16"})
        for loaded in (0, BLOCKS):
            assert server.run(home, home / "disk for quantised weights") == (without(server), loaded)


IN_A_PROCESS = """
import json, sys
from pathlib import Path
from test_mismatch import Server
answer, loaded = Server().run(Path(sys.argv[1]), Path(sys.argv[2]))
print("RESULT " + json.dumps([answer, loaded]))
"""
TWO_RANKS = """
import json, sys
import vllm
from test_mismatch import TOKENS
from vllm.config import KVTransferConfig

def main():
    connector = KVTransferConfig(
        kv_connector="KVortexConnector", kv_connector_module_path="kvortex.vllm", kv_role="kv_both",
        kv_connector_extra_config={"pool": "64MiB", "disk": {"path": sys.argv[2], "capacity_bytes": "1GiB"}},
    )
    llm = vllm.LLM(
        model=sys.argv[1] + "/models/name", skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_model_len=512, block_size=32, tensor_parallel_size=2, kv_transfer_config=connector,
        enable_prefix_caching=False, disable_log_stats=False,
    )
    def ask(tokens, count):
        parameters = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
        return list(out.outputs[0].token_ids), out.num_cached_tokens or 0
    answer, cached = ask(TOKENS, 8)
    for _ in range(20):
        ask([5, 6, 7], 2)  # brings the last outcomes in
    print("RESULT " + json.dumps([answer, cached // 32]))

if __name__ == "__main__":
    main()
"""


def result_of(said: str) -> Any:
    (line,) = [line for line in said.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_another_seed_of_the_hashes(home: Path, disk: Path, without: Callable[[Server], list[int]]) -> None:
    """A Python of its own, which reads the seed when it starts."""
    command = [sys.executable, "-c", IN_A_PROCESS, str(home), str(disk)]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    answer, loaded = result_of(done.stdout)
    assert loaded == 0
    assert answer == without(Server())


@pytest.mark.skipif(not IS_NEWER, reason="the older version's operators have stand-ins in one process only")
def test_another_number_of_ranks(home: Path, disk: Path, without: Callable[[Server], list[int]]) -> None:
    (home / "two_ranks.py").write_text(TWO_RANKS)
    ranks = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    output = home / "output.txt"
    status = Program(home / "two_ranks.py", [str(home), str(disk)], ranks, output=output).wait(300.0)
    assert status == 0, output.read_text()[-9000:]
    assert result_of(output.read_text()) == [without(Server()), 0]
