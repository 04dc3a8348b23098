"""Weights that change under a running engine: KV of the old weights must not be served any more."""

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
"""Methods of vLLM's worker that replace the weights; each exists in some of the versions."""


class WeightsWatch:
    """Notices that the weights of a worker's models have changed.

    A method that replaces weights, of vLLM's worker or a model's `load_weights`, counts as a change when it ends. After
    a call that may have changed them, such as a function that was applied to the model, all weights are compared with
    their last checksum; `look` does the same. An adapter whose files were replaced is noticed when it is loaded again.

    Args:
        vllm_config: the engine's configuration; its worker in this process is watched.
        on_change: called after each change, in the thread that made it.
    """

    def __init__(self, vllm_config: "VllmConfig", on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._watched: list[tuple[dict[str, Any], str]] = []
        self._depth = 0  # of nested watched calls; only after the outermost are the weights complete
        self._models: list[torch.nn.Module] = []
        self._adapters: dict[int, str] = {}  # adapter's number -> digest of its files when it was last loaded
        for worker in _workers_of(vllm_config):
            self._models += _models_of(worker)
            for name in REPLACING:
                self._watch(worker, name, self._replaced)
            self._watch(worker, "apply_model", self.look)
            self._watch_adapters(getattr(getattr(worker, "model_runner", None), "lora_manager", None))
        if not self._models:
            logger.warning("cannot find vLLM's worker: a change of weights is not noticed before the cache is reset")
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
        """Notice that an adapter is loaded again under the same number, with other contents."""
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
        """Compare the weights with their last checksum."""
        seen = weights_checksum(self._models)
        if seen != self._seen:
            self._seen = seen
            self._changed()

    def _changed(self) -> None:
        logger.info("the model's weights have changed: blocks that are stored so far are not served any more")
        self._on_change()

    def end(self) -> None:
        """Stop watching; idempotent."""
        while self._watched:
            attributes, name = self._watched.pop()
            attributes.pop(name, None)
        self._models.clear()


def watch_resets(before_reset: Callable[[], None], after_reset: Callable[[], None]) -> Callable[[], None]:
    """Follow vLLM when it empties its own prefix cache, as one does when weights change.

    Args:
        before_reset: called before it tries to.
        after_reset: called after it has tried to.

    Returns:
        A function that ends this.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    method = KVCacheManager.reset_prefix_cache

    def watched(manager: Any) -> Any:
        before_reset()
        done = method(manager)
        after_reset()
        return done

    KVCacheManager.reset_prefix_cache = watched

    def end() -> None:
        if KVCacheManager.reset_prefix_cache is watched:
            KVCacheManager.reset_prefix_cache = method

    return end


def weights_checksum(models: list[torch.nn.Module]) -> list[int]:
    """A sum over the bits of every parameter, in order; computed in one pass on the parameters' device.

    Any realistic change of weights changes a sum. Parameters without memory are left out, as there are during sleep and
    between the parts of an update.
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
    """The workers of an engine in this process. vLLM has no registry of them, so they are found among all objects."""
    from vllm.v1.worker.worker_base import WorkerBase

    for candidate in gc.get_objects():
        # Not isinstance: it reads `__class__`, which makes lazily imported objects import themselves.
        if issubclass(type(candidate), WorkerBase):
            config = getattr(candidate, "vllm_config", None)
            if config is not None and config.model_config is vllm_config.model_config:
                yield candidate


def _models_of(worker: Any) -> list[torch.nn.Module]:
    runner = getattr(worker, "model_runner", None)
    drafters = [getattr(runner, name, None) for name in ("drafter", "speculator")]  # the older runner's, the newer's
    found = [worker.get_model(), *(getattr(drafter, "model", None) for drafter in drafters)]
    return [model for model in found if isinstance(model, torch.nn.Module)]
