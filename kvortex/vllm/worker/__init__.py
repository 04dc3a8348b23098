"""The data plane in vLLM's workers: pools, transfers, and what a rank sees of its model."""
