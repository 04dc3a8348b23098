"""Prompts that one server computes and another goes on with, through a pool or a tier that both have.

A router asks a first server for one token, and passes the `kv_transfer_params` of its answer on to a second one. They
say of how many tokens the first server is storing the KV. The second one waits for these tokens as long as more of them
come, and for each at most `ConnectorOptions.handover_wait_s`; the rest is computed.
"""

import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.v1.request import Request

TOKENS: Final = "kvortex_tokens"
"""Of an answer's `kv_transfer_params`: leading tokens of the prompt whose KV is stored, or about to be."""

WANTED: Final = "do_remote_decode"
"""Of a request's: another server goes on with it. It is what routers say to connectors that move KV themselves, too."""


def is_wanted(request: "Request") -> bool:
    """True if another server is to go on with a request."""
    return bool((request.kv_transfer_params or {}).get(WANTED))


def promised_tokens(request: "Request") -> int:
    """Leading tokens of a request whose KV another server has promised; 0 if it has not, or says no such thing."""
    said = (request.kv_transfer_params or {}).get(TOKENS)
    return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else 0


def promise(num_tokens: int) -> dict[str, Any]:
    """What an answer says to the server that goes on with its prompt."""
    return {TOKENS: num_tokens}


class Waits:
    """Until when requests wait for what was promised to them.

    Args:
        wait_s: seconds that each may wait for more.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since: dict[str, tuple[int, float]] = {}  # request -> tokens that it has, and since when

    def goes_on(self, request_id: str, num_tokens: int) -> bool:
        """Begin, or continue, to wait; False when the time is over.

        Args:
            request_id: the request.
            num_tokens: tokens that it could load now; when they become more, its time begins anew.
        """
        now_s = time.monotonic()
        before, since_s = self._since.get(request_id, (-1, now_s))
        if num_tokens > before:
            before, since_s = self._since[request_id] = num_tokens, now_s
        return now_s - since_s < self._wait_s

    def end(self, request_id: str) -> None:
        """A request waits no more."""
        self._since.pop(request_id, None)
