"""Everything in which the supported vLLM versions differ, told by what they have and not by their numbers.

Verified against 0.15.1, 0.23.0 and 0.32.0. "Older" below is 0.15, "newer" is 0.23 and later.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1 import base

from kvortex.errors import ConfigError
from kvortex.vllm.plans import JobOutcome

IS_NEWER: Final = hasattr(base, "KVConnectorWorkerMetadata")

if IS_NEWER:
    _MessageBase: Any = base.KVConnectorWorkerMetadata
else:
    from vllm.distributed.kv_events import KVConnectorKVEvents

    _MessageBase = KVConnectorKVEvents


class OutcomeMessage(_MessageBase):  # type: ignore[misc]
    """Outcomes on their way from the workers to the scheduler half.

    Newer versions have worker metadata for it. Older ones have only the events' channel, which nobody else
    reads from a connector's output; there the executor adds the other workers' outcomes to the first one's.
    """

    def __init__(self, outcomes: Iterable[JobOutcome] = ()) -> None:
        self.outcomes = list(outcomes)

    def aggregate(self, other: "OutcomeMessage | None" = None) -> "OutcomeMessage":
        """One message with everybody's outcomes."""
        return OutcomeMessage([*self.outcomes, *(other.outcomes if other is not None else ())])

    def add_events(self, events: list[JobOutcome]) -> None:
        """Older: take over another worker's outcomes."""
        self.outcomes.extend(events)

    def get_all_events(self) -> list[JobOutcome]:
        """Older: what another worker's message takes over."""
        return self.outcomes

    def increment_workers(self, count: int = 1) -> None:
        """Older: the number of workers; each outcome counts for itself."""

    def get_number_of_workers(self) -> int:
        """Older: required by the base class."""
        return 1

    def clear_events(self) -> None:
        """Older: required by the base class."""
        self.outcomes.clear()


def message_in(connector_output: Any) -> OutcomeMessage | None:
    """The outcomes in a step's output, if there are any."""
    name = "kv_connector_worker_meta" if IS_NEWER else "kv_cache_events"
    message = getattr(connector_output, name, None)
    return message if isinstance(message, OutcomeMessage) else None


HOLD_ABORTED_LOADS: Final = not IS_NEWER
"""What `request_finished` answers while a load is still writing the request's blocks.

Newer versions hold the blocks until the load is reported as received, whatever the answer. Older ones free them at
once unless told to hold, and then until the request is reported as *sent*.
"""


RESERVES_FOR_LOADS: Final = IS_NEWER
"""Newer versions admit a load only if the request can go on afterwards. In older ones requests that were loaded for
can come to hold all blocks while none of them has room for its next token, and nothing moves any more.
"""


def report_aborted_loads(connector_output: Any, aborted: set[str]) -> None:
    """Rewrite a step's output so that blocks of requests aborted while loading are freed; forgets those ids."""
    received = connector_output.finished_recving
    ended = aborted.intersection(received or ())
    aborted -= ended
    if HOLD_ABORTED_LOADS and ended:
        connector_output.finished_recving = set(received) - ended
        connector_output.finished_sending = set(connector_output.finished_sending or ()) | ended


HAS_SLEEP_HOOKS: Final = hasattr(base.KVConnectorBase_V1, "unregister_kv_caches")
"""From 0.33 vLLM tells a connector before it takes the paged cache's memory away, and when it is back."""


def watch_sleep(
    model_config: Any, before_sleep: Callable[[bool], None], after_wake: Callable[[], None]
) -> Callable[[], None]:
    """Have `before_sleep` called in the worker before the cache's memory is unmapped, `after_wake` when it is back.

    `before_sleep` is told whether the weights are kept. Versions without hooks say nothing to a connector: there the
    methods of the worker's one memory allocator, through which all of sleep mode goes, are wrapped.

    Returns:
        What ends it.

    Raises:
        ConfigError: sleep is left to another mechanism than that allocator.
    """
    used = any(getattr(model_config, name, False) for name in ("enable_sleep_mode", "enable_cumem_allocator"))
    if HAS_SLEEP_HOOKS or not used:
        return lambda: None
    backend = getattr(model_config, "sleep_mode_backend", "cumem")
    if backend != "cumem":
        raise ConfigError(f"KVortex cannot follow the sleep-mode backend {backend!r} in this vLLM, only 'cumem'")
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    sleep, wake_up = allocator.sleep, allocator.wake_up

    def watched_sleep(offload_tags: tuple[str, ...] | str | None = None) -> None:
        before_sleep(offload_tags is not None and "weights" in offload_tags)
        sleep(offload_tags)

    def watched_wake_up(tags: list[str] | None = None) -> None:
        wake_up(tags)
        if tags is None or "kv_cache" in tags:
            after_wake()

    watched = {"sleep": watched_sleep, "wake_up": watched_wake_up}
    if hasattr(allocator, "discard"):
        discard = allocator.discard

        def watched_discard(tags: Sequence[str] | str) -> None:
            if "kv_cache" in tags:
                before_sleep(True)
            discard(tags)

        watched["discard"] = watched_discard
    vars(allocator).update(watched)

    def end() -> None:
        for name in watched:
            vars(allocator).pop(name, None)

    return end


def hash_root_is_random(hash_algorithm: str) -> bool:
    """True if vLLM's block hashes start from a root that differs in every process.

    Older versions and 0.23 draw it whatever the algorithm, later ones for those that are not cryptographic; a
    PYTHONHASHSEED fixes it everywhere.
    """
    from vllm.v1.core import kv_cache_utils

    if "PYTHONHASHSEED" in os.environ:
        return False
    return not (hasattr(kv_cache_utils, "resolve_none_hash_seed") and hash_algorithm.startswith("sha256"))
