"""Where the pages of a mapping come from, and when: `mbind` without libnuma, and `madvise`."""

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
    """NUMA nodes of this machine; `[0]` where the kernel does not say."""
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
    """Ask for the pages of a mapping, not yet touched, to come from `node`; True when the kernel agreed.

    A preference, not a demand: a full node falls back to its neighbours. With one node, an unknown node or an
    unknown machine there is nothing to do.
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
    """Give a mapping its pages now, without the GIL; False on kernels that cannot: they come when first touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(_MADV_POPULATE_WRITE))
    return bool(result == 0)
