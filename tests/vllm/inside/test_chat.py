"""The chat examples: the server script and the client, as two processes, the way that a user runs them."""

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from server_support import (
    TEMPLATE,
    environment,
    free_port,
    make_command,
    make_worded_model,
    members_of,
    wait_for,
    wait_for_end,
)
from shared_memory import left_of, mapped_by

from kvortex.vllm.versions import IS_NEWER

EXAMPLES = Path(__file__).parents[3] / "examples"
BLOCK_SIZE = 32

pytestmark = pytest.mark.skipif(
    not IS_NEWER, reason="the older version's operators have stand-ins in one process only, a server has more"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running server; at its end Ctrl-C must end all its processes."""
    model, command = make_worded_model(tmp_path_factory.mktemp("model")), make_command(tmp_path_factory.mktemp("bin"))
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK_SIZE), "--enforce-eager"]
    # Without the device's own prefix cache every hit is KVortex's.
    options += ["--no-enable-prefix-caching", "--chat-template", TEMPLATE]
    # At a temperature the word that stops an answer comes sooner or later: too soon for who wants to cut it short.
    options += ["--override-generation-config", '{"temperature": 0.0}']
    with log.open("w") as output:
        process = subprocess.Popen(
            [EXAMPLES / "vllm_chat_server.sh", model, *options],
            env=environment(KVORTEX_POOL="64MiB", KVORTEX_PORT=str(port), PATH=f"{command}:{os.environ['PATH']}"),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal of its own: Ctrl-C reaches all of its processes
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
        names = {name for member in members_of(process.pid) for name in mapped_by(member)}
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
        wait_for_end(process.pid)
        assert not left_of(names)
    finally:
        if members_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def talk(server: str, said: str) -> "subprocess.CompletedProcess[str]":
    client = [sys.executable, str(EXAMPLES / "vllm_chat_client.py"), "--server", server, "--max-tokens", "40"]
    system = " ".join(f"w{i}" for i in range(100, 200))
    return subprocess.run(
        [*client, "--system", system], input=said, env=environment(), capture_output=True, text=True, timeout=120
    )


def test_a_conversation(server: str) -> None:
    done = talk(server, "w10 w11 w12\n\nw20 w21\nw30\n")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(
        r"\[turn (\d): first token after [\d,]+ ms; ([\d,]+) of ([\d,]+) prompt tokens cached; (\d+) blocks",
        done.stdout,
    )
    turns = [tuple(int(figure.replace(",", "")) for figure in line) for line in lines]
    assert [turn for turn, *_ in turns] == [1, 2, 3]
    assert turns[0][1] == turns[0][3] == 0
    for (_, _, before, _), (_, cached, prompt, blocks) in itertools.pairwise(turns):
        assert cached == blocks * BLOCK_SIZE
        assert before - BLOCK_SIZE < cached < prompt
    assert done.stdout.count("you> ") == 5  # an empty line is asked again
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there() -> None:
    done = talk("http://127.0.0.1:9", "w10\n")
    assert done.returncode == 1
    assert "http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def client(server: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A client that waits for its first line."""
    command = [sys.executable, str(EXAMPLES / "vllm_chat_client.py"), "--server", server, "--max-tokens", "900"]
    client = subprocess.Popen(
        command,
        env=environment(PYTHONUNBUFFERED="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    read_until(client, b"you>")
    yield client
    client.kill()
    client.communicate()


def read_until(client: "subprocess.Popen[bytes]", wanted: bytes) -> bytes:
    assert client.stdout is not None
    shown = b""
    while wanted not in shown:
        piece = client.stdout.read1()
        assert piece, f"the client ended before it said {wanted!r}: {shown!r}"
        shown += piece
    return shown


def test_control_c_ends_the_client(client: "subprocess.Popen[bytes]") -> None:
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=30)
    assert (client.returncode, errors) == (0, b"")


def test_control_c_cuts_an_answer_short(client: "subprocess.Popen[bytes]") -> None:
    assert client.stdin is not None
    client.stdin.write(b"w10 w11\n")
    client.stdin.flush()
    read_until(client, b" w")
    client.send_signal(signal.SIGINT)
    assert b" ...\n[turn 1: " in read_until(client, b"you>")
    rest, errors = client.communicate(b"w12\n", timeout=60)
    assert b"[turn 2: " in rest
    assert (client.returncode, errors) == (0, b"")


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run([EXAMPLES / "vllm_chat_server.sh"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "vllm_chat_server.sh MODEL" in done.stderr
