"""The two planes: control decides which blocks move where, data moves them.

Private: it may change in any release; docs/api.md lists what is public.
"""
