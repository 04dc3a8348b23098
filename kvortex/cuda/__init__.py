"""The CUDA driver: the calls that are needed, on raw handles.

Private: it may change in any release; docs/api.md lists what is public.
"""
