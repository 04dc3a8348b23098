"""Stale KV: KV that was computed with weights that have changed since.

Plans have numbers. A worker reports a change of its weights with the number of the last plan that it had received. KV
that was computed or loaded in a plan up to this number is stale, in requests and in vLLM's own prefix cache.
"""

from collections.abc import Iterable

from kvortex.vllm.scheduler.requests import TrackedRequest


class StaleKV:
    """Remembers whether vLLM's own prefix cache may still serve stale KV.

    After a change of weights vLLM continues to serve the blocks of its own cache until that cache is reset. KV that is
    computed before the reset may depend on these blocks, so it counts as stale, too, and is dropped at the reset.
    """

    def __init__(self) -> None:
        self._first_plan: int | None = None  # that computed anything since vLLM's own cache was last emptied
        self._vllm_serves_stale = False

    def step_computes(self, plan_number: int) -> None:
        """A step computes KV, which may enter vLLM's own cache."""
        if self._first_plan is None:
            self._first_plan = plan_number

    def weights_changed(self, last_plan: int, tracked: Iterable[TrackedRequest]) -> None:
        """The workers report other weights since `last_plan`: mark the requests whose KV is older."""
        self._vllm_serves_stale |= self._first_plan is not None and self._first_plan <= last_plan
        self.mark(last_plan, tracked)

    def mark(self, last_plan: int, tracked: Iterable[TrackedRequest]) -> None:
        """Mark the requests with KV from plans up to `last_plan`. The others may save their blocks once more."""
        for request in tracked:
            request.has_stale_kv |= request.first_plan is not None and request.first_plan <= last_plan
            request.plan_saves_again()

    def vllm_was_reset(self) -> bool:
        """vLLM's own cache is empty now; returns True if it may have served stale KV until now."""
        served_stale = self._vllm_serves_stale
        self._vllm_serves_stale = False
        self._first_plan = None
        return served_stale
