"""An owner of a pool with a lower tier that a played life calls directly: no socket, no process, and its own loop.

The loop goes on only when the life turns it, so a seed gives the same life again. A block holds the number of its
content in every word of its extent: so what a tier has brought back can be told from what was there before.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np

from kvortex.config import KVortexConfig
from kvortex.hashing import Namespace
from kvortex.memory import SharedMemory
from kvortex.owner.caches import Caches
from kvortex.owner.client import Question
from kvortex.owner.protocol import HEADER, Arrays, Field, Kind, join, pack, unpack, unpack_header
from kvortex.owner.session import Session
from kvortex.owner.tiers import OwnerTiers
from kvortex.planes.control import ControlPlane
from kvortex.testing import FaultInjectingTier, TierFault
from kvortex.tiers import MemoryTier, Tier
from kvortex.tiers.payload import payload_digest
from kvortex.types import Direction, TransferPlan
from kvortex.vllm.plans import OwnedHandshake, SaveDigests, WorkerHandshake
from kvortex.vllm.scheduler import joining
from kvortex.vllm.scheduler.half import SchedulerHalf

WORD = 8
TIER_BYTES = 1 << 30


class PlayedOwner:
    """The owner.

    Args:
        config: sizes and eviction of the pool.
        random: decides which reads and writes of the tier fail.

    Attributes:
        fails: the share of them.
    """

    def __init__(self, config: KVortexConfig, random: Random) -> None:
        self.random = random
        self.fails = 0.0
        self.loop = asyncio.new_event_loop()
        self.memory = SharedMemory.create(config.pool.bytes)
        self.piece_bytes = config.pool.pin_piece_bytes
        nbytes = self.memory.ticket.nbytes
        self._words = np.frombuffer(self.memory.map(0, nbytes), dtype=np.uint64)
        self._contents: list[Any] = [None]
        self._number_of: dict[Any, int] = {}
        self.control = ControlPlane.from_config(config, nbytes, ())
        self._tiers = OwnerTiers(config, self.control, self.memory, self._make_tier)
        self.caches = Caches(self.control, self._tiers)
        self.clients: list[DirectClient] = []

    def _make_tier(self, config: KVortexConfig, namespace: bytes) -> Tier:
        return FaultInjectingTier(MemoryTier(TIER_BYTES, namespace=namespace), self._fault)

    def _fault(self, direction: Direction, number: int, key: bytes) -> TierFault | None:
        return TierFault.FAIL if self.random.random() < self.fails else None

    def connect(self, *_: Any) -> Any:
        """A client, in place of one over a socket."""
        self.clients.append(DirectClient(self))
        return self.clients[-1]

    def turn(self, count: int = 1) -> None:
        """Let the loop go on."""

        async def turns() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def settle(self) -> None:
        """Let everything end that is on its way to or from the tier."""
        for _ in range(10_000):
            self.turn(10)
            caches = [cache.tiering for cache in self.caches if cache.tiering is not None]
            if not any(t.writes.num_waiting or t.fetches.num_arriving for t in caches):
                return
        raise AssertionError("the tier does not come to an end")

    def close(self) -> None:
        self.loop.run_until_complete(self._tiers.aclose())
        self.control.close()
        self.loop.close()
        self.memory.close()

    # -- contents ----------------------------------------------------------------------------------

    def put(self, offset: int, nbytes: int, content: Any) -> None:
        """A block holds this now."""
        number = self._number_of.setdefault(content, len(self._contents))
        if number == len(self._contents):
            self._contents.append(content)
        self._words[offset // WORD : (offset + nbytes) // WORD] = number

    def digests_of(self, transfer: TransferPlan) -> SaveDigests:
        """What a worker reports of a save that has moved these blocks."""
        (cache,) = self.caches
        extents = self.control.extents[2 * cache.first :]
        forms = np.zeros(transfer.num_blocks, np.uint8) if transfer.forms is None else transfer.forms
        places = zip(transfer.offsets.tolist(), extents[forms].tolist(), strict=True)
        parts = [self._words[offset // WORD : (offset + nbytes) // WORD] for offset, nbytes in places]
        digests = np.array([payload_digest(part.view(np.uint8)) for part in parts], dtype=np.uint64)
        return SaveDigests(0, np.arange(transfer.num_blocks), digests)

    def at(self, offset: int, nbytes: int) -> Any:
        """What a block holds; None if it is not one whole content."""
        words = self._words[offset // WORD : (offset + nbytes) // WORD]
        return self._contents[int(words[0])] if (words == words[0]).all() else None


class DirectClient:
    """What `OwnerClient` offers, over a session in the same process."""

    def __init__(self, owner: PlayedOwner) -> None:
        self._owner = owner
        self._session = Session(owner.caches, mock.Mock(), 1)
        self.memory, self.piece_bytes = owner.memory, owner.piece_bytes
        self.pool_bytes = owner.memory.ticket.nbytes
        self.generation, self.on_connected = 0, None
        self.label = owner.memory.ticket.label
        self.path = Path("played")
        self.start_deadline_s = 1.0
        self._asked: deque[tuple[Question, Kind, Arrays]] = deque()

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ask(self, kind: Kind, *fields: Field, deadline_s: float | None = None) -> Arrays:
        return self.answer(self._queue(kind, fields))

    def ask_ahead(self, kind: Kind, *fields: Field, on_answer: Callable[[Arrays], None] | None = None) -> Question:
        question = self._queue(kind, fields, on_answer)
        if self._owner.random.random() < 0.5:
            self.answer(question)  # now, or when somebody wants to know it
        return question

    def answer(self, question: Question) -> Arrays:
        while question.found is None:
            asked, kind, fields = self._asked.popleft()
            asked.take(kind, self._do(kind, fields))
        return question.found[1]

    def _queue(
        self, kind: Kind, fields: tuple[Field, ...], on_answer: Callable[[Arrays], None] | None = None
    ) -> Question:
        # A frame has the bytes of when it was sent.
        question = Question(len(self._asked), on_answer)
        self._asked.append((question, kind, _through(kind, fields)))
        return question

    def _do(self, kind: Kind, fields: Arrays) -> Arrays:
        async def answer() -> Any:
            return self._session.answer(kind, fields)

        answered = self._owner.loop.run_until_complete(answer())
        return [] if answered is None else _through(*answered)

    def tell(self, kind: Kind, *fields: Field) -> bool:
        self.ask(kind, *fields)
        return True

    def close(self) -> None:
        for offset in self._session.close():
            self._owner.control.free(offset)


def _through(kind: Kind, fields: tuple[Field, ...]) -> Arrays:
    frame = bytearray(join(pack(kind, 1, *fields)))
    found, count, _, _ = unpack_header(frame[: HEADER.size])
    return unpack(found, count, frame[HEADER.size :])


def namespace_of(half: SchedulerHalf) -> Namespace:
    return Namespace(
        model="played",
        weights_revision="",
        layout=b"layout",
        block_size=16,
        kv_dtype="float32",
        codec=half._options.engine.codec.name,
    )


def hello_to_owner(half: SchedulerHalf, num_blocks: int, socket: str = "", pool: str = "") -> WorkerHandshake:
    """The handshake of one worker that has joined an owner, with the sizes that the scheduler half expects."""
    extents = [nbytes for sizes in half._sizes for nbytes in (sizes.raw, sizes.packed)]
    codecs = [codec for sizes in half._sizes for codec in (0, 2 if sizes.packs else 0)]
    owned = OwnedHandshake(
        socket=socket,
        pool=pool,
        namespace=namespace_of(half),
        part=0,
        num_parts=1,
        writer="writer",
        payloads=tuple(extents),
        codecs=tuple(codecs),
        canonical="its worker is played",
        canonical_namespace=None,
    )
    return WorkerHandshake(b"layout", half._sizes, num_blocks, half._options.engine.pool.bytes, owned)


def join_played_owner(half: SchedulerHalf, num_blocks: int, random: Random) -> PlayedOwner:
    """An owner as the half's settings ask for one, and the half joined to it."""
    owner = PlayedOwner(half._options.engine, random)
    with mock.patch.object(joining, "OwnerClient", owner.connect):
        half.accept_handshake([hello_to_owner(half, num_blocks, pool=owner.memory.ticket.label)])
    return owner


@contextlib.contextmanager
def closing(owner: PlayedOwner | None) -> Iterator[None]:
    try:
        yield
    finally:
        if owner is not None:
            owner.close()
