"""Keys of one server alone: what it writes after its weights have changed is found by nobody else."""

import hashlib
import os

EPOCH_BYTES = 16


def new_epoch() -> bytes:
    """Random bytes that name a time between two changes of the weights."""
    return os.urandom(EPOCH_BYTES)


def in_epoch(key: bytes, epoch: bytes) -> bytes:
    """The key of a block in an epoch, 32 bytes; before the first change, with an empty `epoch`, its own."""
    return hashlib.sha256(epoch + key).digest() if epoch else key
