"""How jobs end in a worker: what it reports to the scheduler half after each step, and to vLLM."""

from collections import deque

from kvortex.vllm.plans import JobOutcome, LoadJob, PoolShrunk
from kvortex.vllm.versions import Report, WorkerReports


class ReportBox:
    """Collects reports until the next step takes them.

    Jobs end on the thread of the data plane's loop; steps run on vLLM's thread. Outcomes wait until a step asks for
    finished loads, so the outcome of a load and the end of its request are reported in the same step.

    Args:
        by_request: False if failed loads are reported by their device blocks. Then vLLM keeps what is before the first
            of them, which is of use with full attention alone: a window or a state lacks what came before. True if
            they are reported request by request.
    """

    def __init__(self, *, by_request: bool = False) -> None:
        self._by_request = by_request
        self._failed_requests: set[str] = set()
        self._ended: deque[tuple[JobOutcome, LoadJob | None] | PoolShrunk] = deque()
        self._reports: list[Report] = []
        self._failed_block_ids: set[int] = set()

    # -- from any thread ---------------------------------------------------------------------------

    def end_load(self, job: LoadJob, outcome: JobOutcome) -> None:
        """A load is over."""
        self._ended.append((outcome, job))

    def end(self, outcome: JobOutcome) -> None:
        """A save, a write or a fetch is over."""
        self._ended.append((outcome, None))

    def shrink_pool(self, report: PoolShrunk) -> None:
        """No more of the pool can be pinned."""
        self._ended.append(report)

    # -- from the thread of the steps --------------------------------------------------------------

    def add(self, report: Report) -> None:
        """Report something with the next step."""
        self._reports.append(report)

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended since the last call; see `take_failed_block_ids` for what they miss."""
        received: set[str] = set()
        while self._ended:
            ended = self._ended.popleft()
            if isinstance(ended, PoolShrunk):
                self._reports.append(ended)
                continue
            outcome, load = ended
            self._reports.append(outcome)
            if load is not None:
                received.add(load.request_id)
                bad = [*outcome.failed, *outcome.corrupt]
                if not self._by_request:
                    self._failed_block_ids.update(load.transfer.block_ids[bad].tolist(), load.missing_block_ids)
                elif bad or load.missing_block_ids:
                    self._failed_requests.add(load.request_id)
        return received

    def take_failed_requests(self) -> set[str]:
        """Requests whose loads have failed, at least in part, since the last call; empty unless `by_request`."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_failed_block_ids(self) -> set[int]:
        """Device blocks that a load should have filled, and that hold no KV, since the last call."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def take(self) -> WorkerReports | None:
        """The reports since the last call, None if there are none."""
        if not self._reports:
            return None
        reports, self._reports = self._reports, []
        return WorkerReports(reports)
