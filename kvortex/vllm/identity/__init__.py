"""The identity of a server's blocks: everything that must agree for their bytes to be reusable.

Private: it may change in any release; docs/api.md lists what is public.
"""
