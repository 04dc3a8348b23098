"""The example with two servers, a store between them and a router in front, the way that a user runs it."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from server_support import (
    TEMPLATE,
    children_of,
    environment,
    free_port,
    make_command,
    make_worded_model,
    members_of,
    wait_for,
    wait_for_end,
)

from kvortex.vllm.versions import IS_NEWER
from tests.tiers.redis_support import RedisServer

EXAMPLE = Path(__file__).parents[3] / "examples" / "vllm_prefill_decode.py"
BLOCK_SIZE = 32
MAX_TOKENS = 34
NIXL_BY_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}  # in a container it may not read another's memory
WITH_NIXL = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="needs NIXL, and four cores: pip install --no-deps nixl nixl-cu13 into this environment",
)
PROMPT = [100 + n for n in range(5 * BLOCK_SIZE + 7)]

pytestmark = pytest.mark.skipif(
    not IS_NEWER, reason="the older version's operators have stand-ins in one process only, a server has more"
)


@dataclass
class Servers:
    """The router's port, and behind it those of the two servers."""

    port: int

    def ask(self, prompt: list[int], number: int = 0, **further: Any) -> dict[str, Any]:
        """The answer to a prompt, from the router or from one of the servers."""
        asked = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, **further}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port + number}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def counted(self, number: int, name: str) -> int:
        """A counter of one of the servers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port + number}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(f"vllm:{name}_total"))

    def loaded(self, number: int) -> int:
        """Blocks that KVortex has loaded in one of the servers."""
        return self.counted(number, "kvortex_loaded_blocks")


@contextlib.contextmanager
def serving(tmp_path: Path, redis: RedisServer, *options: str) -> Iterator[Servers]:
    """The example as it runs; at its end Ctrl-C must end all processes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "bin").mkdir()
    model, command = make_worded_model(tmp_path / "model"), make_command(tmp_path / "bin")
    port, log = free_port(3), tmp_path / "log"
    of_vllm = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK_SIZE), "--enforce-eager"]
    of_vllm += ["--no-enable-prefix-caching", "--chat-template", TEMPLATE, "--return-tokens-as-token-ids"]
    arguments = [model, redis.url(), "--port", str(port), "--pool", "64MiB", *options, *of_vllm]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), *arguments],
            env=environment(PATH=f"{command}:{os.environ['PATH']}", **NIXL_BY_TCP),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    servers: list[int] = []
    try:
        for number in (1, 2, 0):
            wait_for(f"http://127.0.0.1:{port + number}/health", process, log)
        servers = children_of(process.pid)
        assert len(servers) == 2
        yield Servers(port)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()[-6000:]
        for server in servers:
            wait_for_end(server)
    finally:
        for server in servers or children_of(process.pid):
            if members_of(server):
                os.killpg(server, signal.SIGKILL)
        process.kill()
        process.wait(10)


def cached(answer: dict[str, Any]) -> int:
    """Tokens of the prompt that were not computed."""
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def tokens_of(answer: dict[str, Any]) -> list[int]:
    (choice,) = answer["choices"]
    return [int(piece.removeprefix("token_id:")) for piece in choice["logprobs"]["tokens"]]


@pytest.mark.parametrize("options", [(), pytest.param(("--nixl",), marks=WITH_NIXL)], ids=["alone", "beside NIXL"])
def test_a_conversation_over_two_servers(tmp_path: Path, options: tuple[str, ...]) -> None:
    with RedisServer() as redis, serving(tmp_path, redis, *options) as servers:
        first = servers.ask(PROMPT, logprobs=1)
        brought = servers.counted(2, "external_prefix_cache_hits")
        assert brought >= 5 * BLOCK_SIZE, "the second server computes no block of the prompt"
        assert servers.loaded(1) == 0
        assert servers.loaded(2) == (0 if options else 5), "what NIXL brings KVortex does not"
        alone = servers.ask(PROMPT, 2, logprobs=1, cache_salt="nobody else's")
        assert cached(alone) == 0
        assert tokens_of(alone) == tokens_of(first)
        second = servers.ask([*PROMPT, *tokens_of(first), *range(300, 320)], logprobs=1)
        assert cached(second) >= len(PROMPT) + MAX_TOKENS - BLOCK_SIZE, "the answer is known as well"
        assert servers.loaded(1) > 0, "the first server loads what it and the other one have computed before"


def test_a_port_that_is_taken_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, str(EXAMPLE), "no-model", "redis://127.0.0.1", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
