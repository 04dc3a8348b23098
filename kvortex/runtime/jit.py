"""numba's `njit` with a cache that never raises: if it cannot be written, functions are compiled in each process."""

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from kvortex.runtime.private_folder import private_folder

logger = logging.getLogger(__name__)

# Exceptions that reading a damaged file may raise, see Python's documentation of `pickle`.
_DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator like `numba.njit`.

    Args:
        cache: True to cache the compiled code in numba's usual place, or else in a private temporary folder. If neither
            can be written, every process compiles it.
        options: passed to `numba.njit`.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if cache:
            _keep(dispatcher)
        return dispatcher

    return compiled


def _keep(dispatcher: Any) -> None:
    try:
        dispatcher._cache = _ForgivingCache(dispatcher.py_func)
    except RuntimeError:  # numba's "no locator available"
        _say_nothing_is_kept()


@cache
def _say_nothing_is_kept() -> None:
    logger.warning(
        "compiled functions cannot be kept in the package, the user's cache directory or %s, so every start compiles "
        "them; set NUMBA_CACHE_DIR to a directory that can be written",
        os.environ.get("TMPDIR", "/tmp"),
    )


@cache
def _temporary_folder() -> Path | None:
    folder = private_folder()
    if folder is not None:
        logger.info("compiled functions are kept in %s; set NUMBA_CACHE_DIR for another place", folder)
    return folder


class _TemporaryLocator:
    """A cache locator, as numba defines it, for the private temporary folder."""

    def __init__(self, function: Callable[..., Any], file: str, folder: Path) -> None:
        self._py_file = file
        self._line = function.__code__.co_firstlineno
        directory = os.path.dirname(os.path.abspath(file))
        self._path = folder / f"{os.path.basename(directory)}_{hashlib.sha256(directory.encode()).hexdigest()}"

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Self | None:
        folder = _temporary_folder()
        if folder is None or not os.path.exists(file):
            return None
        locator = cls(function, file, folder)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator

    def ensure_cache_path(self) -> None:
        self._path.mkdir(mode=0o700, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> tuple[float, int]:
        found = os.stat(self._py_file)
        return found.st_mtime, found.st_size

    def get_disambiguator(self) -> str:
        return str(self._line)


def _locators() -> list[Any]:
    """numba's locators and ours. Without a home directory numba's user-wide one is left out: it would create a `~`."""
    has_home = os.path.isabs(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~"))
    numbas_own = [
        kind for kind in CompileResultCacheImpl._locator_classes if has_home or "UserWide" not in kind.__name__
    ]
    return [*numbas_own, _TemporaryLocator]


class _Places(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = _locators()


class _ForgivingCache(FunctionCache):  # type: ignore[misc]
    """numba's cache, but a failed write is only logged, and damaged files are replaced."""

    _impl_class = _Places

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            try:
                return super().load_overload(sig, target_context)
            except _DAMAGED as error:
                logger.info("%s holds damaged files, which are replaced: %r", self.cache_path, error)
                self.flush()
        except OSError as error:
            _say_not_written(self.cache_path, str(error))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _say_not_written(self.cache_path, str(error))


@cache
def _say_not_written(path: str, error: str) -> None:
    logger.warning("compiled functions cannot be kept in %s, so every start compiles them: %s", path, error)
