"""The secrets that seal blocks, from a file that may change while it is in use.

A line is the id of a key and its secret, with a space between them; empty lines and those that begin with `#` are left
out. The first key seals, all of them open:

    2026-11-29 mZ0n0cUE9x0LD3kn4k5ZQTrmHUnGpzeM8tfPZ0rG8yQ=

An id has up to 16 letters, digits, dots, dashes and underscores. A secret has at least 32 bytes, in hexadecimal digits
or base64, and is known to nobody but the hosts that share a store. `kvortex seal-key` makes such a line.
"""

import base64
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from kvortex.errors import ConfigError
from kvortex.tiers.frame import KEY_ID_BYTES

logger = logging.getLogger(__name__)

SECRET_BYTES: Final = 32
"""Bytes of a secret, at least."""
LOOK_S: Final = 1.0
"""Seconds between two looks at the file, at least."""
_ID: Final = re.compile(rf"[A-Za-z0-9._-]{{1,{KEY_ID_BYTES}}}")
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_PURPOSE: Final = b"kvortex seal 1"

Cipher = TypeVar("Cipher")


@dataclass(frozen=True, slots=True)
class SealKey:
    """One line of the file: the id of a key, and its secret."""

    id: str
    secret: bytes = field(repr=False)

    @property
    def id_bytes(self) -> bytes:
        """The id as a frame has it, 16 bytes."""
        return self.id.encode().ljust(KEY_ID_BYTES, b"\0")

    @property
    def key(self) -> bytes:
        """The key of 32 bytes that the secret stands for, by HKDF-SHA256 (RFC 5869)."""
        extracted = hmac.digest(bytes(hashlib.sha256().digest_size), self.secret, "sha256")
        return hmac.digest(extracted, _PURPOSE + b"\x01", "sha256")


def new_key_line(key_id: str) -> str:
    """A line with a new, random secret, without its end.

    Raises:
        ConfigError: a key cannot have this id.
    """
    if not _ID.fullmatch(key_id):
        raise ConfigError(_no_id(key_id))
    return f"{key_id} {base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"


def parse_keys(text: str, place: str) -> list[SealKey]:
    """The keys of a file, the one that seals first.

    Args:
        text: what the file says.
        place: the file in words, for messages. These name lines and ids, and never a secret.

    Raises:
        ConfigError: a line is no key, an id or a secret occurs twice, or there is no key.
    """
    keys: dict[str, SealKey] = {}
    lines: dict[str | bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _key_in(words, f"{place}, line {number}")
        for value, what in ((key.id, f"the id {key.id!r}"), (key.secret, "the secret")):
            if value in lines:
                raise ConfigError(f"{place}, line {number}: {what} is that of line {lines[value]}, too")
            lines[value] = number
        keys[key.id] = key
    if not keys:
        raise ConfigError(f"{place} has no key; `kvortex seal-key` makes one")
    return list(keys.values())


def _key_in(words: list[str], place: str) -> SealKey:
    if len(words) != 2:
        raise ConfigError(f"{place}: a line is the id of a key and its secret, not {len(words)} words")
    key_id, text = words
    if not _ID.fullmatch(key_id):
        raise ConfigError(f"{place}: {_no_id(key_id)}")
    try:
        secret = _secret_of(text)
    except ValueError:
        raise ConfigError(f"{place}: the secret is neither base64 nor hexadecimal digits") from None
    if len(secret) < SECRET_BYTES:
        raise ConfigError(f"{place}: the secret has {len(secret)} bytes, and needs {SECRET_BYTES}: `kvortex seal-key`")
    return SealKey(key_id, secret)


def _secret_of(text: str) -> bytes:
    if _HEX.fullmatch(text):
        return bytes.fromhex(text)
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)  # of both alphabets


def _no_id(text: str) -> str:
    return f"an id has up to {KEY_ID_BYTES} letters, digits, dots, dashes and underscores, and {text!r} has not"


@dataclass(frozen=True, slots=True)
class _Keys(Generic[Cipher]):
    """What the file said, and what tells that it has changed."""

    first: tuple[bytes, Cipher]
    of_id: dict[bytes, Cipher]
    version: tuple[int, ...]


class Keyring(Generic[Cipher]):
    """The keys of a file. It is looked at from time to time, and read again when it has changed. Thread-safe.

    What cannot be read then is told in the log, and the keys of before stay in use.

    Args:
        path: the file.
        make_cipher: makes a cipher of a key of 32 bytes.
        clock: returns seconds.

    Raises:
        ConfigError: the file cannot be read, others can read it, or it has no keys.
    """

    def __init__(
        self, path: str, make_cipher: Callable[[bytes], Cipher], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._make_cipher = make_cipher
        self._clock = clock
        self._lock = threading.Lock()  # held while the file is read
        try:
            self._keys = self._read()
        except OSError as error:
            raise ConfigError(f"the keys of seal_keys cannot be read: {error}") from error
        self._seen = self._keys.version  # of the last attempt to read it, which may have failed
        self._failure = ""
        self._look_at_s = clock() + LOOK_S

    def first(self) -> tuple[bytes, Cipher]:
        """The id, 16 bytes, and the cipher of the key that seals."""
        self._look_if_due()
        return self._keys.first

    def of(self, key_id: bytes) -> Cipher | None:
        """The cipher of an id of 16 bytes; None if there is no such key."""
        self._look_if_due()
        if key_id not in self._keys.of_id:
            with self._lock:
                self._look()  # it may just have been added
        return self._keys.of_id.get(key_id)

    def _look_if_due(self) -> None:
        if self._clock() < self._look_at_s or not self._lock.acquire(blocking=False):
            return  # another thread looks just now
        try:
            self._look()
        finally:
            self._lock.release()

    def _look(self) -> None:
        self._look_at_s = self._clock() + LOOK_S
        try:
            version = _version_of(os.stat(self._path))
            if version == self._seen:
                return
            self._seen = version
            self._keys = self._read()
            self._seen = self._keys.version
        except (OSError, ConfigError) as error:
            if str(error) != self._failure:
                logger.warning("the keys that were read before stay in use: %s", error)
            self._failure = str(error)
            return
        self._failure = ""
        logger.info("%s was read again: it has %d keys now", self._path, len(self._keys.of_id))

    def _read(self) -> _Keys[Cipher]:
        with open(self._path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            _check_private(self._path, status)
            try:
                keys = parse_keys(file.read(), self._path)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{self._path} is no text: {error.reason}") from error
        of_id = {key.id_bytes: self._make_cipher(key.key) for key in keys}
        first = keys[0].id_bytes
        return _Keys((first, of_id[first]), of_id, _version_of(status))


def _version_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev


def _check_private(path: str, status: os.stat_result) -> None:
    """Refuse a file that others can read, as ssh does. What another user gives to a group is for them to decide."""
    mode = stat.S_IMODE(status.st_mode)
    unwanted = stat.S_IRWXO | (stat.S_IRWXG if status.st_uid == os.geteuid() else 0)
    if mode & unwanted:
        raise ConfigError(f"{path} is open to others (mode {mode:04o}), who could forge blocks: chmod 600 {path}")
