"""Weights that change under a running engine: what was computed with the old ones must not be served any more."""

import gc
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from kvortex.vllm.identity.adapters import adapter_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

REPLACING: Final = ("reload_weights", "update_weights", "finish_weight_update", "finish_draft_weight_update")
"""Methods of vLLM's worker after which the weights are others, each in some of the versions."""


class WeightsWatch:
    """Notices that the weights of a worker's models have changed.

    What replaces weights, in vLLM's worker or through a model's `load_weights`, is noticed as it ends. What may have
    changed them, such as a function that was applied to the model, is followed by a look at all of them, as is
    whatever asks for one with `look`. An adapter whose files were replaced is noticed when it is loaded again.

    Args:
        vllm_config: the engine's configuration; its worker in this process is watched.
        on_change: called after a change, in the thread that made it.
    """

    def __init__(self, vllm_config: "VllmConfig", on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._watched: list[tuple[dict[str, Any], str]] = []
        self._depth = 0  # of watched calls within each other: it is the outermost that leaves whole weights behind
        self._models: list[torch.nn.Module] = []
        self._adapters: dict[int, str] = {}  # number -> what it held when it was last loaded
        for worker in _workers_of(vllm_config):
            self._models += _models_of(worker)
            for name in REPLACING:
                self._watch(worker, name, self._replaced)
            self._watch(worker, "apply_model", self.look)
            self._watch_adapters(getattr(getattr(worker, "model_runner", None), "lora_manager", None))
        if not self._models:
            logger.warning("vLLM's worker is not found: weights that change are not noticed before a reset is told")
        for model in self._models:
            self._watch(model, "load_weights", self._replaced)
        self._seen = weights_checksum(self._models)

    def _watch(self, owner: Any, name: str, after: Callable[[], None]) -> None:
        method = getattr(owner, name, None)
        if method is None:
            return

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    after()

        vars(owner)[name] = watched
        self._watched.append((vars(owner), name))

    def _watch_adapters(self, manager: Any) -> None:
        """Notice that an adapter is loaded again, under the number that it had, and holds something else."""
        load = getattr(manager, "_load_adapter", None)
        if load is None:
            return

        def watched(adapter: Any) -> Any:
            loaded = load(adapter)
            digest = adapter_digest(adapter)
            if self._adapters.setdefault(int(adapter.lora_int_id), digest) != digest:
                self._adapters[int(adapter.lora_int_id)] = digest
                self._changed()
            return loaded

        vars(manager)["_load_adapter"] = watched
        self._watched.append((vars(manager), "_load_adapter"))

    def _replaced(self) -> None:
        self._seen = weights_checksum(self._models)
        self._changed()

    def look(self) -> None:
        """Compare the weights with those of the last look."""
        seen = weights_checksum(self._models)
        if seen != self._seen:
            self._seen = seen
            self._changed()

    def _changed(self) -> None:
        logger.info("the model's weights have changed: what is stored so far is not served any more")
        self._on_change()

    def end(self) -> None:
        """Watch no more; idempotent."""
        while self._watched:
            attributes, name = self._watched.pop()
            attributes.pop(name, None)
        self._models.clear()


def watch_resets(on_reset: Callable[[], None]) -> Callable[[], None]:
    """Have `on_reset` called after vLLM has emptied its own prefix cache, which is what one does when weights change.

    Returns:
        What ends it.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    method = KVCacheManager.reset_prefix_cache

    def watched(manager: Any) -> Any:
        done = method(manager)
        on_reset()
        return done

    KVCacheManager.reset_prefix_cache = watched

    def end() -> None:
        if KVCacheManager.reset_prefix_cache is watched:
            KVCacheManager.reset_prefix_cache = method

    return end


def weights_checksum(models: list[torch.nn.Module]) -> list[int]:
    """Sums over the bits of every parameter, in order: one pass over them on their device.

    Any realistic change of weights changes a sum. Parameters without memory, as in sleep or between the parts of an
    update, are left out.
    """
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for model in models:
        for parameter in model.parameters():
            if parameter.numel() and not parameter.is_meta and parameter.untyped_storage().nbytes():
                sums.setdefault(parameter.device, []).append(_bits_of(parameter).sum(dtype=torch.int64))
    return [value for of_device in sums.values() for value in torch.stack(of_device).tolist()]


def _bits_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    values = parameter.detach()
    if not values.is_contiguous():
        values = values.contiguous()
    flat = values.reshape(-1).view(torch.uint8)
    return flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat


def _workers_of(vllm_config: "VllmConfig") -> Iterator[Any]:
    """The workers of an engine in this process. They have no registry: they are found among all objects."""
    from vllm.v1.worker.worker_base import WorkerBase

    for candidate in gc.get_objects():
        # Not isinstance, which asks an object for its class and wakes lazy ones.
        if issubclass(type(candidate), WorkerBase):
            config = getattr(candidate, "vllm_config", None)
            if config is not None and config.model_config is vllm_config.model_config:
                yield candidate


def _models_of(worker: Any) -> list[torch.nn.Module]:
    runner = getattr(worker, "model_runner", None)
    drafters = [getattr(runner, name, None) for name in ("drafter", "speculator")]  # the older runner's, the newer's
    found = [worker.get_model(), *(getattr(drafter, "model", None) for drafter in drafters)]
    return [model for model in found if isinstance(model, torch.nn.Module)]
