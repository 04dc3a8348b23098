"""KVortex's log lines appear beside vLLM's own ones. vLLM sets up the logger "vllm" only."""

import logging


def follow_vllm_logging() -> None:
    """Give the logger "kvortex" the handlers and level of vLLM's logger, unless it was set up already; idempotent."""
    ours, theirs = logging.getLogger("kvortex"), logging.getLogger("vllm")
    if ours.handlers or logging.getLogger().handlers or not theirs.handlers:
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate
