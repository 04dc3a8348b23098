"""Blocks as values of a server: blocking calls, for threads. A value is a frame (`kvortex.tiers.frame`)."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, WriteOutcome, WriteRequest, as_bytes
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.redis.connections import Connections
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.lookup import BlockWrite, LookUp
from kvortex.tiers.redis.resp import CRLF, ReplyError, Wire, command
from kvortex.tiers.redis.routes import Routes
from kvortex.tiers.redis.servers import Servers
from kvortex.tiers.redis.settings import RedisSettings
from kvortex.tiers.sealing import Framing
from kvortex.tiers.store_index import Admission, IndexedBlock, StoreIndex
from kvortex.types import BLOCK_HASH_BYTES, MissReason, SaveOutcome

KEYS_AT_A_TIME: Final = 4096
"""Keys of one round trip. Their commands take 700 KiB, and the server has to keep all answers."""
SCAN_COUNT: Final = 1000
KNOWN_BLOCKS: Final = 1 << 18
"""Blocks that are remembered where the server evicts; it does not tell which are gone."""
TOUCH_S: Final = 60.0
"""Seconds between two reports of a block's use to the server, at least."""
LONG_AGO_S: Final = 1.0
WRITES_A_LOOK_UP: Final = 32
"""Blocks of a call that are looked up together, before the first of them is written."""

Reply = TypeVar("Reply")


