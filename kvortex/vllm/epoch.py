"""Epochs: after its weights have changed, a server writes blocks under keys that no other server finds."""

import hashlib
import os

EPOCH_BYTES = 16


def new_epoch() -> bytes:
    """A random name, 16 bytes, for the time between two changes of the weights."""
    return os.urandom(EPOCH_BYTES)


def in_epoch(key: bytes, epoch: bytes) -> bytes:
    """The key of a block in an epoch, 32 bytes. Before the first change `epoch` is empty, and the key is unchanged."""
    return hashlib.sha256(epoch + key).digest() if epoch else key
