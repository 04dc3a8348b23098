"""The control plane in vLLM's scheduler: it decides which blocks are saved, loaded, fetched and written."""
