"""The connector's figures in vLLM's own statistics: counters that are summed over steps and workers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvortex.types import MissReason

COUNTERS = {
    "saved_blocks": "Blocks saved",
    "saved_bytes": "Bytes saved, per worker",
    "failed_saves": "Blocks whose save failed",
    "kept_as_is_blocks": "Blocks saved as they are because packing would have lost too much",
    "loaded_blocks": "Blocks loaded",
    "loaded_bytes": "Bytes loaded, per worker",
    "load_seconds": "Seconds from the plan of a load to its end, summed over loads",
    "loads": "Loads",
    "written_blocks": "Blocks written to the lower tier, by all engines with this cache",
    "failed_writes": "Blocks that the lower tier did not store",
    "shed_writes": "Blocks not written because too many waited",
    "fetched_blocks": "Blocks brought back from the lower tier",
    "tier_pauses": "Times that the use of the lower tier was paused because it hung or failed",
    "fetch_seconds": "Seconds from the beginning of a fetch until its request is looked up again, summed over fetches",
}
MISS_PREFIX = "missed_blocks_"


class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Counters since they were last taken."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=dict(data or {}))

    def add(self, name: str, value: float) -> None:
        """Add to one counter."""
        self.data[name] = self.data.get(name, 0) + value

    def count_misses(self, reason: MissReason, blocks: int) -> None:
        """Count blocks that a request has to compute.

        Args:
            reason: why the first of them was missed.
            blocks: how many.
        """
        self.add(MISS_PREFIX + reason.value, blocks)

    def count_save(self, failed: int, blocks: int, nbytes: int) -> None:
        """Count one save.

        Args:
            failed: blocks of it that were not stored.
            blocks: all blocks of it.
            nbytes: bytes of those that were, raw.
        """
        self.add("saved_blocks", blocks - failed)
        self.add("saved_bytes", nbytes)
        self.add("failed_saves", failed)

    def count_load(self, outcomes: Sequence[MissReason | None], nbytes: int, seconds: float) -> None:
        """Count one load.

        Args:
            outcomes: one for each block that was promised: None, or the reason why it did not arrive.
            nbytes: bytes of those that arrived, raw.
            seconds: seconds from the plan to the end.
        """
        loaded = outcomes.count(None)
        self.add("loads", 1)
        self.add("load_seconds", seconds)
        self.add("loaded_blocks", loaded)
        self.add("loaded_bytes", nbytes)
        if loaded < len(outcomes):
            for reason, blocks in Counter(outcome for outcome in outcomes if outcome is not None).items():
                self.count_misses(reason, blocks)

    def reset(self) -> None:
        """Set every counter to zero."""
        self.data.clear()

    def take(self) -> "ConnectorStats":
        """The counters since the last call."""
        taken = ConnectorStats(self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> "ConnectorStats":
        """Add the counters of `other` to these."""
        for name, value in other.data.items():
            self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counters and the hit rate, for vLLM's log line."""
        figures = {name: round(value, 3) for name, value in sorted(self.data.items())}
        missed = sum(value for name, value in self.data.items() if name.startswith(MISS_PREFIX))
        asked = self.data.get("loaded_blocks", 0) + missed
        return {"hit_rate": round(self.data.get("loaded_blocks", 0) / asked, 3) if asked else 0.0, **figures}

    def is_empty(self) -> bool:
        """True if nothing was counted."""
        return not self.data


class ConnectorPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Prometheus counters `vllm:kvortex_*`, labelled by engine; misses also by reason."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._children(f"vllm:kvortex_{name}", text, labelnames, per_engine_labelvalues, ())
            for name, text in COUNTERS.items()
        }
        for reason in MissReason:
            self._counters[MISS_PREFIX + reason.value] = {}
        missed = self._counter_cls(
            name="vllm:kvortex_missed_blocks",
            documentation="Blocks that had to be computed, by the reason of the miss",
            labelnames=[*labelnames, "reason"],
        )
        for engine, values in per_engine_labelvalues.items():
            for reason in MissReason:
                child = missed.labels(*values, reason.value)
                self._counters[MISS_PREFIX + reason.value][engine] = child

    def _children(
        self, name: str, text: str, labelnames: list[str], values: dict[int, list[Any]], extra: tuple[str, ...]
    ) -> dict[int, Any]:
        counter = self._counter_cls(name=name, documentation=text, labelnames=[*labelnames, *extra])
        return {engine: counter.labels(*labels, *extra) for engine, labels in values.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval's counters."""
        for name, value in transfer_stats_data.items():
            if name in self._counters and value:
                self._counters[name][engine_idx].inc(value)
