"""The text exposition format of Prometheus, version 0.0.4."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Sample: TypeAlias = tuple[str, dict[str, str], float]
"""(suffix of the name, labels, value)"""

Metric: TypeAlias = tuple[str, str, str, list[Sample]]
"""(name, type, help, samples)"""


def prometheus_text(metrics: Iterable[Metric], prefix: str) -> str:
    """The text of all metrics, with `prefix` and an underscore in front of their names.

    Raises:
        ValueError: `prefix` cannot start a metric name.
    """
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", prefix):
        raise ValueError(f"{prefix!r} cannot start a metric name; use letters, digits and underscores")
    out: list[str] = []
    for name, kind, text, samples in metrics:
        metric = f"{prefix}_{name}"
        out += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        out += [f"{metric}{suffix}{_labels(labels)} {value}" for suffix, labels, value in samples]
    return "\n".join(out) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{key}="{value.translate(escaped)}"' for key, value in labels.items()) + "}"
