"""Arithmetic of sizes and places."""


def align_up(nbytes: int, alignment: int) -> int:
    """The least multiple of `alignment` that is not below `nbytes`."""
    return -(-nbytes // alignment) * alignment
