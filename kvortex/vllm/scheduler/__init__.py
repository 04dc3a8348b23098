"""The control plane in vLLM's scheduler: which blocks are saved, loaded, fetched and written."""
