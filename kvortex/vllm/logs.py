"""What KVortex says in a server is seen where vLLM's own lines are: vLLM sets up the logger "vllm" and no other."""

import logging


def follow_vllm_logging() -> None:
    """Give the logger "kvortex" the handlers and the level of vLLM's, unless somebody has set it up; idempotent."""
    ours, theirs = logging.getLogger("kvortex"), logging.getLogger("vllm")
    if ours.handlers or logging.getLogger().handlers or not theirs.handlers:
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate
