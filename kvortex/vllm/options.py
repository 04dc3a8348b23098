"""The connector's options, from `kv_connector_extra_config`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvortex.config import MIB, KVortexConfig, ModelIdentity
from kvortex.config.fields import conform, hints_of, require, require_known
from kvortex.errors import ConfigError

# Serving shares the GPU: four staging buffers of this size, instead of the engine's 128 MiB.
STAGING_BYTES = 32 * MIB

WITHOUT_MEANING: Final = {
    "max_outstanding_requests": "vLLM's max_num_seqs bounds the requests",
    "tier_shed": "a block that finds no room in the queue is not written",
    "fetch_blocks": "a request's blocks are fetched together, up to half of the pool",
}
"""Settings of an engine that have no effect in the connector, and why."""

IDENTITY_OPTIONS: Final = ("model", "weights_revision")
"""What a user may add to what vLLM's own configuration says of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions:
    """Options of the connector.

    Args:
        engine: `cpu_pool_bytes` (per worker, or for all ranks that share a pool; write "16GiB") and every other
            setting of `KVortexConfig` that has a meaning in vLLM, given beside those below.
        min_hit_blocks: blocks that a hit must have; shorter ones are computed, because a load costs a step of waiting.
        pending_wait_s: seconds that a request may wait for blocks whose save is in flight, before it computes them.
        save_decoded: save blocks that fill up during decoding, too: the prompt of the next turn begins with them.
    """

    engine: KVortexConfig
    min_hit_blocks: int = 1
    pending_wait_s: float = 0.1
    save_decoded: bool = True

    def __post_init__(self) -> None:
        conform(self)
        require(self.min_hit_blocks >= 1, f"min_hit_blocks must be at least 1, not {self.min_hit_blocks}")
        require(self.pending_wait_s >= 0, f"pending_wait_s must not be negative, got {self.pending_wait_s}")

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> "ConnectorOptions":
        """Options from `kv_connector_extra_config`.

        Raises:
            ConfigError: a name is unknown or has no effect in vLLM, or a value has the wrong type or is out of range.
        """
        own = set(hints_of(cls)) - {"engine"}
        engine = set(hints_of(KVortexConfig)) - set(WITHOUT_MEANING)
        for name in extra:
            if name in WITHOUT_MEANING:
                raise ConfigError(f"{name} has no effect in vLLM, leave it out: {WITHOUT_MEANING[name]}")
        require_known(extra, own | engine, "kv_connector_extra_config", "option")
        _check_identity(extra.get("identity", {}))
        settings = {"max_batch_bytes": STAGING_BYTES, **{name: extra[name] for name in extra if name in engine}}
        return cls(engine=KVortexConfig.from_mapping(settings), **{name: extra[name] for name in extra if name in own})


def _check_identity(identity: Any) -> None:
    names = set(identity) if isinstance(identity, Mapping) else set()
    for name in sorted(names & set(hints_of(ModelIdentity)) - set(IDENTITY_OPTIONS)):
        raise ConfigError(
            f"identity.{name} follows from vLLM's own configuration, leave it out; "
            f"here identity takes {' and '.join(IDENTITY_OPTIONS)}"
        )
