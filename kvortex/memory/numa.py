"""Placement of a mapping's pages on NUMA nodes (`mbind`, without libnuma), and their allocation (`madvise`)."""

import ctypes
import logging
import os
import platform
from pathlib import Path

logger = logging.getLogger(__name__)

_SYS_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1
_MADV_POPULATE_WRITE = 23  # Linux 5.14 and newer


def online_nodes() -> list[int]:
    """Numbers of this machine's NUMA nodes; `[0]` if the kernel does not state them."""
    try:
        text = Path("/sys/devices/system/node/online").read_text().strip()
    except OSError:
        text = ""
    nodes: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        nodes.extend(range(int(first), int(last or first) + 1))
    return nodes or [0]


def prefer_node(address: int, nbytes: int, node: int | None) -> bool:
    """Ask the kernel to allocate the pages of a mapping on a NUMA node; they must not be touched yet.

    This is a preference: if the node is full, pages come from its neighbours.

    Args:
        address: the mapping's address, a multiple of the page size.
        nbytes: its size in bytes.
        node: number of the node; None if it is unknown.

    Returns:
        True if the kernel has accepted; False also if there is only one node, or the node or machine is unknown.
    """
    number = _SYS_MBIND.get(platform.machine())
    if node is None or number is None or len(online_nodes()) < 2:
        return False
    mask = ctypes.c_ulong(1 << node)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        ctypes.byref(mask),
        ctypes.c_ulong(64),
        ctypes.c_uint(0),
    )
    if result != 0:
        logger.debug("mbind to node %d refused: %s", node, os.strerror(ctypes.get_errno()))
    return bool(result == 0)


def make_present(address: int, nbytes: int) -> bool:
    """Allocate the pages of a mapping now, without the GIL.

    Returns:
        False if the kernel is too old for this: then pages are allocated when they are first touched.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(_MADV_POPULATE_WRITE))
    return bool(result == 0)
