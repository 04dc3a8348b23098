"""How the payload of one block stands in a segment: as it is, or sealed, with a header of its own in front of it."""

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, WriteRequest, as_bytes
from kvortex.tiers.frame import FrameHeader
from kvortex.tiers.payload import copy_payload
from kvortex.tiers.s3.segment import StoredEntry, aligned
from kvortex.tiers.sealing import Framing
from kvortex.types import MissReason


def warm_up() -> None:
    """Compile what `Payloads.take` calls, for a source that cannot be written."""
    copy_payload(np.frombuffer(bytes(8), dtype=np.uint8), np.zeros(8, dtype=np.uint8))


class Payloads:
    """Puts blocks into segments, and takes them out. Any thread may use it.

    Of a plain block the footer of its segment says what it is. Nothing that it says of a sealed block is trusted:
    the block's own header says it again, and is sealed with it.

    Args:
        framing: how blocks are stored.

    Attributes:
        overhead: bytes that a block takes in a segment beside its payload.
    """

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self.overhead = framing.header_bytes if framing.is_sealed else 0

    def stored_bytes(self, request: WriteRequest) -> int:
        """Bytes that a block takes in a segment, without padding."""
        return as_bytes(request.payload).size + self.overhead

    def put(self, request: WriteRequest, segment: NDArray[np.uint8], offset: int) -> StoredEntry:
        """Bring a block to its place in a segment, `uint8 [n]`, and its padding behind it."""
        stored_bytes = self.stored_bytes(request)
        begin, end = offset + self.overhead, offset + stored_bytes
        if self.overhead:
            head, _ = self._framing.encode(request, segment[begin:end])
            segment[offset:begin] = np.frombuffer(head, dtype=np.uint8)
        else:
            segment[begin:end] = as_bytes(request.payload)
        segment[end : offset + aligned(stored_bytes)] = 0
        return StoredEntry(request.key, offset, stored_bytes, request.raw_bytes, request.digest, int(request.codec))

    def take(self, entry: StoredEntry, stored: NDArray[np.uint8], request: ReadRequest) -> ReadOutcome:
        """Bring a block, `uint8 [entry.stored_bytes]`, into the buffer of a request, and check it on the way."""
        payload_bytes = stored.size - self.overhead
        target = as_bytes(request.buffer)[: max(payload_bytes, 0)]
        if self.overhead:
            return self._open(stored, target, request.key)
        if copy_payload(stored, target) != entry.digest:
            return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT, detail="the payload's digest differs")
        return ReadOutcome(None, payload_bytes, entry.raw_bytes, entry.codec, entry.digest)

    def flawed(self, detail: str) -> ReadOutcome:
        """The miss for a block of an object that is not what it was."""
        return self._framing.flawed(detail)

    def _open(self, stored: NDArray[np.uint8], target: NDArray[np.uint8], key: bytes) -> ReadOutcome:
        header = self._framing.decode(stored[: self.overhead].tobytes(), key)
        if not isinstance(header, FrameHeader):
            return header
        if header.payload_bytes != target.size:
            return self._framing.flawed("its length is not that of its object's footer")
        return self._framing.open(header, stored[self.overhead :], target)
