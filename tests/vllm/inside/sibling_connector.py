"""A connector that stands for those that carry prompts between servers: it holds blocks until they are sent, says hello
in a form of its own, and loads asynchronously. Here both ends are in one process."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)

from kvortex.vllm.model import block_dims


@dataclass
class SiblingHandshake(KVConnectorHandshakeMetadata):
    """Says nothing that KVortex could read."""

    address: str = "nowhere"


@dataclass
class SiblingMeta(KVConnectorMetadata):
    """A step's work: prompts with their blocks."""

    sends: list[tuple[tuple[int, ...], list[int]]] = field(default_factory=list)
    loads: list[tuple[str, tuple[int, ...], list[int]]] = field(default_factory=list)


class SiblingConnector(KVConnectorBase_V1):
    """`kv_role` "kv_producer" sends every prompt, "kv_consumer" loads those that were sent."""

    sent: ClassVar[dict[tuple[int, ...], dict[str, torch.Tensor]]] = {}
    loaded: ClassVar[list[str]] = []
    hellos: ClassVar[list[type]] = []

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._role_of_kv = vllm_config.kv_transfer_config.kv_role
        self._block_size = int(vllm_config.cache_config.block_size)
        self._num_blocks = int(kv_cache_config.num_blocks)
        self._plan = SiblingMeta()
        self._caches: dict[str, torch.Tensor] = {}
        self._received: set[str] = set()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        dims = block_dims(kv_caches, self._num_blocks)
        self._caches = {name: cache.movedim(dims[name], 0) for name, cache in kv_caches.items()}

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return SiblingHandshake()

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        type(self).hellos.extend(type(hello) for hello in metadata.values())

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[Any, KVConnectorHandshakeMetadata]) -> None:
        self.set_xfer_handshake_metadata(metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for request_id, tokens, block_ids in self._get_connector_metadata().loads:
            for name, blocks in type(self).sent[tokens].items():
                self._caches[name][block_ids] = blocks[: len(block_ids)]
            self._received.add(request_id)
            type(self).loaded.append(request_id)

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None:
        for tokens, block_ids in self._get_connector_metadata().sends:
            type(self).sent[tokens] = {name: cache[block_ids].clone() for name, cache in self._caches.items()}

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received, self._received = self._received, set()
        return (finished_req_ids or None) if self._role_of_kv == "kv_producer" else None, received or None

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if self._role_of_kv != "kv_consumer" or tuple(request.prompt_token_ids) not in type(self).sent:
            return 0, False
        count = len(request.prompt_token_ids) // self._block_size * self._block_size - num_computed_tokens
        return max(count, 0), count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            tokens = tuple(request.prompt_token_ids)
            count = len(tokens) // self._block_size
            self._plan.loads.append((request.request_id, tokens, list(blocks.get_block_ids()[0])[:count]))

    def build_connector_meta(self, scheduler_output: Any) -> SiblingMeta:
        plan, self._plan = self._plan, SiblingMeta()
        for new in scheduler_output.scheduled_new_reqs if self._role_of_kv == "kv_producer" else ():
            tokens = tuple(new.prompt_token_ids)
            plan.sends.append((tokens, list(new.block_ids[0])[: len(tokens) // self._block_size]))
        return plan

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._role_of_kv == "kv_producer", None

    def take_events(self) -> Iterable[Any]:
        return ()
