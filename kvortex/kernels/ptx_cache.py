"""A cache of compiled kernels on disk: compiling takes seconds, reading the cache a millisecond."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from kvortex.errors import UnsupportedKernelError
from kvortex.runtime.private_folder import private_folder

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")
Kernel = tuple[str, str]
"""PTX and the name of its entry point."""


def load_cached(
    key: tuple[object, ...],
    compile_kernel: Callable[[], Kernel],
    load_kernel: Callable[[str, str], Loaded],
    directory: Path | None = None,
) -> Loaded:
    """Load a kernel: from the cache if the same code was compiled before and this driver accepts it.

    If a file is damaged, cannot be read or written, or was compiled for a newer driver, the kernel is compiled again.
    A kernel that the driver rejects is not cached.

    Args:
        key: distinguishes this kernel from others of the same sources; includes the version of NVVM that compiles it.
        compile_kernel: returns PTX and the name of its entry point.
        load_kernel: loads PTX by the name of its entry point.
        directory: cache directory; by default `kvortex/kernels` in the user's cache directory
            (`XDG_CACHE_HOME`), or a private temporary one where that cannot be written.

    Raises:
        UnsupportedKernelError: the driver rejects the newly compiled kernel too.
    """
    name = f"{hashlib.sha256(repr((key, _fingerprint())).encode()).hexdigest()}.ptx"
    paths = [folder / name for folder in ([directory] if directory is not None else _directories())]
    for path in paths:
        try:
            return load_kernel(*_read(path))
        except (OSError, ValueError):  # missing or damaged
            continue
        except UnsupportedKernelError as error:
            logger.info("%s is compiled again: %s", path, error)
    kernel = compile_kernel()
    loaded = load_kernel(*kernel)
    _keep(paths, kernel)
    return loaded


def _keep(paths: Sequence[Path], kernel: Kernel) -> None:
    reason: OSError | str = "there is no such directory"
    for path in paths:
        try:
            _write(path, kernel)
            return
        except OSError as error:
            reason = error
    places = " or ".join(str(path.parent) for path in paths) or "a cache directory"
    logger.info("compiled kernels cannot be kept in %s, so every start compiles them: %s", places, reason)


def _directories() -> list[Path]:
    found = []
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvortex" / "kernels")
    if not any(_is_writable(path) for path in found) and (private := private_folder()) is not None:
        found.append(private / "kernels")
    return found


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


@cache
def _fingerprint() -> str:
    """Identifies everything that a kernel depends on: our sources, the compiler, the interpreter."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for source in sorted([*package.glob("kernels/*.py"), *package.glob("codecs/*.py")]):
        digest.update(source.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "numba-cuda")]
    return repr((digest.hexdigest(), versions, sys.version_info[:2]))


def _read(path: Path) -> Kernel:
    checksum, name, ptx = path.read_text().split("\n", 2)
    if checksum != _checksum(name, ptx):
        raise ValueError(f"{path} is damaged")
    return ptx, name


def _write(path: Path, kernel: Kernel) -> None:
    ptx, name = kernel
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(f"{_checksum(name, ptx)}\n{name}\n{ptx}")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _checksum(name: str, ptx: str) -> str:
    return hashlib.sha256(f"{name}\n{ptx}".encode()).hexdigest()
