"""How much of a pool the blocks of one of its caches may take."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvortex.arithmetic import align_up
from kvortex.config.config import EXTENT_ALIGNMENT_BYTES
from kvortex.errors import ConfigError
from kvortex.index import EvictionPacer


@dataclass(frozen=True, slots=True)
class Quota:
    """How much of the pool the blocks of one cache may take.

    Attributes:
        nbytes: that many bytes.
        form: a form of its blocks.
        pacer: decides how many of its own blocks to evict as it fills, as if it were a pool.
    """

    nbytes: int
    form: int
    pacer: EvictionPacer


def check_quota(sizes: NDArray[np.int64], quota_bytes: int) -> None:
    """Refuse a quota that a block of each group does not fit.

    Args:
        sizes: bytes of a block, for each group, `int64 [n]`.
        quota_bytes: the quota.

    Raises:
        ConfigError: the message says how much it takes.
    """
    least = sum(align_up(nbytes, EXTENT_ALIGNMENT_BYTES) for nbytes in sizes.tolist())
    if quota_bytes < least:
        blocks = "a block takes" if len(sizes) == 1 else f"one block of each of {len(sizes)} groups of layers takes"
        raise ConfigError(
            f"{blocks} {least} bytes, and the quota has {quota_bytes}: "
            "raise owner.quota to what many blocks take, such as 20GiB, or leave it out for no quota"
        )
