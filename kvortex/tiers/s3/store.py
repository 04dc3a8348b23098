"""Objects of one bucket, by obstore: requests with a time limit, and errors as ours."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import BaseError
from obstore.store import S3Store

from kvortex.errors import ConfigError
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.s3.failures import StoreFailure, failure_of
from kvortex.tiers.s3.objects import Listed
from kvortex.tiers.s3.profiles import ProfileKeys
from kvortex.tiers.s3.settings import CONNECT_S, S3Settings

MOST_RETRIES: Final = 3
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
"""Of the pauses between attempts at one request, and of those after a request without an answer."""
AT_A_TIME: Final = 1000
"""Objects that one request lists or deletes."""


class ObjectStore:
    """The objects of one folder; see `Objects`.

    Args:
        settings: of the bucket.
        folder: the folder, without a slash at its end.
        log: is told of all failures.

    Raises:
        ConfigError: the settings do not go together.
    """

    def __init__(self, settings: S3Settings, folder: str, log: FailureLog) -> None:
        self._folder = folder
        self._timeout_s = settings.timeout_s
        self._log = log
        self._failure: StoreFailure | None = None  # of the last request that had no answer
        self._pause_s = self._retry_at_s = 0.0
        self._store = _make_store(settings)

    async def put(self, name: str, data: NDArray[np.uint8] | bytes) -> None:
        async with self._call():
            await obstore.put_async(self._store, self._path(name), data, use_multipart=False)

    async def get(self, name: str, start: int, stop: int) -> tuple[NDArray[np.uint8], int]:
        async with self._call():
            answer = await obstore.get_async(self._store, self._path(name), options={"range": (start, stop)})
            body = await answer.bytes_async()
            return np.frombuffer(memoryview(body), dtype=np.uint8), int(answer.meta["size"])

    async def pages(self, after: str = "") -> AsyncIterator[list[Listed]]:
        offset = self._path(after) if after else None
        stream = obstore.list(self._store, self._path(""), offset=offset, chunk_size=AT_A_TIME)
        while True:
            async with self._call():
                page = await anext(stream, None)
            if page is None:
                return
            names = [(str(each["path"]).removeprefix(self._path("")), int(each["size"])) for each in page]
            yield [Listed(name, nbytes) for name, nbytes in names if "/" not in name]

    async def delete(self, names: Sequence[str]) -> None:
        paths = [self._path(name) for name in names]
        for start in range(0, len(paths), AT_A_TIME):
            async with self._call():
                await obstore.delete_async(self._store, paths[start : start + AT_A_TIME])

    def close(self) -> None:
        del self._store  # it has no other way to close its connections

    # -- inside ------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """One request. For a while after one that had no answer nobody tries: all fail at once."""
        if self._failure is not None and time.monotonic() < self._retry_at_s:
            raise StoreFailure(self._failure.kind, str(self._failure))
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (BaseError, OSError) as error:  # a FileNotFoundError for an object that is not there
            raise self._failed(error) from error  # held by no frame of its own traceback, see `_pause_after`
        if self._failure is not None:
            self._failure, self._pause_s = None, 0.0
            self._log.works_again()

    def _failed(self, error: BaseError | OSError) -> StoreFailure:
        if isinstance(error, TimeoutError):
            failure = StoreFailure("Timeout", f"no answer in {self._timeout_s:g} s")
        else:
            failure = failure_of(error)
        if not failure.is_absent and not failure.is_damaged:
            self._log.failed(failure)
        if failure.status is None:
            self._pause_after(failure)
        return failure

    def _pause_after(self, failure: StoreFailure) -> None:
        now_s = time.monotonic()
        if now_s >= self._retry_at_s:  # else other requests have just failed, too
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self._retry_at_s = now_s + self._pause_s
        # Without its traceback, whose frames know this object: connections would stay until the garbage is collected.
        self._failure = StoreFailure(failure.kind, str(failure))


def _make_store(settings: S3Settings) -> S3Store:
    url = settings.store_url
    config: dict[str, Any] = {"unsigned_payload": not settings.sign_payload, "skip_signature": settings.anonymous}
    path_style = (url is not None) if settings.path_style is None else settings.path_style
    config["virtual_hosted_style_request"] = not path_style
    if url is not None:
        config["endpoint"] = url if path_style else _with_bucket(url, settings.bucket)
    keys = None if settings.profile is None else ProfileKeys(settings.profile)
    region = settings.region or (None if keys is None else keys.region())
    if region is not None:
        config["region"] = region
    client: dict[str, Any] = {
        "allow_http": url is not None and url.startswith("http://"),
        "timeout": timedelta(seconds=settings.timeout_s),
        "connect_timeout": timedelta(seconds=min(CONNECT_S, settings.timeout_s)),
    }
    if settings.ca_file is not None:
        client["root_certificate"] = Path(settings.ca_file).read_bytes()
    retries = {
        "max_retries": MOST_RETRIES,
        "retry_timeout": timedelta(seconds=settings.timeout_s),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE_S),
            "max_backoff": timedelta(seconds=LONGEST_PAUSE_S),
            "base": 2,
        },
    }
    try:
        return S3Store(
            settings.bucket,
            config=config,  # type: ignore[arg-type]  # built in steps
            client_options=client,  # type: ignore[arg-type]
            retry_config=retries,  # type: ignore[arg-type]
            credential_provider=keys,
        )
    except (BaseError, ValueError, OSError) as error:
        raise ConfigError(f"s3: {failure_of(error)}") from error


def _with_bucket(url: str, bucket: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{bucket}.{parts.netloc}"
