"""Compiled kernels on disk: numba-cuda takes seconds for what a later process reads in a millisecond."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

Kernel = tuple[str, str]
"""PTX and the name of its entry point."""


def cached_ptx(key: tuple[object, ...], compile_kernel: Callable[[], Kernel], directory: Path | None = None) -> Kernel:
    """What `compile_kernel` gives, out of the cache if the same code was compiled before.

    A file that is damaged, or that cannot be read or written, costs a compilation and nothing else.

    Args:
        key: tells this kernel from others of the same sources.
        compile_kernel: gives PTX and the name of its entry point.
        directory: of the cache; by default `kvortex/kernels` in the user's cache directory (`XDG_CACHE_HOME`).
    """
    directory = directory or _user_directory()
    path = directory / f"{hashlib.sha256(repr((key, _fingerprint())).encode()).hexdigest()}.ptx"
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        return _read(path)
    kernel = compile_kernel()
    try:
        _write(path, kernel)
    except OSError as error:
        logger.info("compiled kernels cannot be kept in %s, so every start compiles them: %s", directory, error)
    return kernel


def _user_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvortex" / "kernels"


@cache
def _fingerprint() -> str:
    """Of everything that a kernel is made from: our sources, the compiler, the interpreter."""
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
