"""A place for caches where a user has none: read-only installations, users without a home directory."""

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path | None:
    """`kvortex-UID` in the temporary directory; None where it cannot be made or is not this user's alone.

    What is read from there is run, so nobody else may be able to write to it.
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
