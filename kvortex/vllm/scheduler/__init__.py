"""The control plane in vLLM's scheduler: it decides which blocks are saved, loaded, fetched and written.

Private: it may change in any release; docs/api.md lists what is public.
"""