class RedisBlocks:
    """The blocks of one namespace in a server.

    Args:
        settings: of the server.
        framing: how blocks are stored.
        servers: have the connections.
        index: remembers what is there.
        counters: count what was removed.
        log: is told what the server refuses.
    """

    def __init__(
        self,
        settings: RedisSettings,
        framing: Framing,
        servers: Servers,
        index: StoreIndex,
        counters: TierCounters,
        log: FailureLog,
    ) -> None:
        self._settings = settings
        self._framing = framing
        self._prefix = f"{settings.prefix}{framing.namespace.hex()}:".encode()
        self._servers = servers
        self._index = index
        self._counters = counters
        self._routes = Routes(servers, log)
        self._ttl = b"" if settings.ttl_s is None else b"%d" % settings.ttl_s
        self._touch_s = TOUCH_S if settings.ttl_s is None else min(TOUCH_S, settings.ttl_s / 4)

    def name_of(self, key: bytes) -> bytes:
        """The name of a block's value."""
        return self._prefix + key.hex().encode()

    # -- asking ------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each block's value, 0 where there is none; one round trip for up to `KEYS_AT_A_TIME`.

        Raises:
            StoreFailure: the server cannot be asked.
        """
        sizes: list[int] = []
        for start in range(0, len(keys), KEYS_AT_A_TIME):
            batch = keys[start : start + KEYS_AT_A_TIME]
            known = [self._index.get(key) for key in batch]
            with self._index.watching() as changed:
                found = [self._if_block(size) for size in self._numbers(b"STRLEN", batch)]
                self._index.merge([(key, seen(size)) for key, size in zip(batch, found, strict=True) if size], changed)
            for key, before, size in zip(batch, known, found, strict=True):
                if not size:
                    self._index.discard(key, before)
            sizes += found
        self._forget()
        return sizes

    def _if_block(self, nbytes: int) -> int:
        """The same, or 0 for a value that is too short for a block, and so is none."""
        return nbytes if nbytes > self._framing.header_bytes else 0

    def servers(self) -> list[Connections]:
        """The servers that `scan` takes.

        Raises:
            StoreFailure: they are not known.
        """
        return self._servers.all()

    def scan(self, server: Connections, cursor: bytes) -> tuple[bytes, list[bytes]]:
        """Keys of some blocks from one server, and the cursor of the next ones, which is 0 at the end.

        Raises:
            StoreFailure: the server cannot be asked.
        """
        pattern = re.sub(rb"([\\*?\[\]^-])", rb"\\\1", self._prefix) + b"*"
        with server.exchange() as wire:
            wire.send(command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % SCAN_COUNT))
            reply = wire.reply()
        if isinstance(reply, ReplyError):
            raise self._routes.failure(reply)
        cursor, names = reply
        return cursor, list(self._keys_in(names))

    def _keys_in(self, names: Sequence[bytes]) -> Iterator[bytes]:
        for name in names:
            text = name.removeprefix(self._prefix)
            if len(text) == 2 * BLOCK_HASH_BYTES and re.fullmatch(rb"[0-9a-f]+", text):
                yield bytes.fromhex(text.decode())

    def info(self) -> dict[str, str]:
        """What a server says of its memory; nothing if this user may not ask.

        Raises:
            StoreFailure: the server cannot be asked.
        """
        with self._servers.all()[0].exchange() as wire:
            wire.send(command(b"INFO", b"memory"))
            reply = wire.reply()
        text = "" if isinstance(reply, ReplyError) else reply.decode("utf-8", "replace")
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    # -- moving ------------------------------------------------------------------------------------

    def read(self, request: ReadRequest) -> ReadOutcome:
        """Read one block straight into its buffer. Every failure becomes an outcome."""
        known = self._index.get(request.key)
        try:
            with self._index.watching() as changed:
                reply = self._routes.exchange(self.name_of(request.key), partial(self._get, request))
                outcome, nbytes = (self._refused(reply), 0) if isinstance(reply, ReplyError) else reply
                if outcome.reason is None:
                    self._index.use(request.key, seen(nbytes), changed, float("inf"), request.used_s)
                elif outcome.reason is MissReason.AUTH and nbytes:
                    self._index.condemn(request.key, seen(nbytes), changed)
            if outcome.cause is Cause.CORRUPT:
                self._remove_corrupt(request.key)
        except StoreFailure as failure:
            return ReadOutcome(MissReason.TRANSFER_FAILED, cause=failure.cause, detail=str(failure))
        if outcome.cause is Cause.ABSENT:
            self._index.discard(request.key, known)
            reason = MissReason.NEVER_STORED if known is None else MissReason.EVICTED
            return ReadOutcome(reason, cause=Cause.ABSENT)
        if outcome.cause is Cause.UNKNOWN_VERSION:
            self._index.ignore(request.key)
        return outcome

    def _get(self, request: ReadRequest, wire: Wire) -> tuple[ReadOutcome, int] | ReplyError:
        """The outcome, and the bytes of the value; or why the server gives none."""
        target = as_bytes(request.buffer)
        name = self.name_of(request.key)
        renewal = command(b"EXPIRE", name, self._ttl) if self._ttl else b""
        wire.send(command(b"GET", name) + renewal)
        # Normally the payload fills the buffer: then the first bytes are taken without any of the payload.
        head_bytes = self._framing.header_bytes
        nbytes = wire.bulk_bytes(len(b"$%d\r\n" % (head_bytes + target.size)) + head_bytes)
        reply: tuple[ReadOutcome, int] | ReplyError
        if nbytes is None:
            reply = ReadOutcome(MissReason.NEVER_STORED, cause=Cause.ABSENT), 0
        elif isinstance(nbytes, ReplyError):
            reply = nbytes
        else:
            reply = self._receive(wire, request.key, nbytes, target), nbytes
        if renewal and not wire.is_spoiled:
            wire.reply()  # a user that may only read renews nothing
        return reply

    def _receive(self, wire: Wire, key: bytes, nbytes: int, target: Any) -> ReadOutcome:
        framing = self._framing
        wire.is_spoiled = True  # until all of the value was received
        header = framing.decode(wire.take(min(framing.header_bytes, nbytes)), key)
        if isinstance(header, ReadOutcome):
            return header
        if header.payload_bytes != nbytes - framing.header_bytes:
            return framing.flawed("the value's length is not what its header says")
        if header.payload_bytes > target.size:
            detail = f"a payload of {header.payload_bytes} bytes does not fit a buffer of {target.size}"
            return ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.BUFFER_TOO_SMALL, detail=detail)
        payload = target[: header.payload_bytes]
        stored = framing.landing(payload)
        end = bytearray(len(CRLF))
        wire.fill(stored.data, memoryview(end))
        wire.is_spoiled = end != CRLF
        return framing.open(header, stored, payload)

    def _refused(self, reply: ReplyError) -> ReadOutcome:
        if reply.code == "WRONGTYPE":
            return self._framing.flawed(str(reply))
        raise self._routes.failure(reply)

    def writes(self, requests: Sequence[WriteRequest]) -> list[BlockWrite]:
        """The blocks of a call as `write` takes them."""
        writes = []
        for start in range(0, len(requests), WRITES_A_LOOK_UP):
            part = requests[start : start + WRITES_A_LOOK_UP]
            lookup = LookUp(partial(self.find, [request.key for request in part]))
            writes += [BlockWrite(request, lookup) for request in part]
        return writes

    def write(self, write: BlockWrite) -> WriteOutcome:
        """Write one block straight from its payload. Every failure becomes an outcome."""
        try:
            write.lookup.ensure()  # another host may have stored it, and the server may have evicted it
            return self._write(write.request)
        except StoreFailure as failure:
            outcome = SaveOutcome.NO_SPACE if failure.cause is Cause.NO_SPACE else SaveOutcome.FAILED
            return WriteOutcome(outcome, cause=failure.cause, detail=str(failure))

    def _write(self, request: WriteRequest) -> WriteOutcome:
        key, payload = request.key, as_bytes(request.payload)
        if self._index.ignores(key):
            return WriteOutcome(SaveOutcome.FAILED, cause=Cause.UNKNOWN_VERSION)
        admission, victims = self._index.reserve(key, self._framing.header_bytes + payload.size, request.used_s)
        if admission is Admission.NO_SPACE:
            return WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE)
        if admission is not Admission.RESERVED:
            is_stored = admission is Admission.STORED
            return WriteOutcome(SaveOutcome.ALREADY_STORED if is_stored else SaveOutcome.PENDING)
        try:
            self._remove_victims([victim for victim, _ in victims])
            self._set(request)
        except BaseException:
            self._index.abort(key)
            raise
        self._index.commit(key, "")
        self._forget()
        return WriteOutcome(SaveOutcome.STORED)

    def _set(self, request: WriteRequest) -> None:
        header, payload = self._framing.encode(request)
        name, expiry = self.name_of(request.key), (b"EX", self._ttl) if self._ttl else ()
        begin = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (3 + len(expiry), len(name), name)
        begin += b"$%d\r\n%b" % (len(header) + payload.size, header)
        end = CRLF + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in expiry)

        def send(wire: Wire) -> Any:
            wire.send(begin, payload.data, end)
            return wire.reply()

        reply = self._routes.exchange(name, send)
        if isinstance(reply, ReplyError):
            raise self._routes.failure(reply)

    # -- removing and using ------------------------------------------------------------------------

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Delete blocks; True for each that was there.

        Raises:
            StoreFailure: the server does not say that they are gone.
        """
        claimed = [self._index.claim(key) for key in keys]
        mine = [key for key, is_mine in zip(keys, claimed, strict=True) if is_mine]
        try:
            gone = iter(self._numbers(b"UNLINK", mine))
        finally:
            for key in mine:
                self._index.removed(key)
        return [is_mine and next(gone) > 0 for is_mine in claimed]

    def _remove_victims(self, victims: Sequence[bytes]) -> None:
        try:
            self._numbers(b"UNLINK", victims)
        finally:
            for key in victims:
                self._index.removed(key)

    def _remove_corrupt(self, key: bytes) -> None:
        if self._index.claim(key):
            self._remove_victims([key])
            self._counters.record_removed_corrupt()

    def touch(self, keys: Sequence[bytes], used_s: Sequence[float]) -> None:
        """Count blocks as used, in the server as well; those that it has lost are forgotten.

        Raises:
            StoreFailure: the server cannot be told.
        """
        due = [(key, self._index.get(key)) for key, _ in self._index.touch(keys, used_s, self._touch_s)]
        words = (b"EXPIRE", self._ttl) if self._ttl else (b"TOUCH",)
        there = self._numbers(words[0], [key for key, _ in due], *words[1:])
        for (key, entry), is_there in zip(due, there, strict=True):
            if not is_there:
                self._index.discard(key, entry)

    # -- inside ------------------------------------------------------------------------------------

    def _numbers(self, name: bytes, keys: Sequence[bytes], *further: bytes) -> list[int]:
        return self._routes.numbers(name, [self.name_of(key) for key in keys], *further)

    def _forget(self) -> None:
        if self._settings.capacity_bytes is None:
            self._index.forget_beyond(KNOWN_BLOCKS)


def seen(nbytes: int, last_use_s: float = LONG_AGO_S) -> IndexedBlock:
    """The entry of a value of so many bytes."""
    return IndexedBlock("", nbytes, last_use_s)
