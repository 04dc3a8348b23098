"""A vLLM plugin, named by an entry point: it registers the connector's name in every process of a server."""

NAME = "KVortexConnector"


def register() -> None:
    """Register the connector. vLLM calls this as a general plugin, perhaps more than once; it imports nothing heavy."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvortex.vllm.connector", NAME)
