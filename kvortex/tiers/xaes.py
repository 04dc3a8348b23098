"""XAES-256-GCM: AES-256-GCM with nonces of 24 bytes (c2sp.org/XAES-256-GCM).

A key of AES-256-GCM may seal 2^32 messages with random nonces (NIST SP 800-38D), which a fleet exceeds. Here the first
half of a longer nonce derives a key of its own for each message, by the counter KDF of NIST SP 800-108r1 with AES-CMAC,
and one secret may seal 2^80 messages. Nothing else imports the package `cryptography`.
"""

from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES: Final = 32
_BLOCK_BYTES: Final = 16
_SPLIT_AT: Final = 12  # bytes of the nonce that derive the key; the others are the nonce of AES-GCM
_REDUCTION: Final = 0b10000111  # of doubling in GF(2^128)


class Xaes256Gcm:
    """One secret key. Thread-safe. Whole payloads are moved by one call each, outside of the interpreter's lock.

    Args:
        key: 32 random bytes.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of XAES-256-GCM has {KEY_BYTES} bytes, not {len(key)}")
        self._key = algorithms.AES(key)
        doubled = int.from_bytes(self._encrypted(bytes(_BLOCK_BYTES)), "big") << 1
        if doubled >> 128:
            doubled = (doubled & ((1 << 128) - 1)) ^ _REDUCTION
        self._subkey = doubled  # K1 of CMAC

    def encrypt(self, nonce: bytes, associated: bytes, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> bytes:
        """Encrypt `source`, `uint8 [n]`, into `target`, `uint8 [n]`, which must not overlap it; returns the tag.

        Args:
            nonce: 24 bytes that no other message of this key has.
            associated: bytes that are authenticated with the message.
            source: the message.
            target: takes the encrypted message.
        """
        key, nonce = self._derived(nonce)
        encryptor = Cipher(key, modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(associated)
        encryptor.update_into(source.data, target.data)
        encryptor.finalize()
        return encryptor.tag

    def decrypt(
        self, nonce: bytes, associated: bytes, tag: bytes, source: NDArray[np.uint8], target: NDArray[np.uint8]
    ) -> bool:
        """Decrypt what `encrypt` has made; False if nonce, associated bytes, tag and message do not belong together.

        Then the target is zeroed, because what it holds is not authenticated.
        """
        key, nonce = self._derived(nonce)
        decryptor = Cipher(key, modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(associated)
        try:
            decryptor.update_into(source.data, target.data)
            decryptor.finalize()
        except InvalidTag:
            target[:] = 0
            return False
        return True

    def _derived(self, nonce: bytes) -> tuple[algorithms.AES, bytes]:
        """Key and nonce of AES-256-GCM for one message."""
        parts = (b"\0%cX\0%b" % (counter, nonce[:_SPLIT_AT]) for counter in (1, 2))
        masked = b"".join((int.from_bytes(part, "big") ^ self._subkey).to_bytes(_BLOCK_BYTES, "big") for part in parts)
        return algorithms.AES(self._encrypted(masked)), nonce[_SPLIT_AT:]

    def _encrypted(self, blocks: bytes) -> bytes:
        return Cipher(self._key, modes.ECB()).encryptor().update(blocks)  # single blocks, as in CMAC
