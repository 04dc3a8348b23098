"""Everything in which the supported vLLM versions differ, told by what they have and not by their numbers.

Verified against 0.15.1, 0.23.0 and 0.32.0. "Older" below is 0.15, "newer" is 0.23 and later.
"""

import os
from collections.abc import Iterable
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1 import base

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


def hash_root_is_random(hash_algorithm: str) -> bool:
    """True if vLLM's block hashes start from a root that differs in every process.

    Older versions and 0.23 draw it whatever the algorithm, later ones for those that are not cryptographic; a
    PYTHONHASHSEED fixes it everywhere.
    """
    from vllm.v1.core import kv_cache_utils

    if "PYTHONHASHSEED" in os.environ:
        return False
    return not (hasattr(kv_cache_utils, "resolve_none_hash_seed") and hash_algorithm.startswith("sha256"))
