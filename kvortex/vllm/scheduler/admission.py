"""Who may have blocks of the device loaded, so that nobody is left waiting for ever.

A request whose load has ended holds its blocks and waits for vLLM to come to it in its queue. vLLM stops at the first
request that finds no room, and what waits behind it is not reached: its blocks are never given back, and nothing moves
any more. Two rules keep the queue moving, whatever the version does by itself:

- Whoever does not fit beside those who wait with blocks is passed over until they have run.
- A load is planned only if all who wait with blocks, and all who were passed over before, can go on beside it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from kvortex.vllm.scheduler.jobs import TrackedRequest

if TYPE_CHECKING:
    from vllm.v1.request import Request

# A request that was preempted and is loaded for again is called so still; one without blocks waits for nothing here.
WAITING_WITH_BLOCKS = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.PREEMPTED)


class Admission:
    """The two rules over one device's blocks.

    Args:
        num_blocks: that can be allocated.
        block_size: in tokens.
        num_lookahead_tokens: slots that a request needs beyond its tokens in every step, for drafts.
    """

    def __init__(self, num_blocks: int, block_size: int, num_lookahead_tokens: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._num_lookahead_tokens = num_lookahead_tokens
        self._passed_over: dict[str, int] = {}  # request -> blocks that it needs; the first first

    def needs(self, request: "Request") -> int:
        """Blocks that a request must have to compute its known tokens and one more."""
        return (int(request.num_tokens) + self._num_lookahead_tokens) // self._block_size + 1

    def must_let_pass(self, request: "Request", tracked: Iterable[TrackedRequest]) -> bool:
        """Others wait with blocks, and this one does not fit beside them: they go first."""
        others = [t for t in tracked if t.block_ids and t.request is not request]
        waiting = [t for t in others if t.request.status in WAITING_WITH_BLOCKS]
        if not waiting:
            return False
        held = sum(self._to_go_on(t) for t in waiting)
        held += sum(len(t.block_ids) for t in others if t.request.status == RequestStatus.RUNNING)
        return held + self.needs(request) > self._num_blocks

    def may_load(self, request: "Request", tracked: Iterable[TrackedRequest]) -> bool:
        """Everybody who waits with blocks can go on when this one does so too."""
        waiting = [t for t in tracked if t.request is not request and t.block_ids]
        taken = sum(self._to_go_on(t) for t in waiting if t.request.status in WAITING_WITH_BLOCKS)
        for name, needed in self._passed_over.items():
            if name == request.request_id:
                break
            taken += needed
        return not taken or taken + self.needs(request) <= self._num_blocks

    def pass_over(self, request: "Request") -> None:
        """It was asked to wait: nobody who comes later may take the room that it needs."""
        self._passed_over[request.request_id] = self.needs(request)

    def settle(self, request_id: str) -> None:
        """It has been answered, or has gone."""
        self._passed_over.pop(request_id, None)

    def _to_go_on(self, tracked: TrackedRequest) -> int:
        return max(self.needs(tracked.request), len(tracked.block_ids))
