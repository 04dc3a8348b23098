"""How a block becomes stored bytes and comes back: plain, or sealed with a secret that the hosts of a store share.

All tiers over stores that others can write to use this, and nothing else knows how to seal. A block is stored as the
header that `Framing.encode` returns and the payload that it returns with it, one behind the other. To read it, a tier

1. reads `header_bytes` bytes and has `decode` look at them, which tells how long the payload is or that it is a miss;
2. reads the payload into the memory that `landing` names for the caller's buffer;
3. has `open` bring it into that buffer: a hit, or a miss.

Sealed blocks are encrypted by XAES-256-GCM (`kvortex.tiers.xaes`) with a random nonce each. The tag covers the payload
and all of the header: format version, length, codec, sizes, digest, namespace, key of the block and id of the key that
seals. So what was forged, changed, cut, put in the place of another block or in another namespace, or was never
sealed, is a miss with `MissReason.AUTH`. Nothing of a block is trusted before its tag was checked; what was decrypted
by then is wiped from the buffer. Who can write to the store can still delete blocks, and put back an older copy of the
same block, which has the same content. Lengths, and the names of blocks, which are hashes, are not hidden.

A block that cannot be opened is not deleted: a host that lacks a new key would delete what all others can read. It is
no block for this process any more (`StoreIndex.condemn`), so the next save of it writes over it.
"""

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kvortex.errors import ConfigError, InvalidHashError
from kvortex.tiers.base import Cause, ReadOutcome, WriteRequest, as_bytes
from kvortex.tiers.frame import (
    HEADER_BYTES,
    NONCE_BYTES,
    SEALED_HEADER_BYTES,
    SHORT_HEADER_BYTES,
    FrameHeader,
    decode_header,
    decode_sealed_header,
    encode_header,
    encode_sealed_header,
)
from kvortex.tiers.keyring import Keyring
from kvortex.tiers.payload import copy_payload, payload_digest
from kvortex.types import BLOCK_HASH_BYTES, MissReason

if TYPE_CHECKING:
    from kvortex.tiers.xaes import Xaes256Gcm  # needs a package that may be missing

logger = logging.getLogger(__name__)

SILENCE_S: Final = 60.0
"""Seconds in which a block that cannot be opened is not logged again."""


