"""Which bucket is used and how, from the parts of a URL."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from kvortex.errors import ConfigError

SCHEME: Final = "s3"
PREFIX: Final = "kvortex"
CONNECT_S: Final = 3.0
"""Seconds that a new connection may take, at most."""
LEAST_SEGMENT_BYTES: Final = 1 << 16
MOST_SEGMENT_BYTES: Final = 1 << 30
ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

OPTIONS: Final[Mapping[str, Any]] = {
    "endpoint": str,
    "region": str,
    "path_style": bool,
    "profile": str,
    "anonymous": bool,
    "ca_file": str,
    "connections": int,
    "timeout_s": float,
    "segment_bytes": int,
    "linger_s": float,
    "rescan_s": float,
    "ttl_s": int,
    "capacity_bytes": int,
    "sign_payload": bool,
    "seal_keys": str,
}
"""The type of each option of a URL."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class S3Settings:
    """A bucket, and how one tier uses it.

    Attributes:
        bucket: its name.
        prefix: begin of all names in the bucket, without a slash at the end.
        endpoint: URL of the store; None for that of the environment, or of AWS.
        region: its region; None for that of the environment, or `us-east-1`.
        path_style: whether the bucket is named in the path of a request, and not in the host; None does so where there
            is an endpoint.
        profile: name of a profile in the files of the AWS command line; None takes what the environment has.
        anonymous: requests are not signed.
        ca_file: certificates of the authorities that may have signed the store's certificate, in PEM, beside those of
            the system.
        connections: requests for payloads at a time in each direction.
        timeout_s: seconds that one request may take, with all attempts.
        segment_bytes: bytes of payloads in an object, at most; a larger block has an object of its own.
        linger_s: seconds that blocks wait for others which go into the same object, if a write does not fill one.
        rescan_s: seconds between two listings of all objects.
        ttl_s: seconds after which an object is deleted; None for never.
        capacity_bytes: bytes of the objects of this namespace, which this tier evicts itself then; None leaves that to
            the store.
        seal_keys: file with the secrets that seal blocks; empty for plain blocks.
        sign_payload: payloads are part of the signature of a request, which takes their SHA-256.
    """

    bucket: str
    prefix: str = PREFIX
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    profile: str | None = None
    anonymous: bool = False
    ca_file: str | None = None
    connections: int = 16
    timeout_s: float = 10.0
    segment_bytes: int = 32 << 20
    linger_s: float = 0.5
    rescan_s: float = 300.0
    ttl_s: int | None = None
    capacity_bytes: int | None = None
    sign_payload: bool = False
    seal_keys: str = ""

    def __post_init__(self) -> None:
        if not _BUCKET.fullmatch(self.bucket):
            raise ConfigError(f"s3: {self.bucket!r} is no name of a bucket: s3://bucket/prefix")
        if not _PREFIX.fullmatch(self.prefix):
            raise ConfigError(
                f"s3: a prefix has letters, digits, '.', '_' and '-' between its slashes, not {self.prefix!r}"
            )
        if self.endpoint is not None:
            _check_endpoint(self.endpoint)
        if not 1 <= self.connections <= 1024:
            raise ConfigError(f"s3: connections must be 1 to 1024, not {self.connections}")
        if not 0 < self.timeout_s <= 3600:
            raise ConfigError(f"s3: timeout_s must be above 0 and at most 3600, not {self.timeout_s:g}")
        if not LEAST_SEGMENT_BYTES <= self.segment_bytes <= MOST_SEGMENT_BYTES:
            raise ConfigError(f"s3: segment_bytes must be 64KiB to 1GiB, not {self.segment_bytes}")
        if not 0 <= self.linger_s <= 10:
            raise ConfigError(f"s3: linger_s must be 0 to 10, not {self.linger_s:g}")
        if not self.rescan_s >= 1:
            raise ConfigError(f"s3: rescan_s must be at least 1, not {self.rescan_s:g}")
        for name, value in (("ttl_s", self.ttl_s), ("capacity_bytes", self.capacity_bytes)):
            if value is not None and value < 1:
                raise ConfigError(f"s3: {name} must be at least 1, not {value}")
        if self.anonymous and self.profile is not None:
            raise ConfigError("s3: anonymous requests have no profile; give one of the two")
        if self.ca_file is not None and not os.access(self.ca_file, os.R_OK):
            raise ConfigError(f"s3: ca_file {self.ca_file!r} cannot be read")

    @property
    def address(self) -> str:
        """The place in words, for logs."""
        at = "" if self.store_url is None else f" at {self.store_url}"
        return f"s3://{self.bucket}/{self.prefix}{at}"

    @property
    def store_url(self) -> str | None:
        """The endpoint; None for that of AWS.

        Raises:
            ConfigError: that of the environment is no URL.
        """
        if self.endpoint is not None:
            return self.endpoint
        found = next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
        if found is not None:
            _check_endpoint(found)
        return found


def settings_of(host: str, path: str, options: Mapping[str, Any]) -> S3Settings:
    """The settings that a URL states.

    Args:
        host: the name of the bucket.
        path: the prefix behind a slash; without one it is `kvortex`.
        options: values of the options that `OPTIONS` has.

    Raises:
        ConfigError: there is no such place.
    """
    if "@" in host:
        raise ConfigError(
            "s3: keys do not belong into a URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give a profile"
        )
    if ":" in host:
        raise ConfigError(f"s3: {host!r} is no bucket; name the server as endpoint: s3://bucket?endpoint=http://{host}")
    return S3Settings(bucket=host, prefix=path.strip("/") or PREFIX, **options)


def _check_endpoint(text: str) -> None:
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"s3: an endpoint is a URL such as https://minio.internal:9000, not {_shown(text)!r}")


def _shown(text: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", text)
