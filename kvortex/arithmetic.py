"""Arithmetic of sizes and places.

Private: it may change in any release; docs/api.md lists what is public.
"""


def align_up(nbytes: int, alignment: int) -> int:
    """The least multiple of `alignment` that is not below `nbytes`."""
    return -(-nbytes // alignment) * alignment
