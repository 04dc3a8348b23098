"""Connections to a server, set up by redis-py: addresses, TLS, users and databases. Nothing else imports it."""

import ssl

from redis import exceptions
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry

from kvortex.tiers.redis.resp import ReplyError, Wire
from kvortex.tiers.redis.settings import RedisSettings


def dial(settings: RedisSettings) -> Wire:
    """Connect; blocking.

    Raises:
        ReplyError: the server refuses this client, or cannot prove who it is.
        OSError: there is no connection; another attempt may succeed.
    """
    connection = _connection_of(settings)
    try:
        connection.connect()
    except (exceptions.AuthenticationError, exceptions.AuthorizationError) as error:
        raise ReplyError(f"WRONGPASS {error}") from error
    except exceptions.NoPermissionError as error:
        raise ReplyError(f"NOPERM {error}") from error
    except exceptions.ResponseError as error:
        raise ReplyError(f"ERR {error}") from error
    except exceptions.RedisError as error:
        if isinstance(error.__context__, ssl.SSLCertVerificationError):
            raise ReplyError(f"TLS {error.__context__.verify_message}") from error
        raise ConnectionError(str(error)) from error
    # All replies have been read. The object of redis-py would close the socket when it is collected.
    sock, connection._sock = connection._sock, None
    return Wire(sock, settings.timeout_s)


def _connection_of(settings: RedisSettings) -> AbstractConnection:
    common = {
        "db": settings.db,
        "username": settings.username,
        "password": settings.secret(),
        "socket_timeout": settings.connect_timeout_s,
        "socket_connect_timeout": settings.connect_timeout_s,
        "protocol": 2,  # of version 3 the server may say what nobody has asked for
        "retry": Retry(NoBackoff(), 0),
    }
    if settings.path:
        return UnixDomainSocketConnection(path=settings.path, **common)
    place = {"host": settings.host, "port": settings.port, "socket_keepalive": True}
    if not settings.tls:
        return Connection(**place, **common)
    return SSLConnection(
        ssl_ca_certs=settings.ca_file,
        ssl_certfile=settings.cert_file,
        ssl_keyfile=settings.key_file or settings.cert_file,
        ssl_check_hostname=True,
        **place,
        **common,
    )
