"""Paths: the file of each block.

    <path>/blocks/<namespace digest, hex>/<first byte of the key, hex>/<key, hex>.kv1
    <path>/tmp/<writer>.lock, <path>/tmp/<writer>/<number>.tmp    (see `temp_space`)

The `1` is the version of the frame. A file with another name is not ours, or belongs to a later version: it is not
read, not counted and never deleted.
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
    """Paths of one namespace under the directory of the tier.

    Args:
        path: directory of the tier.
        namespace: digest of the namespace, 32 bytes.

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
        """The directory of this namespace's blocks."""
        return f"{self.blocks}/{self.namespace_name}"

    @property
    def directories(self) -> tuple[str, ...]:
        """The directories to which no other user may write, from the top."""
        return os.path.realpath(self.root), self.blocks, self.namespace_directory, self.temp

    def directory(self, key: bytes, namespace_name: str | None = None) -> str:
        """The directory of the file of `key`, in this namespace or in a given one."""
        return f"{self.blocks}/{namespace_name or self.namespace_name}/{key[0]:02x}"

    def path(self, key: bytes, namespace_name: str | None = None) -> str:
        """The path of the file of `key`, likewise."""
        return f"{self.directory(key, namespace_name)}/{name_of(key)}"


def name_of(key: bytes) -> str:
    """The name of the file of `key` in its directory."""
    return f"{key.hex()}{SUFFIX}"


def is_namespace_name(name: str) -> bool:
    """True for a name that the directory of a namespace can have."""
    return len(name) == _NAME_LENGTH and _HEX.issuperset(name)


def is_fan_out_name(name: str) -> bool:
    """True for a name that a fan-out directory can have: it holds the keys with one first byte."""
    return len(name) == _FAN_OUT_LENGTH and _HEX.issuperset(name)


def key_of(name: str, fan_out: str) -> bytes | None:
    """The key in the name of a file in the directory `fan_out`; None if the file is not a block of ours."""
    if len(name) != _NAME_LENGTH + len(SUFFIX) or not name.endswith(SUFFIX):
        return None
    stem = name[:_NAME_LENGTH]
    return bytes.fromhex(stem) if _HEX.issuperset(stem) and stem.startswith(fan_out) else None
