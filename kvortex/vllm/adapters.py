"""What tells an adapter from another of the same name: vLLM's hashes name it, and not what it holds."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvortex.types import BLOCK_HASH_BYTES, BlockHash
from kvortex.vllm.files import weights_digest

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class BlockKeys:
    """Keys of a request's blocks: vLLM's hashes, joined with a digest of the adapter's files where one is used.

    An adapter is looked at when its number is first seen, as vLLM loads it then: one that was unloaded and loaded again
    under the same name has another number.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[int, str, str], bytes] = {}

    def of(self, request: "Request", blocks: slice = slice(None)) -> list[BlockHash]:
        """Keys of some of a request's full blocks."""
        adapter = self._digest_of(request.lora_request) if request.lora_request is not None else b""
        return as_keys(request.block_hashes[blocks], adapter)

    def _digest_of(self, adapter: Any) -> bytes:
        name = (int(adapter.lora_int_id), str(adapter.lora_name), str(adapter.lora_path))
        if getattr(adapter, "load_inplace", False):
            self._digests.pop(name, None)
        if name not in self._digests:
            self._digests[name] = self._look_at(adapter).encode()
        return self._digests[name]

    def _look_at(self, adapter: Any) -> str:
        try:
            found = weights_digest(Path(adapter.lora_path))
        except OSError as error:
            logger.warning("the files of adapter %s cannot be read: %s", adapter.lora_name, error)
            found = ""
        # Nothing tells a hub's adapter from a later one of its name but that it was loaded again.
        return found or f"{adapter.lora_path} {adapter.lora_int_id}"


def as_keys(hashes: Sequence[bytes], adapter: bytes = b"") -> list[BlockHash]:
    """vLLM's hashes as keys: SHA-256 as it is; shorter ones, and those of an adapter's blocks, hashed to full width."""
    if adapter:
        return [BlockHash(hashlib.sha256(adapter + h).digest()) for h in hashes]
    keys = [h if len(h) == BLOCK_HASH_BYTES else hashlib.sha256(h).digest() for h in hashes]
    return cast("list[BlockHash]", keys)  # a BlockHash each would take longer than the list itself
