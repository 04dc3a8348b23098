"""The data plane in vLLM's workers: pools, transfers, and the watch over the model's weights.

Private: it may change in any release; docs/api.md lists what is public.
"""
