"""Process-wide services: blocking work on threads, loops on threads, compiled code and its cache.

Private: it may change in any release; docs/api.md lists what is public.
"""
