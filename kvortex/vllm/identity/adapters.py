"""The contents of adapters as a part of block keys: vLLM's block hashes cover the adapter's name only."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import snapshot_download

from kvortex.types import BLOCK_HASH_BYTES, BlockHash
from kvortex.vllm.identity.files import weights_digest

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class BlockKeys:
    """Keys of a request's blocks: vLLM's hashes, hashed with a digest of the adapter if the request uses one.

    The files of an adapter are read when its number is first seen, because vLLM loads them at that time. An adapter
    that was unloaded and loaded again under the same name has another number.

    Args:
        lora: vLLM's `LoRAConfig`, which says which parts of an adapter are applied; None without adapters.
    """

    def __init__(self, lora: Any = None) -> None:
        applied = (getattr(lora, name, None) for name in ("lora_dtype", "target_modules"))
        self._applied = " ".join(map(str, applied))
        self._digests: dict[tuple[int, str, str], bytes] = {}

    def of(self, request: "Request", blocks: slice = slice(None)) -> list[BlockHash]:
        """Keys of a request's full blocks, of all or of the slice `blocks`."""
        return self.from_hashes(request, request.block_hashes[blocks])

    def from_hashes(self, request: "Request", hashes: Sequence[bytes]) -> list[BlockHash]:
        """Keys of blocks of a request from vLLM's hashes of them."""
        return as_keys(hashes, self.adapter_of(request))

    def adapter_of(self, request: "Request") -> bytes:
        """What stands for the contents of a request's adapter in its keys; empty without an adapter."""
        return self._digest_of(request.lora_request) if request.lora_request is not None else b""

    def forget_adapters(self) -> None:
        """Read the files of every adapter again: they may have changed."""
        self._digests.clear()

    def _digest_of(self, adapter: Any) -> bytes:
        name = (int(adapter.lora_int_id), str(adapter.lora_name), str(adapter.lora_path))
        if getattr(adapter, "load_inplace", False):
            self._digests.pop(name, None)
        if name not in self._digests:
            self._digests[name] = f"{self._applied} {self._look_at(adapter)}".encode()
        return self._digests[name]

    def _look_at(self, adapter: Any) -> str:
        # An adapter whose files cannot be read may change without notice: its blocks are found by this server only.
        return adapter_digest(adapter) or f"{adapter.lora_path} {adapter.lora_int_id} {_PROCESS}"


_PROCESS = os.urandom(16).hex()


def adapter_digest(adapter: Any) -> str:
    """Digest of the files of a `LoRARequest`, 64 hex digits; `""` if they cannot be read on this machine."""
    try:
        return weights_digest(_folder_of(str(adapter.lora_path)))
    except (OSError, ValueError) as error:
        logger.warning("the files of adapter %s cannot be read: %s", adapter.lora_name, error)
        return ""


def _folder_of(path: str) -> Path:
    """The folder of an adapter's files: the given one, or the download from the Hugging Face hub.

    Raises:
        OSError, ValueError: there are no files, or `path` is neither a folder nor the name of a repository.
    """
    folder = Path(path).expanduser()
    return folder if folder.exists() else Path(snapshot_download(path, local_files_only=True))


def as_keys(hashes: Sequence[bytes], adapter: bytes = b"") -> list[BlockHash]:
    """Keys of 32 bytes from vLLM's hashes: SHA-256 as it is; shorter ones, and those with an adapter, hashed again."""
    if adapter:
        return [BlockHash(hashlib.sha256(adapter + h).digest()) for h in hashes]
    keys = [h if len(h) == BLOCK_HASH_BYTES else hashlib.sha256(h).digest() for h in hashes]
    return cast("list[BlockHash]", keys)  # to construct each BlockHash would take longer than all the rest
