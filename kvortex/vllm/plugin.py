"""Makes the connector known to vLLM by its name alone, in every process of a server; an entry point names it."""

NAME = "KVortexConnector"


def register() -> None:
    """Called by vLLM as one of its general plugins, perhaps more than once; imports nothing that is heavy."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvortex.vllm.connector", NAME)
