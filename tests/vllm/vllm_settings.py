"""What tests inside vLLM find in their environment variables and on their paths."""

import importlib.util
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside"
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
}


def is_vllm_here() -> bool:
    """Whether this Python has vLLM; a folder of tests with that name does not count."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None


def set_variables(environment: MutableMapping[str, str], prefix: str) -> None:
    """Set what is not set yet, for a Python whose environment lies in the folder `prefix`.

    vLLM and numba keep what they found out in files whose names have no version: two versions that share a folder
    overwrite each other's, and each process begins anew.
    """
    caches = {"VLLM_CACHE_ROOT": f"{prefix}/cache/vllm", "NUMBA_CACHE_DIR": f"{prefix}/cache/numba"}
    for name, value in (VARIABLES | caches).items():
        environment.setdefault(name, value)
    paths = [str(REPOSITORY), str(INSIDE)]
    earlier = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in paths]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *earlier])


def set_paths() -> None:
    """Let this process import the package and what the tests share, before what has the same name elsewhere."""
    ours = [str(INSIDE), str(REPOSITORY)]
    sys.path[:] = [*ours, *(path for path in sys.path if path not in ours)]
