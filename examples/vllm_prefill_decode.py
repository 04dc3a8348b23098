"""Two vLLM servers, one for prompts and one for answers, with a store between them and a router in front of them.

    valkey-server --port 6379                                                # or redis-server, or any other tier
    python examples/vllm_prefill_decode.py MODEL redis://127.0.0.1:6379

Then talk to http://127.0.0.1:8000 as to any vLLM server: `python examples/vllm_chat_client.py`. Options behind the two
arguments go to both servers (`vllm serve`). Ctrl-C ends everything.

The router asks the first server for one token, passes the `kv_transfer_params` of its answer on to the second one,
and the second one's answer back. These parameters say how much of the prompt the first server is storing: the second
one waits for it, loads it, and computes the rest. Both save what they compute, so the next turn of a conversation
begins with the answer, too. Any other router that speaks vLLM's protocol for disaggregated prefill does the same.

With --nixl vLLM's NixlConnector carries prompts from the first server to the second one straight away, and KVortex
beside it keeps them for later turns (needs `pip install nixl`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

HOST = "127.0.0.1"
NIXL_PORT = 5600
END_S = 60.0
"""Seconds that a server may take to end."""
OF_ANSWERS = ("stream_options", "min_tokens", "max_completion_tokens")
NOT_PASSED_ON = ("content-length", "transfer-encoding", "content-encoding", "connection")


def transfer_config(tier: str, pool: str, nixl: bool) -> dict[str, Any]:
    """What `--kv-transfer-config` says."""
    ours = {
        "kv_connector": "KVortexConnector",
        "kv_connector_module_path": "kvortex.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"pool": pool, "tier": tier},
    }
    if not nixl:
        return ours
    carrier = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    several = {"connectors": [carrier, ours]}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": several}


async def start(number: int, options: argparse.Namespace, further: list[str]) -> asyncio.subprocess.Process:
    """One of the two servers, with the processes that it starts in a group of their own."""
    config = transfer_config(options.tier, options.pool, options.nixl)
    command = ["vllm", "serve", options.model, "--host", HOST, "--port", str(options.port + number)]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(config), *further]
    # Block hashes have to be the same in both; NIXL's servers greet each other at a port each.
    environment = {"PYTHONHASHSEED": "0", **os.environ, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(NIXL_PORT + number)}
    return await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)


class Router:
    """Has one server compute prompts, and the other one answer.

    Args:
        client: makes the requests.
        prefill, decode: addresses of the two servers.
    """

    def __init__(self, client: aiohttp.ClientSession, prefill: str, decode: str) -> None:
        self._client = client
        self._prefill = prefill
        self._decode = decode

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """A completion: the prompt at one server, the answer at the other."""
        asked = await request.json()
        with contextlib.suppress(aiohttp.ClientError):  # then the other server computes the prompt
            if (handed_over := await self._compute(request.path, asked)) is not None:
                asked["kv_transfer_params"] = handed_over
        return await self._pass_on(request, json.dumps(asked).encode())

    async def _compute(self, path: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        prompt = {name: value for name, value in asked.items() if name not in OF_ANSWERS}
        wanted: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
        wanted |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        prompt |= {"max_tokens": 1, "stream": False, "kv_transfer_params": wanted}
        async with self._client.post(self._prefill + path, json=prompt) as answer:
            if answer.status != 200:
                return None
            found: dict[str, Any] | None = (await answer.json()).get("kv_transfer_params")
            return found

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Anything else: the server that answers knows."""
        return await self._pass_on(request, await request.read())

    async def _pass_on(self, request: web.Request, body: bytes) -> web.StreamResponse:
        headers = {"Content-Type": request.content_type}
        try:
            answer = await self._client.request(
                request.method, self._decode + request.path_qs, data=body, headers=headers
            )
        except aiohttp.ClientConnectionError as error:
            raise web.HTTPServiceUnavailable(text=f"the server that answers is not there (yet): {error}") from error
        async with answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in NOT_PASSED_ON}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response


@contextlib.asynccontextmanager
async def routing(options: argparse.Namespace) -> AsyncIterator[None]:
    """The router, as long as the block runs."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(timeout=timeout) as client:
        router = Router(client, f"http://{HOST}:{options.port + 1}", f"http://{HOST}:{options.port + 2}")
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/completions", router.answer)
        app.router.add_post("/v1/chat/completions", router.answer)
        app.router.add_route("*", "/{path:.*}", router.forward)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, options.port).start()
            yield
        finally:
            await runner.cleanup()


async def wait_until_ready(addresses: list[str]) -> None:
    """Ask until all servers say that they are well."""
    async with aiohttp.ClientSession() as client:
        for address in addresses:
            is_ready = False
            while not is_ready:
                await asyncio.sleep(0.5)
                with contextlib.suppress(aiohttp.ClientError):
                    async with client.get(f"{address}/health") as answer:
                        is_ready = answer.status == 200


async def end(server: asyncio.subprocess.Process) -> None:
    """End a server and its processes; those that do not end are killed."""
    if server.returncode is None:
        os.killpg(server.pid, signal.SIGINT)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait(), END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


async def serve(options: argparse.Namespace, further: list[str]) -> int:
    """Run all of it until a signal comes or a server ends; returns the exit status."""
    stopped = asyncio.Event()
    for ending in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(ending, stopped.set)
    servers: list[asyncio.subprocess.Process] = []
    try:
        for number in (1, 2):
            servers.append(await start(number, options, further))
        stop = asyncio.create_task(stopped.wait())
        ends = [stop, *(asyncio.create_task(server.wait()) for server in servers)]
        ready = asyncio.create_task(wait_until_ready([f"http://{HOST}:{options.port + n}" for n in (1, 2)]))
        print("waiting for the two servers ...", flush=True)
        await asyncio.wait([ready, *ends], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            print(f"ready: http://{HOST}:{options.port}", flush=True)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if stop.done():
            return 0
        print("a server has ended; its last lines say why", file=sys.stderr)
        return 1
    finally:
        await asyncio.gather(*(end(server) for server in servers))


async def run(options: argparse.Namespace, further: list[str]) -> int:
    """The router first: that its port is taken is known before the servers have loaded their models."""
    async with routing(options):
        return await serve(options, further)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("tier", help="a store that both servers reach, such as redis://127.0.0.1:6379")
    parser.add_argument("--port", type=int, default=8000, help="of the router; the servers get the next two (8000)")
    parser.add_argument("--pool", default="4GiB", help="pinned memory of each server (4GiB)")
    parser.add_argument("--nixl", action="store_true", help="carry prompts with vLLM's NixlConnector")
    options, further = parser.parse_known_args()
    try:
        return asyncio.run(run(options, further))
    except OSError as error:
        print(f"{error}; choose another --port, or install vLLM where this Python is", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
