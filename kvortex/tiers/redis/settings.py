"""Where a Redis server is and how it is used, from the parts of a URL."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from kvortex.errors import ConfigError

PORT: Final = 6379
SENTINEL_PORT: Final = 26379
CONNECT_S: Final = 3.0
"""Seconds that a server may take for each step of a new connection, at most."""

_EVERYWHERE: Final[Mapping[str, Any]] = {
    "connections": int,
    "timeout_s": float,
    "ttl_s": int,
    "capacity_bytes": int,
    "prefix": str,
    "password_file": str,
    "seal_keys": str,
}
_WITH_TLS: Final[Mapping[str, Any]] = {**_EVERYWHERE, "ca_file": str, "cert_file": str, "key_file": str}
_WITH_SENTINELS: Final[Mapping[str, Any]] = {"sentinel_username": str, "sentinel_password_file": str}
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "redis": _EVERYWHERE,
    "rediss": _WITH_TLS,
    "unix": {**_EVERYWHERE, "db": int},
    "redis+cluster": _EVERYWHERE,
    "rediss+cluster": _WITH_TLS,
    "redis+sentinel": {**_EVERYWHERE, **_WITH_SENTINELS},
    "rediss+sentinel": {**_WITH_TLS, **_WITH_SENTINELS, "sentinel_tls": bool},
}
"""The schemes of URLs, and the type of each option that they take."""


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """A server, and how one tier uses it.

    Attributes:
        host: its name or address; empty for a Unix socket.
        port: its TCP port.
        path: its Unix socket; empty for TCP.
        seeds: nodes of a cluster, or sentinels, each with its port; empty for one server.
        service: name by which the sentinels know the server; empty for a cluster.
        sentinel_username: user of the sentinels' access control list; None for their default user.
        sentinel_password_file: file with this user's password, read each time; None if they ask for none.
        sentinel_tls: whether the connections to the sentinels are encrypted, too, with the same certificates.
        username: user of the server's access control list; None for the default user.
        password: of this user; None if it needs none.
        password_file: file with the password, read for each connection, so that it may change; None if there is none.
        db: number of the database.
        tls: whether the connection is encrypted, and the server's certificate checked.
        ca_file: certificates of the authorities that may have signed it, in PEM; None for those of the system.
        cert_file: certificate of this client in PEM; None if the server asks for none.
        key_file: its private key in PEM; None if it is in `cert_file`.
        connections: blocks that move at a time in each direction, each on a connection of its own.
        timeout_s: seconds that one block, one look-up or one connection may take.
        ttl_s: seconds after which the server forgets a block that nobody uses; None for never.
        capacity_bytes: bytes of this namespace's values, which this tier evicts itself then; None leaves that to the
            server.
        prefix: begin of all names in the server.
        seal_keys: file with the secrets that seal blocks; empty for plain blocks.
    """

    host: str = ""
    port: int = PORT
    path: str = ""
    seeds: tuple[tuple[str, int], ...] = ()
    service: str = ""
    sentinel_username: str | None = None
    sentinel_password_file: str | None = None
    sentinel_tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    db: int = 0
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    connections: int = 4
    timeout_s: float = 5.0
    ttl_s: int | None = None
    capacity_bytes: int | None = None
    prefix: str = "kvortex:"
    seal_keys: str = ""

    def __post_init__(self) -> None:
        if [bool(self.host), bool(self.path), bool(self.seeds)].count(True) != 1:
            raise ConfigError("name a server: redis://host:6379, rediss://host:6379 or unix:///run/redis.sock")
        if not 1 <= self.connections <= 256:
            raise ConfigError(f"redis: connections must be 1 to 256, not {self.connections}")
        if not 0 < self.timeout_s <= 3600:
            raise ConfigError(f"redis: timeout_s must be above 0 and at most 3600, not {self.timeout_s:g}")
        for name, value in (("ttl_s", self.ttl_s), ("capacity_bytes", self.capacity_bytes)):
            if value is not None and value < 1:
                raise ConfigError(f"redis: {name} must be at least 1, not {value}")
        if self.db < 0:
            raise ConfigError(f"redis: the number of a database is not negative: {self.db}")
        if not self.prefix.isprintable() or not self.prefix.isascii() or " " in self.prefix:
            raise ConfigError(f"redis: prefix must be printable ASCII without spaces, not {self.prefix!r}")
        if self.password is not None and self.password_file is not None:
            raise ConfigError("redis: give the password in the URL or as password_file, not both")
        for name in ("password_file", "sentinel_password_file", "ca_file", "cert_file", "key_file"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"redis: {name} {path!r} cannot be read")

    @property
    def address(self) -> str:
        """The server in words, for logs."""
        return self.path or ",".join(_shown(*place) for place in self.seeds or [(self.host, self.port)])

    @property
    def connect_timeout_s(self) -> float:
        """Seconds that each step of a new connection may take."""
        return min(CONNECT_S, self.timeout_s)

    def secret(self) -> str | None:
        """The password of this moment.

        Raises:
            OSError: its file cannot be read.
        """
        return self.password if self.password_file is None else _read_secret(self.password_file)

    def sentinel_secret(self) -> str | None:
        """The sentinels' password of this moment.

        Raises:
            OSError: its file cannot be read.
        """
        return None if self.sentinel_password_file is None else _read_secret(self.sentinel_password_file)


def _read_secret(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def settings_of(scheme: str, host: str, path: str, options: Mapping[str, Any]) -> RedisSettings:
    """The settings that a URL states.

    Args:
        scheme: one of `OPTIONS`.
        host: user, password, host and port, as written.
        path: the number of the database behind a slash, or the path of the socket.
        options: values of the options that `OPTIONS` has for this scheme.

    Raises:
        ConfigError: there is no such server.
    """
    user, _, places = host.rpartition("@")
    username, _, password = user.partition(":")
    known = {"username": unquote(username) or None, "password": unquote(password) or None, **options}
    if scheme == "unix":
        if places:
            raise ConfigError(f"unix: names a host, {places!r}; a socket has three slashes: unix:///run/redis.sock")
        return RedisSettings(path=path, **known)
    kind, tls = scheme.partition("+")[2], scheme.startswith("rediss")
    found = [_place_of(text, SENTINEL_PORT if kind == "sentinel" else PORT) for text in places.split(",") if text]
    if kind == "cluster":
        if path.strip("/"):
            raise ConfigError(f"redis: a cluster has one database, so nothing follows its hosts: {path!r}")
        return RedisSettings(seeds=tuple(found), tls=tls, **known)
    if kind == "sentinel":
        service, _, database = path.strip("/").partition("/")
        if not service:
            raise ConfigError("redis: name the service behind the sentinels: redis+sentinel://host:26379/service")
        return RedisSettings(seeds=tuple(found), service=service, db=_db_of(database), tls=tls, **known)
    if len(found) != 1:
        raise ConfigError("name one server: redis://host:6379, rediss://host:6379 or unix:///run/redis.sock")
    return RedisSettings(host=found[0][0], port=found[0][1], db=_db_of(path), tls=tls, **known)


def _place_of(text: str, port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        return parts.hostname or "", port if parts.port is None else parts.port
    except ValueError as error:
        raise ConfigError(f"redis: no host and port: {error}") from error


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _db_of(path: str) -> int:
    text = path.strip("/")
    if text and not (text.isascii() and text.isdigit()):
        raise ConfigError(f"redis: what follows the host is the number of a database, not {path!r}")
    return int(text or 0)
