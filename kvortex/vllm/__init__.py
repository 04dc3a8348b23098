"""KVortex as a KV connector of vLLM:

vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVortexConnector",
    "kv_connector_module_path": "kvortex.vllm", "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_pool_bytes": "16GiB"}}'
"""

from kvortex.vllm.connector import KVortexConnector

__all__ = ["KVortexConnector"]
