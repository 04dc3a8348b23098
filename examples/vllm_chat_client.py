"""Chat with a vLLM server that runs KVortex, and see turn by turn what the cache is worth.

    examples/vllm_chat_server.sh MODEL           # in one terminal
    python examples/vllm_chat_client.py          # in another

Every turn sends the whole conversation. After each answer a line says how soon its first token came, how many of
the prompt's tokens were cached, and how many blocks KVortex brought back from host memory: those that the GPU's own
cache had lost since the last turn. Ctrl-C cuts an answer short; Ctrl-D, or Ctrl-C at the prompt, ends the chat.
Needs `pip install openai`, which vLLM's environment has.
"""

import argparse
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from openai import APIError, OpenAI

METRIC = "vllm:kvortex_loaded_blocks_total"


@dataclass
class Answer:
    """What came back, and after how many seconds its first token did; `None` where the server does not say."""

    text: str = ""
    first_token_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    cut_short: bool = False


def loaded_blocks(server: str) -> int | None:
    """Blocks that KVortex has loaded since the server started; None if its metrics cannot be read."""
    try:
        with urllib.request.urlopen(f"{server}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
    except urllib.error.URLError:
        return None
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(METRIC))


def ask(client: OpenAI, model: str, messages: list[dict[str, str]], max_tokens: int) -> Answer:
    """Send the conversation and print the answer as it comes."""
    answer, began_s = Answer(), time.perf_counter()
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, stream=True, stream_options={"include_usage": True}
    )
    try:
        for chunk in stream:
            if chunk.usage is not None:
                details = chunk.usage.prompt_tokens_details
                answer.prompt_tokens = chunk.usage.prompt_tokens
                answer.cached_tokens = details.cached_tokens if details is not None else None
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                answer.first_token_s = answer.first_token_s or time.perf_counter() - began_s
                answer.text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.cut_short = True
    finally:
        stream.close()
    print(" ..." if answer.cut_short else "")
    return answer


def describe(turn: int, answer: Answer, blocks: int | None) -> str:
    """The line under an answer."""
    parts = []
    if answer.first_token_s is not None:
        parts.append(f"first token after {answer.first_token_s * 1e3:,.0f} ms")
    if answer.prompt_tokens is not None:
        parts.append(f"{answer.cached_tokens or 0:,} of {answer.prompt_tokens:,} prompt tokens cached")
    if blocks is not None:
        parts.append(f"{blocks:,} blocks from KVortex")
    return f"[turn {turn}: {'; '.join(parts) or 'no figures'}]"


def chat(server: str, system: str, max_tokens: int) -> None:
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    print(f"{model} at {server}")
    messages = [{"role": "system", "content": system}] if system else []
    turn = 0
    while True:
        said = input("you> ").strip()
        if not said:
            continue
        turn += 1
        messages.append({"role": "user", "content": said})
        before = loaded_blocks(server)
        answer = ask(client, model, messages, max_tokens)
        after = loaded_blocks(server)
        blocks = after - before if before is not None and after is not None else None
        print(describe(turn, answer, blocks), flush=True)
        messages.append({"role": "assistant", "content": answer.text})


def main() -> int:
    parser = argparse.ArgumentParser(description="Chat with a vLLM server that runs KVortex.")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="where it listens (default: %(default)s)")
    parser.add_argument("--system", default="You are a helpful assistant.", help="the system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        chat(arguments.server.rstrip("/"), arguments.system, arguments.max_tokens)
    except (EOFError, KeyboardInterrupt):
        print()
    except APIError as error:
        print(f"{arguments.server}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
