"""A folder for caches if there is no other: in read-only installations, and for users without a home directory."""

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path | None:
    """The folder `kvortex-UID` in the temporary directory; None if it cannot be created, or others can write to it.

    Code that is read from there is executed, so only this user may be able to write to it.
    """
    user = os.geteuid()
    try:
        path = Path(tempfile.gettempdir()) / f"kvortex-{user}"
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not stat.S_IMODE(found.st_mode) & 0o077
    return path if is_ours else None
