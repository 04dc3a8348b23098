"""Blocks as values of a server: blocking calls, for threads. A value is a frame (`kvortex.tiers.frame`)."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, WriteOutcome, WriteRequest, as_bytes
from kvortex.tiers.counters import TierCounters
from kvortex.tiers.failure_log import FailureLog
from kvortex.tiers.frame import SHORT_HEADER_BYTES, FrameHeader, decode_header, encode_header
from kvortex.tiers.payload import payload_digest
from kvortex.tiers.redis.connections import Connections
from kvortex.tiers.redis.failures import StoreFailure
from kvortex.tiers.redis.resp import CRLF, ReplyError, Wire, command, commands, integer_of
from kvortex.tiers.redis.servers import Servers
from kvortex.tiers.redis.settings import RedisSettings
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
ATTEMPTS: Final = 2

Reply = TypeVar("Reply")


class RedisBlocks:
    """The blocks of one namespace in a server.

    Args:
        settings: of the server.
        namespace: digest of the namespace, 32 bytes.
        servers: have the connections.
        index: remembers what is there.
        counters: count what was removed.
        log: is told what the server refuses.
    """

    def __init__(
        self,
        settings: RedisSettings,
        namespace: bytes,
        servers: Servers,
        index: StoreIndex,
        counters: TierCounters,
        log: FailureLog,
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._prefix = f"{settings.prefix}{namespace.hex()}:".encode()
        self._servers = servers
        self._index = index
        self._counters = counters
        self._log = log
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
            with self._index.watching() as removed:
                found = self._numbers(b"STRLEN", batch)
                self._index.merge([(key, seen(size)) for key, size in zip(batch, found, strict=True) if size], removed)
            for key, before, size in zip(batch, known, found, strict=True):
                if not size:
                    self._index.discard(key, before)
            sizes += found
        self._forget()
        return sizes

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
            raise self._failure(reply)
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
            with self._index.watching() as removed:
                reply = self._at_its_server(self.name_of(request.key), partial(self._get, request))
                outcome = reply if isinstance(reply, ReadOutcome) else self._refused(reply)
                if outcome.reason is None:
                    entry = seen(SHORT_HEADER_BYTES + outcome.payload_bytes)
                    self._index.use(request.key, entry, removed, float("inf"), request.used_s)
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

    def _get(self, request: ReadRequest, wire: Wire) -> ReadOutcome | ReplyError:
        target = as_bytes(request.buffer)
        name = self.name_of(request.key)
        renewal = command(b"EXPIRE", name, self._ttl) if self._ttl else b""
        wire.send(command(b"GET", name) + renewal)
        # Normally the payload fills the buffer: then the first bytes are taken without any of the payload.
        nbytes = wire.bulk_bytes(len(b"$%d\r\n" % (SHORT_HEADER_BYTES + target.size)) + SHORT_HEADER_BYTES)
        outcome: ReadOutcome | ReplyError
        if nbytes is None:
            outcome = ReadOutcome(MissReason.NEVER_STORED, cause=Cause.ABSENT)
        elif isinstance(nbytes, ReplyError):
            outcome = nbytes
        else:
            outcome = self._receive(wire, request.key, nbytes, target)
        if renewal and not wire.is_spoiled:
            wire.reply()  # a user that may only read renews nothing
        return outcome

    def _receive(self, wire: Wire, key: bytes, nbytes: int, target: Any) -> ReadOutcome:
        wire.is_spoiled = True  # until all of the value was received
        if nbytes < SHORT_HEADER_BYTES:
            return _corrupt("the value is shorter than a header")
        header = decode_header(wire.take(SHORT_HEADER_BYTES), self._namespace, key, SHORT_HEADER_BYTES)
        if header is Cause.UNKNOWN_VERSION:
            return ReadOutcome(MissReason.NEVER_STORED, cause=header)
        if not isinstance(header, FrameHeader) or header.payload_bytes != nbytes - SHORT_HEADER_BYTES:
            return _corrupt("the header is damaged, another block's, or does not fit the value's length")
        if header.payload_bytes > target.size:
            detail = f"a payload of {header.payload_bytes} bytes does not fit a buffer of {target.size}"
            return ReadOutcome(MissReason.TRANSFER_FAILED, cause=Cause.BUFFER_TOO_SMALL, detail=detail)
        payload = target[: header.payload_bytes]
        end = bytearray(len(CRLF))
        wire.fill(payload.data, memoryview(end))
        wire.is_spoiled = end != CRLF
        if payload_digest(payload) != header.digest:
            return _corrupt("the payload's digest differs")
        return ReadOutcome(None, header.payload_bytes, header.raw_bytes, header.codec, header.digest)

    def _refused(self, reply: ReplyError) -> ReadOutcome:
        if reply.code == "WRONGTYPE":
            return _corrupt(str(reply))
        raise self._failure(reply)

    def write(self, request: WriteRequest) -> WriteOutcome:
        """Write one block straight from its payload. Every failure becomes an outcome."""
        try:
            return self._write(request)
        except StoreFailure as failure:
            outcome = SaveOutcome.NO_SPACE if failure.cause is Cause.NO_SPACE else SaveOutcome.FAILED
            return WriteOutcome(outcome, cause=failure.cause, detail=str(failure))

    def _write(self, request: WriteRequest) -> WriteOutcome:
        key, payload = request.key, as_bytes(request.payload)
        self.find([key])  # another host may have stored it, and the server may have evicted it
        admission, victims = self._index.reserve(key, SHORT_HEADER_BYTES + payload.size, request.used_s)
        if admission is Admission.NO_SPACE:
            return WriteOutcome(SaveOutcome.NO_SPACE, cause=Cause.NO_SPACE)
        if admission is not Admission.RESERVED:
            is_stored = admission is Admission.STORED
            return WriteOutcome(SaveOutcome.ALREADY_STORED if is_stored else SaveOutcome.PENDING)
        try:
            self._remove_victims([victim for victim, _ in victims])
            self._set(request, payload)
        except BaseException:
            self._index.abort(key)
            raise
        self._index.commit(key, "")
        self._forget()
        return WriteOutcome(SaveOutcome.STORED)

    def _set(self, request: WriteRequest, payload: Any) -> None:
        fields = (int(request.codec), payload.size, request.raw_bytes, request.digest)
        header = encode_header(FrameHeader(self._namespace, request.key, *fields), SHORT_HEADER_BYTES)
        name, expiry = self.name_of(request.key), (b"EX", self._ttl) if self._ttl else ()
        begin = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (3 + len(expiry), len(name), name)
        begin += b"$%d\r\n%b" % (SHORT_HEADER_BYTES + payload.size, header)
        end = CRLF + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in expiry)

        def send(wire: Wire) -> Any:
            wire.send(begin, payload.data, end)
            return wire.reply()

        reply = self._at_its_server(name, send)
        if isinstance(reply, ReplyError):
            raise self._failure(reply)

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
        """The number that a command answers for each key; 0 for a value that is no block.

        Names that have moved to another server are asked for once more. If one server of several fails, the answer is 0
        for its names.

        Raises:
            StoreFailure: no server has answered, or one refuses.
        """
        names = [self.name_of(key) for key in keys]
        replies: dict[bytes, int | ReplyError] = {}
        for _ in range(ATTEMPTS):
            failure = self._ask_all(name, [each for each in names if each not in replies], replies, *further)
            if failure is not None and not replies:
                raise failure
            if not self._forget_moved(replies):
                break
        for reply in replies.values():
            if isinstance(reply, ReplyError) and reply.code != "WRONGTYPE":
                raise self._failure(reply)
        numbers = {each: 0 if isinstance(reply, ReplyError) else reply for each, reply in replies.items()}
        return [numbers.get(each, 0) for each in names]

    def _ask_all(
        self, command_name: bytes, names: Sequence[bytes], replies: dict[bytes, int | ReplyError], *further: bytes
    ) -> StoreFailure | None:
        """Ask each server for its own names. The failure of one leaves out its names, and is returned."""
        failure = None
        for server, of_it in self._servers.split(names).items():
            try:
                with self._doubting(), server.exchange() as wire:
                    wire.send(commands(command_name, of_it, *further))
                    replies.update(zip(of_it, map(integer_of, wire.lines(len(of_it))), strict=True))
            except StoreFailure as error:
                failure = error
        return failure

    def _forget_moved(self, replies: dict[bytes, int | ReplyError]) -> bool:
        moved = [name for name, reply in replies.items() if _has_moved(reply)]
        for name in moved:
            del replies[name]
        if moved:
            self._servers.doubt()
        return bool(moved)

    def _at_its_server(self, name: bytes, exchange: Callable[[Wire], Reply]) -> Reply:
        """The reply of the server of a name; if another one has it now, that one is asked."""
        with self._doubting(), self._servers.of(name).exchange() as wire:
            reply = exchange(wire)
        if not _has_moved(reply):
            return reply
        self._servers.doubt()
        with self._doubting(), self._servers.of(name).exchange() as wire:
            return exchange(wire)

    @contextlib.contextmanager
    def _doubting(self) -> Iterator[None]:
        """After a failure another server may have taken the place of this one."""
        try:
            yield
        except StoreFailure:
            self._servers.doubt()
            raise

    def _failure(self, reply: ReplyError) -> StoreFailure:
        failure = StoreFailure(reply)
        if failure.cause is Cause.READ_ONLY:
            self._servers.doubt()  # it has become a replica
        self._log.failed(failure)
        return failure

    def _forget(self) -> None:
        if self._settings.capacity_bytes is None:
            self._index.forget_beyond(KNOWN_BLOCKS)


def seen(nbytes: int, last_use_s: float = LONG_AGO_S) -> IndexedBlock:
    """The entry of a value of so many bytes."""
    return IndexedBlock("", nbytes, last_use_s)


def _has_moved(reply: object) -> bool:
    return isinstance(reply, ReplyError) and reply.code in ("MOVED", "ASK")


def _corrupt(detail: str) -> ReadOutcome:
    return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT, detail=detail)
