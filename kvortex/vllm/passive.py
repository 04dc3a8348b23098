"""Both halves of a connector that stores nothing, for models whose KV cannot be reused."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvortex.vllm.metrics import ConnectorStats
from kvortex.vllm.plans import ConnectorPlan


class PassiveScheduler:
    """The methods of `SchedulerHalf`, without any hit or save."""

    def bind(self, manager: object, scheduler: object = None) -> None: ...

    def accept_handshake(self, handshakes: object) -> None: ...

    def get_num_new_matched_tokens(self, request: object, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: object, blocks: object, num_external_tokens: int) -> None: ...

    def disk_tokens(self, request: object) -> int:
        return 0

    def allocated_for_others(self, request: object, blocks: object) -> None: ...

    def build_connector_meta(self, scheduler_output: object) -> ConnectorPlan:
        return ConnectorPlan()

    def update_connector_output(self, connector_output: object) -> None: ...

    def promise(self, request: object) -> dict[str, Any] | None:
        return None

    def request_finished(self, request: object) -> bool:
        return False

    def take_events(self) -> Iterable[Any]:
        return ()

    def reset_cache(self) -> bool:
        return True

    def vllm_resets(self) -> None: ...

    def add_finished_tail(self, request: Any, block_ids: Any, tails: Any) -> None: ...

    def vllm_was_reset(self) -> None: ...

    def holds_device_blocks(self) -> bool:
        return False

    def has_work(self) -> bool:
        return False

    def take_stats(self) -> ConnectorStats | None:
        return None

    def shutdown(self) -> None: ...


class PassiveWorker:
    """The methods of `WorkerHalf`, without any transfer or memory."""

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None: ...

    def fall_asleep(self, keeps_weights: bool) -> None: ...

    def forget(self) -> None: ...

    def wake(self) -> None: ...

    def handshake(self) -> None:
        return None

    def wait_for_reads(self, plan: ConnectorPlan) -> None: ...

    def begin_step(self, plan: ConnectorPlan) -> None: ...

    def start_loads(self) -> None: ...

    def start_saves(self) -> None: ...

    def take_finished(self) -> set[str]:
        return set()

    def take_failed_requests(self) -> set[str]:
        return set()

    def take_failed_block_ids(self) -> set[int]:
        return set()

    def take_stats(self) -> ConnectorStats:
        return ConnectorStats()

    def take_reports(self) -> None:
        return None

    def shutdown(self) -> None: ...