class Framing(ABC):
    """How the blocks of one namespace are stored: `PlainFraming` or `SealedFraming`. Any thread may use it.

    Args:
        namespace: digest of the namespace, 32 bytes.
        store: the store in words, for logs.
        in_files: blocks are stored in files, whose headers have 4,096 bytes.

    Attributes:
        header_bytes: bytes of the header in front of each payload.
        is_sealed: whether blocks are sealed.

    Raises:
        InvalidHashError: `namespace` is not 32 bytes.
    """

    header_bytes: int
    is_sealed: bool

    def __init__(self, namespace: bytes, store: str = "a store", *, in_files: bool = False) -> None:
        if len(namespace) != BLOCK_HASH_BYTES:
            raise InvalidHashError(f"a namespace digest is {BLOCK_HASH_BYTES} bytes, not {namespace!r}")
        self.namespace = namespace
        self._store = store
        short = SEALED_HEADER_BYTES if self.is_sealed else SHORT_HEADER_BYTES
        self.header_bytes = HEADER_BYTES if in_files else short
        self._warned_s = -SILENCE_S

    @abstractmethod
    def encode(self, request: WriteRequest, target: NDArray[np.uint8] | None = None) -> tuple[bytes, NDArray[np.uint8]]:
        """Header and payload of a block, as they are stored.

        Args:
            request: the block.
            target: takes the payload, `uint8 [n]`, and is returned then. Without it the payload may be in the request's
                own memory, or in memory of this thread that the next call uses again.
        """

    @abstractmethod
    def decode(self, head: bytes | memoryview, key: bytes) -> FrameHeader | ReadOutcome:
        """What a header says of the block `key`, or why it is a miss.

        Args:
            head: the first `header_bytes` bytes of what is stored, or all of it if there is less.
            key: the key of the block.
        """

    def landing(self, target: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The memory, as long as `target`, that a stored payload is to be read into for `open`: `target` itself if that
        spares a copy, or memory of this thread that the next call uses again."""
        return target

    @abstractmethod
    def open(
        self, header: FrameHeader, stored: NDArray[np.uint8], target: NDArray[np.uint8], *, verify: bool = True
    ) -> ReadOutcome:
        """Bring a stored payload into the caller's buffer, and check it.

        Args:
            header: what `decode` has returned.
            stored: the payload as it is stored, `uint8 [n]` with the `n` of the header.
            target: the buffer, of the same length; it may be the same memory only if `landing` has said so.
            verify: False leaves the digest to the caller.
        """

    @abstractmethod
    def flawed(self, detail: str) -> ReadOutcome:
        """The miss for something stored that is no block of this namespace."""

    def _warn(self, detail: str) -> None:
        now_s = time.monotonic()
        is_new = now_s - self._warned_s >= SILENCE_S
        if is_new:
            self._warned_s = now_s
        logger.log(logging.WARNING if is_new else logging.DEBUG, "%s: a block is refused: %s", self._store, detail)


class PlainFraming(Framing):
    """Blocks as they are, with a digest against accidents. A sealed block is a miss with `Cause.SEALED`."""

    is_sealed = False

    def encode(self, request: WriteRequest, target: NDArray[np.uint8] | None = None) -> tuple[bytes, NDArray[np.uint8]]:
        payload = as_bytes(request.payload)
        if target is not None:
            copy_payload(payload, target)
        head = encode_header(_header_of(request, self.namespace), self.header_bytes)
        return head, payload if target is None else target

    def decode(self, head: bytes | memoryview, key: bytes) -> FrameHeader | ReadOutcome:
        header = decode_header(head, self.namespace, key, self.header_bytes)
        if isinstance(header, FrameHeader):
            return header
        if header is Cause.UNKNOWN_VERSION:
            return ReadOutcome(MissReason.NEVER_STORED, cause=header)
        if header is Cause.SEALED:
            detail = "it is sealed, and this tier has no keys: give it seal_keys"
            self._warn(detail)
            return ReadOutcome(MissReason.AUTH, cause=header, detail=detail)
        return self.flawed("the header is damaged, or another block's")

    def open(
        self, header: FrameHeader, stored: NDArray[np.uint8], target: NDArray[np.uint8], *, verify: bool = True
    ) -> ReadOutcome:
        if stored is not target:
            digest = copy_payload(stored, target)
        else:
            digest = payload_digest(target) if verify else header.digest
        return _hit(header) if digest == header.digest or not verify else _other_digest()

    def flawed(self, detail: str) -> ReadOutcome:
        return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT, detail=detail)


class SealedFraming(Framing):
    """Sealed blocks. All others are misses with `Cause.AUTH`.

    Args:
        namespace, store, in_files: see `Framing`.
        keyring: has the keys.
    """

    is_sealed = True

    def __init__(
        self, namespace: bytes, keyring: "Keyring[Xaes256Gcm]", store: str = "a store", *, in_files: bool = False
    ) -> None:
        super().__init__(namespace, store, in_files=in_files)
        self._keyring = keyring
        self._scratch = _Scratch()

    def encode(self, request: WriteRequest, target: NDArray[np.uint8] | None = None) -> tuple[bytes, NDArray[np.uint8]]:
        payload = as_bytes(request.payload)
        stored = self._scratch.memory(payload.size) if target is None else target
        key_id, cipher = self._keyring.first()
        nonce = os.urandom(NONCE_BYTES)
        head = encode_sealed_header(
            _header_of(request, self.namespace),
            self.header_bytes,
            key_id,
            nonce,
            lambda associated: cipher.encrypt(nonce, associated, payload, stored),
        )
        return head, stored

    def decode(self, head: bytes | memoryview, key: bytes) -> FrameHeader | ReadOutcome:
        header = decode_sealed_header(head, self.namespace, key, self.header_bytes)
        return header or self.flawed("it is not sealed, or it is damaged or another block's")

    def landing(self, target: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self._scratch.memory(target.size)

    def open(
        self, header: FrameHeader, stored: NDArray[np.uint8], target: NDArray[np.uint8], *, verify: bool = True
    ) -> ReadOutcome:
        seal = header.seal
        if seal is None:
            raise ValueError("the header of a plain block: `decode` has refused it")
        cipher = self._keyring.of(seal.key_id)
        if cipher is None:
            name = seal.key_id.rstrip(b"\0").decode("ascii", "backslashreplace")
            return self.flawed(f"it states the key {name!r}, which is not in the file of seal_keys")
        if not cipher.decrypt(seal.nonce, seal.associated, seal.tag, stored, target):
            return self.flawed("it was not sealed with the secret of its key, or has been changed")
        if verify and payload_digest(target) != header.digest:
            return _other_digest()
        return _hit(header)

    def flawed(self, detail: str) -> ReadOutcome:
        self._warn(detail)
        return ReadOutcome(MissReason.AUTH, cause=Cause.AUTH, detail=detail)


def framing_of(namespace: bytes, seal_keys: str, store: str, *, in_files: bool = False) -> Framing:
    """How the blocks of a store are stored.

    Args:
        namespace: digest of the namespace, 32 bytes.
        seal_keys: path of the file with the secrets (`kvortex.tiers.keyring`); empty for plain blocks.
        store: the store in words, for logs.
        in_files: blocks are stored in files.

    Raises:
        ConfigError: the file cannot be used, or the package `cryptography` is not installed.
        InvalidHashError: `namespace` is not 32 bytes.
    """
    if not seal_keys:
        return PlainFraming(namespace, store, in_files=in_files)
    try:
        from kvortex.tiers.xaes import Xaes256Gcm
    except ImportError as error:
        raise ConfigError(
            f"seal_keys need cryptography, which is not installed: pip install 'kvortex[seal]' ({error})"
        ) from error
    return SealedFraming(namespace, Keyring(seal_keys, Xaes256Gcm), store, in_files=in_files)


class _Scratch(threading.local):
    """Memory of one thread, as large as its largest payload."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def memory(self, nbytes: int) -> NDArray[np.uint8]:
        if self._memory.size < nbytes:
            self._memory = np.empty(nbytes, dtype=np.uint8)
        return self._memory[:nbytes]


def _header_of(request: WriteRequest, namespace: bytes) -> FrameHeader:
    payload_bytes = as_bytes(request.payload).size
    return FrameHeader(namespace, request.key, int(request.codec), payload_bytes, request.raw_bytes, request.digest)


def _hit(header: FrameHeader) -> ReadOutcome:
    return ReadOutcome(None, header.payload_bytes, header.raw_bytes, header.codec, header.digest)


def _other_digest() -> ReadOutcome:
    return ReadOutcome(MissReason.CORRUPT, cause=Cause.CORRUPT, detail="the payload's digest differs")
