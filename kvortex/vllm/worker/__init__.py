"""The data plane in vLLM's workers: pools, transfers, and the watch over the model's weights."""
