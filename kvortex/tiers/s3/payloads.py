"""How the payload of one block stands in a segment: as it is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvortex.tiers.base import Cause, ReadOutcome, ReadRequest, WriteRequest, as_bytes
from kvortex.tiers.payload import copy_payload
from kvortex.tiers.s3.segment import StoredEntry, aligned
from kvortex.types import MissReason


def warm_up() -> None:
    """Compile what `take_payload` calls, for a source that cannot be written."""
    copy_payload(np.frombuffer(bytes(8), dtype=np.uint8), np.zeros(8, dtype=np.uint8))


def stored_bytes(request: WriteRequest) -> int:
    """Bytes that the payload takes in a segment, without padding."""
    return as_bytes(request.payload).size


def put_payload(request: WriteRequest, segment: NDArray[np.uint8], offset: int) -> StoredEntry:
    """Copy a payload to its place in a segment, `uint8 [n]`, and its padding behind it."""
    payload = as_bytes(request.payload)
    end = offset + payload.size
    segment[offset:end] = payload
    segment[end : offset + aligned(payload.size)] = 0
    return StoredEntry(request.key, offset, payload.size, request.raw_bytes, request.digest, int(request.codec))


def take_payload(entry: StoredEntry, stored: NDArray[np.uint8], request: ReadRequest) -> ReadOutcome:
    """Copy a payload, `uint8 [entry.payload_bytes]`, into the buffer of a request, and check it on the way."""
    target: NDArray[Any] = as_bytes(request.buffer)[: entry.payload_bytes]
    if copy_payload(stored, target) != entry.digest:
        return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT, detail="the payload's digest differs")
    return ReadOutcome(None, entry.payload_bytes, entry.raw_bytes, entry.codec, entry.digest)
