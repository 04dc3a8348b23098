"""Which file holds which block.

    <path>/blocks/<namespace digest, hex>/<first byte of the key, hex>/<key, hex>.kv1
    <path>/tmp/<writer>.lock, <path>/tmp/<writer>/<number>.tmp    (see `temp_space`)

The `1` is the version of the frame. Whatever does not look like this belongs to somebody else or to a later version:
it is not read, not counted and never deleted.
"""

import os
from typing import Final

from kvortex.errors import InvalidHashError
from kvortex.tiers.frame import FORMAT_VERSION
from kvortex.types import BLOCK_HASH_BYTES

SUFFIX: Final = f".kv{FORMAT_VERSION}"
_NAME_LENGTH: Final = 2 * BLOCK_HASH_BYTES
_FAN_OUT_LENGTH: Final = 2
_HEX: Final = frozenset("0123456789abcdef")


class DiskLayout:
    """Paths of one namespace under the tier's directory.

    Raises:
        InvalidHashError: the namespace's digest is not 32 bytes.
    """

    def __init__(self, path: str | os.PathLike[str], namespace: bytes) -> None:
        if len(namespace) != BLOCK_HASH_BYTES:
            raise InvalidHashError(f"a namespace digest is {BLOCK_HASH_BYTES} bytes, not {namespace!r}")
        self.root = os.path.abspath(os.fspath(path))
        self.blocks = f"{self.root}/blocks"
        self.temp = f"{self.root}/tmp"
        self.namespace = namespace
        self.namespace_name = namespace.hex()

    @property
    def namespace_directory(self) -> str:
        """Where the blocks of this namespace lie."""
        return f"{self.blocks}/{self.namespace_name}"

    @property
    def directories(self) -> tuple[str, ...]:
        """Those that nobody else may write to, from the top."""
        return os.path.realpath(self.root), self.blocks, self.namespace_directory, self.temp

    def directory(self, key: bytes, namespace_name: str | None = None) -> str:
        """Where the file of `key` lies, in this namespace or a given one."""
        return f"{self.blocks}/{namespace_name or self.namespace_name}/{key[0]:02x}"

    def path(self, key: bytes, namespace_name: str | None = None) -> str:
        """The file of `key`."""
        return f"{self.directory(key, namespace_name)}/{name_of(key)}"


def name_of(key: bytes) -> str:
    """The name of a block's file in its directory."""
    return f"{key.hex()}{SUFFIX}"


def is_namespace_name(name: str) -> bool:
    """True for the directory of a namespace."""
    return len(name) == _NAME_LENGTH and _HEX.issuperset(name)


def is_fan_out_name(name: str) -> bool:
    """True for the directory of keys that begin with one byte."""
    return len(name) == _FAN_OUT_LENGTH and _HEX.issuperset(name)


def key_of(name: str, fan_out: str) -> bytes | None:
    """The key that a file's name in the directory `fan_out` states, None for a file that is no block of ours."""
    if len(name) != _NAME_LENGTH + len(SUFFIX) or not name.endswith(SUFFIX):
        return None
    stem = name[:_NAME_LENGTH]
    return bytes.fromhex(stem) if _HEX.issuperset(stem) and stem.startswith(fan_out) else None
