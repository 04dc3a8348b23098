"""KVortex as a KV connector of vLLM, known to it by its name:

vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVortexConnector", "kv_role": "kv_both",
    "kv_connector_extra_config": {"pool": "16GiB"}}'
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvortex.vllm.connector import KVortexConnector

__all__ = ["KVortexConnector"]


def __getattr__(name: str) -> object:
    # vLLM imports `kvortex.vllm.plugin` in each of its processes at an early time: the connector is not imported then.
    if name == "KVortexConnector":
        from kvortex.vllm import connector

        return connector.KVortexConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
