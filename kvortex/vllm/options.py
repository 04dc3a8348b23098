"""The connector's options, from `kv_connector_extra_config`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvortex.config import MIB, KVortexConfig, ModelIdentity
from kvortex.config.config import SECTIONS
from kvortex.config.fields import conform, hints_of, require, require_known
from kvortex.config.renamed import RENAMED
from kvortex.errors import ConfigError

# Serving shares the GPU: four staging buffers of this size, instead of the engine's 128 MiB.
STAGING_BYTES = 32 * MIB

WITHOUT_MEANING: Final = {
    "pool.lease_share": "leases are for programs that call the engine themselves",
    "transfer.max_outstanding_requests": "vLLM's max_num_seqs bounds the requests",
}
"""Settings of an engine that have no effect in the connector, and why."""

IDENTITY_OPTIONS: Final = ("model", "weights_revision")
"""What a user may add to what vLLM's own configuration says of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions:
    """Options of the connector.

    Args:
        engine: the sections of `KVortexConfig`, given beside the options below: `pool` (for each worker, or for all
            ranks that share one; write "16GiB") and every other setting that has an effect in vLLM.
        min_hit_blocks: blocks that a hit must have; shorter ones are computed, because a load costs a step of waiting.
        pending_wait_s: seconds that a request may wait for blocks whose save is in flight, or for the answer of a store
            that may have more than is known, before it computes them.
        handover_wait_s: seconds that a request may wait for the next of the blocks that another server, which has
            computed its prompt, has said to be storing.
        save_decoded: save blocks that fill up during decoding, too: the prompt of the next turn begins with them.
    """

    engine: KVortexConfig
    min_hit_blocks: int = 1
    pending_wait_s: float = 0.1
    handover_wait_s: float = 3.0
    save_decoded: bool = True

    def __post_init__(self) -> None:
        conform(self)
        require(self.min_hit_blocks >= 1, f"min_hit_blocks must be at least 1, not {self.min_hit_blocks}")
        require(self.pending_wait_s >= 0, f"pending_wait_s must not be negative, got {self.pending_wait_s}")
        require(self.handover_wait_s >= 0, f"handover_wait_s must not be negative, got {self.handover_wait_s}")

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> "ConnectorOptions":
        """Options from `kv_connector_extra_config`.

        Raises:
            ConfigError: a name is unknown or has no effect in vLLM, or a value has the wrong type or is out of range.
        """
        own = set(hints_of(cls)) - {"engine"}
        require_known(extra, own | set(SECTIONS) | set(RENAMED), "kv_connector_extra_config", "option")
        given = _settings_named(extra)
        for name, reason in WITHOUT_MEANING.items():
            if name in given:
                raise ConfigError(f"{name} has no effect in vLLM, leave it out: {reason}")
        _check_identity(extra.get("identity", {}))
        engine = KVortexConfig.from_mapping({name: value for name, value in extra.items() if name not in own})
        if "transfer.max_batch_bytes" not in given:
            engine = engine.replace(transfer={"max_batch_bytes": STAGING_BYTES})
        require(
            bool(engine.lower_tier) or not engine.tier.canonical_layout,
            "tier.canonical_layout is about a lower tier, and there is none: give tier.urls or disk.path",
        )
        return cls(engine=engine, **{name: extra[name] for name in extra if name in own})


def _settings_named(extra: Mapping[str, Any]) -> set[str]:
    """The settings that the options give, as `section.name`."""
    sections = {section: value for section, value in extra.items() if isinstance(value, Mapping)}
    given = {f"{section}.{name}" for section, values in sections.items() for name in values}
    return given | {str(RENAMED[name]) for name in extra if name in RENAMED}


def _check_identity(identity: Any) -> None:
    names = set(identity) if isinstance(identity, Mapping) else set()
    for name in sorted(names & set(hints_of(ModelIdentity)) - set(IDENTITY_OPTIONS)):
        raise ConfigError(
            f"identity.{name} follows from vLLM's own configuration, leave it out; "
            f"here identity takes {' and '.join(IDENTITY_OPTIONS)}"
        )
