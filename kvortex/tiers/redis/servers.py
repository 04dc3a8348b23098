"""Which server has which name: one has all, or each node of a cluster has its slots."""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeAlias

from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.redis.connections import Connections, Pauses
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.resp import ReplyError, Wire

Place: TypeAlias = tuple[str, int]
"""Host and port."""

TABLE_S: Final = 1.0
"""Seconds for which a table of slots is not asked for again, whatever is wrong with it."""


class NoNode(ConnectionError):
    """No node of a cluster has a name."""


class Table(Protocol):
    """Which node has which name; `SlotTable` is one. `node_of` raises `NoNode`."""

    @property
    def nodes(self) -> Sequence[Place]: ...

    def node_of(self, name: bytes) -> Place: ...


class Servers(ABC):
    """The connections to the servers of a tier. All methods may be called by any thread."""

    @abstractmethod
    def of(self, name: bytes) -> Connections:
        """The connections to the server of a name.

        Raises:
            StoreFailure: it is not known.
        """

    @abstractmethod
    def at(self, address: str, name: bytes) -> Connections:
        """The connections to the server that another one has named for a name, as `host:port`.

        Raises:
            StoreFailure: there is no such server.
        """

    @abstractmethod
    def split(self, names: Sequence[bytes]) -> dict[Connections, Sequence[bytes]]:
        """Names by their servers; those that no server has are left out.

        Raises:
            StoreFailure: the servers are not known.
        """

    @abstractmethod
    def all(self) -> list[Connections]:
        """The connections to all servers.

        Raises:
            StoreFailure: they are not known.
        """

    @abstractmethod
    def doubt(self) -> None:
        """A server has failed, or does not have a name: it may be another one's now."""

    @abstractmethod
    def abort(self) -> None:
        """See `Connections.abort`."""

    @property
    @abstractmethod
    def num_open(self) -> int:
        """Connections that there are."""


class OneServer(Servers):
    """One server has all names."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def of(self, name: bytes) -> Connections:
        return self._connections

    def at(self, address: str, name: bytes) -> Connections:
        return self._connections  # it is no cluster for us

    def split(self, names: Sequence[bytes]) -> dict[Connections, Sequence[bytes]]:
        return {self._connections: names}

    def all(self) -> list[Connections]:
        return [self._connections]

    def doubt(self) -> None:
        self._connections.close_idle()  # sentinels may have put another server in its place

    def abort(self) -> None:
        self._connections.abort()

    @property
    def num_open(self) -> int:
        return self._connections.num_open


class Cluster(Servers):
    """The nodes of a cluster. The table of their slots is asked for when it is in doubt.

    Args:
        open_table: asks for the table, given the nodes that are known; it raises `OSError` or `ReplyError`.
        dial: makes a connection to a node.
        log: is told of all failures.
        clock: returns seconds.
    """

    def __init__(
        self,
        open_table: Callable[[Iterable[Place]], Table],
        dial: Callable[[Place], Wire],
        log: FailureLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_table = open_table
        self._dial = dial
        self._log = log
        self._clock = clock
        self._pauses = Pauses(clock)
        self._lock = threading.Lock()  # of the fields
        self._asking = threading.Lock()  # held while the table is asked for
        self._table: Table | None = None
        self._asked_s = 0.0
        self._is_doubted = self._is_closed = False
        self._of_node: dict[Place, Connections] = {}
        self._named: set[Place] = set()  # by other nodes; they are kept although the table may not have them yet

    def of(self, name: bytes) -> Connections:
        try:
            return self._node(self._current().node_of(name))
        except (OSError, ReplyError) as error:
            self.doubt()
            raise self._failure(error) from error

    def at(self, address: str, name: bytes) -> Connections:
        host, _, port = address.rpartition(":")
        try:
            place = host or self._current().node_of(name)[0], int(port)  # without a host it is that of the node itself
            with self._lock:
                self._named.add(place)
            return self._node(place)
        except ValueError:
            raise self._failure(ConnectionError(f"no address of a node: {address[:80]!r}")) from None
        except (OSError, ReplyError) as error:
            raise self._failure(error) from error

    def split(self, names: Sequence[bytes]) -> dict[Connections, Sequence[bytes]]:
        parts: dict[Connections, list[bytes]] = {}
        try:
            table = self._current()
            for name in names:
                with contextlib.suppress(NoNode):
                    parts.setdefault(self._node(table.node_of(name)), []).append(name)
        except (OSError, ReplyError) as error:
            raise self._failure(error) from error
        return {**parts}

    def all(self) -> list[Connections]:
        try:
            return [self._node(place) for place in self._current().nodes]
        except (OSError, ReplyError) as error:
            raise self._failure(error) from error

    def doubt(self) -> None:
        with self._lock:
            self._is_doubted = True

    def abort(self) -> None:
        with self._lock:
            self._is_closed = True
            for connections in self._of_node.values():
                connections.abort()

    @property
    def num_open(self) -> int:
        with self._lock:
            return sum(connections.num_open for connections in self._of_node.values())

    # -- inside ------------------------------------------------------------------------------------

    def _current(self) -> Table:
        table = self._table
        if table is not None and (not self._is_stale() or not self._asking.acquire(blocking=False)):
            return table  # it is right, or another thread asks just now, which may take long
        if table is None:
            self._asking.acquire()
        try:
            return self._asked_anew()
        finally:
            self._asking.release()

    def _asked_anew(self) -> Table:
        if self._table is not None and not self._is_stale():
            return self._table
        try:
            self._pauses.check()
            table = self._open_table([] if self._table is None else self._table.nodes)
        except (OSError, ReplyError) as error:
            self._pauses.failed(error)
            if self._table is None:
                raise
            return self._table
        if self._pauses.worked():
            self._log.works_again()
        with self._lock:
            self._table, self._is_doubted, self._asked_s = table, False, self._clock()
            self._named.difference_update(table.nodes)
            gone = [self._of_node.pop(place) for place in set(self._of_node) - set(table.nodes) - self._named]
        for connections in gone:
            connections.abort()
        return table

    def _is_stale(self) -> bool:
        with self._lock:
            return self._is_doubted and self._clock() - self._asked_s >= TABLE_S

    def _node(self, place: Place) -> Connections:
        with self._lock:
            if self._is_closed:
                raise ConnectionAbortedError("the tier was closed")
            if place not in self._of_node:
                self._of_node[place] = Connections(lambda: self._dial(place), self._log, self._clock)
            return self._of_node[place]

    def _failure(self, error: OSError | ReplyError) -> StoreFailure:
        failure = StoreFailure(error)
        if not self._is_closed:
            self._log.failed(failure)
        return failure
