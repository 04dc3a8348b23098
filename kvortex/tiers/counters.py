"""The live counters behind `TierStats`."""

import threading
from collections import Counter
from collections.abc import Iterable

from kvortex.tiers.base import Cause, ReadOutcome, ScanProgress, TierStats, WriteOutcome
from kvortex.types import MissReason, SaveOutcome


class TierCounters:
    """Thread-safe: each call holds the lock for a few additions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = 0
        self._misses = dict.fromkeys(MissReason, 0)
        self._writes = dict.fromkeys(SaveOutcome, 0)
        self._causes = Counter(dict.fromkeys(Cause, 0))
        self._read_bytes = 0
        self._written_bytes = 0
        self._removed_corrupt = 0

    def record_reads(self, outcomes: Iterable[ReadOutcome]) -> None:
        """Add the outcomes of a read."""
        with self._lock:
            for outcome in outcomes:
                if outcome.reason is None:
                    self._hits += 1
                    self._read_bytes += outcome.payload_bytes
                else:
                    self._misses[outcome.reason] += 1
                self._count(outcome.cause)

    def record_writes(self, outcomes: Iterable[WriteOutcome], payload_bytes: Iterable[int]) -> None:
        """Add the outcomes of a write, with the payload bytes of each."""
        with self._lock:
            for outcome, nbytes in zip(outcomes, payload_bytes, strict=True):
                self._writes[outcome.outcome] += 1
                if outcome.outcome is SaveOutcome.STORED:
                    self._written_bytes += nbytes
                self._count(outcome.cause)

    def record_cause(self, cause: Cause) -> None:
        """Add a failure that belongs to no outcome of a read or write."""
        with self._lock:
            self._count(cause)

    def record_removed_corrupt(self) -> None:
        """Add a damaged block that was removed."""
        with self._lock:
            self._removed_corrupt += 1

    def snapshot(
        self,
        name: str,
        *,
        evicted_blocks: int,
        num_blocks: int,
        used_bytes: int,
        capacity_bytes: int,
        unsettled: int,
        scan: ScanProgress,
    ) -> TierStats:
        """All counters at one moment, with the given gauges."""
        with self._lock:
            return TierStats(
                name=name,
                hits=self._hits,
                misses=dict(self._misses),
                writes=dict(self._writes),
                causes=dict(self._causes),
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
                evicted_blocks=evicted_blocks,
                removed_corrupt=self._removed_corrupt,
                num_blocks=num_blocks,
                used_bytes=used_bytes,
                capacity_bytes=capacity_bytes,
                unsettled=unsettled,
                scan=scan,
            )

    def _count(self, cause: Cause | None) -> None:
        if cause is not None:
            self._causes[cause] += 1
