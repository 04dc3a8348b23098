"""Admission control: which requests may load blocks now, so that no request waits for ever.

A request whose load has ended holds its device blocks while it waits for its turn in vLLM's queue. vLLM stops at the
first request that does not fit, and does not look at the requests behind it. If one of these holds blocks, it never
frees them, and the scheduler is stuck. Two rules prevent that in every version of vLLM:

1. If waiting requests hold blocks, a request that does not fit beside them is passed over until they have run.
2. A load is admitted only if every waiting request with blocks, and every request passed over earlier, fits beside it.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from kvortex.vllm.scheduler.blocks import BlockRules
from kvortex.vllm.scheduler.requests import TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request

# A preempted request keeps its status while it loads again. Without device blocks it is not counted.
WAITING_WITH_BLOCKS = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.PREEMPTED)


class Admission:
    """The two rules, for the device blocks of one engine.

    Args:
        num_blocks: device blocks that can be allocated.
        rules: say how many device blocks requests need and hold.
        num_lookahead_tokens: slots that a request needs in every step beyond its tokens, for drafts.
    """

    def __init__(self, num_blocks: int, rules: BlockRules, num_lookahead_tokens: int) -> None:
        self._num_blocks = num_blocks
        self.rules = rules
        self._num_lookahead_tokens = num_lookahead_tokens
        self._num_needed = lru_cache(maxsize=4096)(rules.num_needed)
        self._passed_over: dict[str, int] = {}  # request -> blocks that it needs, in order

    def needs(self, request: "Request") -> int:
        """Device blocks that a request needs to compute its known tokens and one more."""
        return self._num_needed(int(request.num_tokens) + self._num_lookahead_tokens)

    def must_let_pass(self, request: "Request", tracked: Iterable[TrackedRequest]) -> bool:
        """Rule 1: True if other requests wait with blocks and this one does not fit beside them.

        Args:
            request: the one that vLLM wants to schedule.
            tracked: all requests that are known, itself among them.
        """
        others = [t for t in tracked if t.request is not request]
        waiting = self._waiting(others)
        if not waiting:
            return False
        running = [t for t in others if t.request.status == RequestStatus.RUNNING]
        held = sum(map(self._to_go_on, waiting)) + self.rules.num_held_beside(waiting, running)
        return held + self.needs(request) > self._num_blocks

    def may_load(self, request: "Request", tracked: Iterable[TrackedRequest]) -> bool:
        """Rule 2: True if all requests that wait with blocks, or were passed over before, fit beside this one.

        Args:
            request: the one that could load.
            tracked: all requests that are known, itself among them.
        """
        taken = sum(map(self._to_go_on, self._waiting(t for t in tracked if t.request is not request)))
        for name, needed in self._passed_over.items():
            if name == request.request_id:
                break
            taken += needed
        return not taken or taken + self.needs(request) <= self._num_blocks

    def pass_over(self, request: "Request") -> None:
        """Note that a request was asked to wait: requests behind it may not take the blocks that it needs."""
        self._passed_over[request.request_id] = self.needs(request)

    def settle(self, request_id: str) -> None:
        """Forget that a request was passed over: it has got its answer, or has ended."""
        self._passed_over.pop(request_id, None)

    def _waiting(self, tracked: Iterable[TrackedRequest]) -> list[TrackedRequest]:
        return [t for t in tracked if t.request.status in WAITING_WITH_BLOCKS and self.rules.num_held(t)]

    def _to_go_on(self, tracked: TrackedRequest) -> int:
        return max(self.needs(tracked.request), self.rules.num_held(tracked))
