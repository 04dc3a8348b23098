"""Causes of misses and refused writes, from the errors of the operating system."""

import errno
from typing import Final

from kvortex.tiers.base import Cause

_CAUSES: Final = {
    errno.ENOENT: Cause.ABSENT,
    errno.ENOTDIR: Cause.ABSENT,
    errno.ENOSPC: Cause.NO_SPACE,
    errno.EDQUOT: Cause.NO_SPACE,
    errno.EFBIG: Cause.NO_SPACE,
    errno.EMFILE: Cause.OPEN_FILES,
    errno.ENFILE: Cause.OPEN_FILES,
    errno.EACCES: Cause.PERMISSION,
    errno.EPERM: Cause.PERMISSION,
    errno.EROFS: Cause.READ_ONLY,
}


def cause_of(error: OSError) -> Cause:
    """Our cause for an error of the system, from the only table of these."""
    return _CAUSES.get(error.errno or 0, Cause.IO_ERROR)
