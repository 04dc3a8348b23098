"""Commands at the servers that have the names, also where these have moved or are about to move."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from kvortex.tiers.base import Cause
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.redis.connections import Connections
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.resp import ReplyError, Wire, command, commands, integer_of
from kvortex.tiers.redis.servers import Servers

HOPS: Final = 3
"""Servers that are asked for a name, at most, when each of them names another one."""
ASKING: Final = command(b"ASKING")

Reply = TypeVar("Reply")


class Routes:
    """Sends commands to where their names are.

    A node of a cluster that does not have a name any more answers with the address of the one that has it (MOVED).
    While a slot is on its way, it does so for the names that it lacks (ASK), and the other one serves them only if it
    is told that somebody was sent (ASKING).

    Args:
        servers: have the connections.
        log: is told what a server refuses.
    """

    def __init__(self, servers: Servers, log: FailureLog) -> None:
        self._servers = servers
        self._log = log

    def exchange(self, name: bytes, exchange: Callable[[Wire], Reply]) -> Reply:
        """What `exchange` returns for the server that has a name; it may be called for several.

        Raises:
            StoreFailure: a server cannot be asked.
        """
        server, is_sent = self._servers.of(name), False
        for _ in range(HOPS):
            with self._doubting(), server.exchange() as wire:
                if is_sent:
                    wire.send(ASKING)
                    wire.reply()
                reply = exchange(wire)
            if not isinstance(reply, ReplyError) or not _is_elsewhere(reply):
                break
            server, is_sent = self._at(reply, name), reply.code == "ASK"
        return reply

    def numbers(self, command_name: bytes, names: Sequence[bytes], *further: bytes) -> list[int]:
        """The number that a command answers for each name; 0 for a value of another type.

        If one server of several fails, the answer is 0 for its names.

        Raises:
            StoreFailure: no server has answered, or one refuses.
        """
        if not names:
            return []
        replies: dict[bytes, int | ReplyError] = {}
        failure = None
        parts = [(server, of_it, False) for server, of_it in self._servers.split(names).items()]
        for _ in range(HOPS):
            for server, of_it, is_sent in parts:
                try:
                    with self._doubting(), server.exchange() as wire:
                        replies.update(_ask(wire, command_name, of_it, further, is_sent))
                except StoreFailure as error:
                    failure = error
            parts = self._elsewhere(replies)
        if failure is not None and not replies:
            raise failure
        for reply in replies.values():
            if isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
                raise self.failure(reply)
        numbers = {name: 0 if isinstance(reply, ReplyError) else reply for name, reply in replies.items()}
        return [numbers.get(name, 0) for name in names]

    def failure(self, reply: ReplyError) -> StoreFailure:
        """The failure that a refusal means; it is logged."""
        failure = StoreFailure(reply)
        if failure.cause is Cause.READ_ONLY:
            self._servers.doubt()  # it has become a replica
        self._log.failed(failure)
        return failure

    # -- inside ------------------------------------------------------------------------------------

    def _elsewhere(self, replies: dict[bytes, int | ReplyError]) -> list[tuple[Connections, Sequence[bytes], bool]]:
        """Take out the replies that name another server; returns these servers, with their names."""
        parts: dict[tuple[Connections, bool], list[bytes]] = {}
        for name, reply in list(replies.items()):
            if isinstance(reply, ReplyError) and _is_elsewhere(reply):
                parts.setdefault((self._at(reply, name), reply.code == "ASK"), []).append(name)
                del replies[name]
        return [(server, names, is_sent) for (server, is_sent), names in parts.items()]

    def _at(self, reply: ReplyError, name: bytes) -> Connections:
        if reply.code == "MOVED":
            self._servers.doubt()
        return self._servers.at(str(reply).rpartition(" ")[2], name)

    @contextlib.contextmanager
    def _doubting(self) -> Iterator[None]:
        """After a failure another server may have taken the place of this one."""
        try:
            yield
        except StoreFailure:
            self._servers.doubt()
            raise


def _ask(
    wire: Wire, command_name: bytes, names: Sequence[bytes], further: Sequence[bytes], is_sent: bool
) -> Iterator[tuple[bytes, int | ReplyError]]:
    if is_sent:
        wire.send(b"".join(ASKING + commands(command_name, [name], *further) for name in names))
        lines = wire.lines(2 * len(names))[1::2]
    else:
        wire.send(commands(command_name, names, *further))
        lines = wire.lines(len(names))
    return zip(names, map(integer_of, lines), strict=True)


def _is_elsewhere(reply: ReplyError) -> bool:
    return reply.code in ("MOVED", "ASK")
