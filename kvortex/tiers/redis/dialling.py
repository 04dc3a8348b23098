"""Connections, set up by redis-py: addresses, TLS, users, databases, clusters, sentinels. Nothing else imports it."""

import contextlib
import ssl
from collections.abc import Iterable, Iterator
from typing import Any

from redis import exceptions
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import Sentinel

from kvortex.tiers.redis.resp import ReplyError, Wire
from kvortex.tiers.redis.servers import NoNode, Place
from kvortex.tiers.redis.settings import RedisSettings


def dial(settings: RedisSettings, place: Place | None = None) -> Wire:
    """Connect; blocking.

    Args:
        settings: of the server.
        place: of a node of a cluster; None for the server that the settings name.

    Raises:
        ReplyError: the server refuses this client, or cannot prove who it is.
        OSError: there is no connection; another attempt may succeed.
    """
    with _mapped():
        connection = _connection_of(settings, place or _place_of(settings))
        connection.connect()
    # All replies have been read. The object of redis-py would close the socket when it is collected.
    sock, connection._sock = connection._sock, None
    return Wire(sock, settings.timeout_s)


class SlotTable:
    """Which node of a cluster has which names, as of now.

    Args:
        settings: of the cluster.
        nodes: nodes that were known before, to be asked beside the seeds.

    Raises:
        ReplyError, OSError: as for `dial`.
    """

    def __init__(self, settings: RedisSettings, nodes: Iterable[Place] = ()) -> None:
        seeds = [ClusterNode(*place) for place in dict.fromkeys([*settings.seeds, *nodes])]
        with _mapped():
            cluster = RedisCluster(
                startup_nodes=seeds,
                require_full_coverage=False,
                **{**_common(settings), **(_of_tls(settings) if settings.tls else {})},
                **({"ssl": True} if settings.tls else {}),
            )
            slots = cluster.nodes_manager.slots_cache
            self._places: dict[int, Place] = {slot: (nodes[0].host, nodes[0].port) for slot, nodes in slots.items()}
            cluster.close()

    @property
    def nodes(self) -> list[Place]:
        """All nodes that have names."""
        return list(dict.fromkeys(self._places.values()))

    def node_of(self, name: bytes) -> Place:
        """The node of a name.

        Raises:
            NoNode: no node has it.
        """
        place = self._places.get(key_slot(name))
        if place is None:
            raise NoNode("the cluster has no node for a part of the names")
        return place


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Raises the errors of redis-py as ours."""
    try:
        yield
    except (exceptions.RedisError, exceptions.RedisClusterException) as error:
        raise _ours(error) from error


def _ours(error: Exception) -> OSError | ReplyError:
    """Our error for one of redis-py, from the only table of these."""
    if isinstance(error, exceptions.RedisClusterException) and isinstance(error.__cause__, exceptions.RedisError):
        error = error.__cause__  # no node could be used: that of the last one
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
        return ReplyError(f"WRONGPASS {error}")
    if isinstance(error, exceptions.NoPermissionError):
        return ReplyError(f"NOPERM {error}")
    if isinstance(error, exceptions.ResponseError):
        return ReplyError(f"ERR {error}")
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return ReplyError(f"TLS {error.__context__.verify_message}")
    return ConnectionError(str(error))


def _place_of(settings: RedisSettings) -> Place:
    """Where the server is now; sentinels are asked, who may have put another one in its place."""
    if not settings.service:
        return settings.host, settings.port
    sentinel = Sentinel(
        settings.seeds,
        sentinel_kwargs={
            "username": settings.sentinel_username,
            "password": settings.sentinel_secret(),
            **({"ssl": True, **_of_tls(settings)} if settings.sentinel_tls else {}),
            **_limits(settings),
        },
    )
    try:
        host, port = sentinel.discover_master(settings.service)
    finally:
        for client in sentinel.sentinels:
            client.close()
    return host, port


def _common(settings: RedisSettings) -> dict[str, Any]:
    return {"username": settings.username, "password": settings.secret(), **_limits(settings)}


def _limits(settings: RedisSettings) -> dict[str, Any]:
    return {
        "socket_timeout": settings.connect_timeout_s,
        "socket_connect_timeout": settings.connect_timeout_s,
        "protocol": 2,  # of version 3 the server may say what nobody has asked for
        "retry": Retry(NoBackoff(), 0),  # the next attempt is ours
    }


def _of_tls(settings: RedisSettings) -> dict[str, Any]:
    return {
        "ssl_ca_certs": settings.ca_file,
        "ssl_certfile": settings.cert_file,
        "ssl_keyfile": settings.key_file or settings.cert_file,
        "ssl_check_hostname": True,
    }


def _connection_of(settings: RedisSettings, place: Place) -> AbstractConnection:
    common = {**_common(settings), "db": settings.db}
    if settings.path:
        return UnixDomainSocketConnection(path=settings.path, **common)
    address = {"host": place[0], "port": place[1], "socket_keepalive": True}
    return SSLConnection(**address, **_of_tls(settings), **common) if settings.tls else Connection(**address, **common)
