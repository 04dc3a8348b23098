"""The connector's options: `kv_connector_extra_config`, checked."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvortex.config import MIB, KVortexConfig
from kvortex.errors import ConfigError

# Serving shares the GPU: four staging buffers of this size, instead of the engine's 128 MiB.
STAGING_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions:
    """Options of the connector.

    Args:
        engine: `cpu_pool_bytes` (per worker, or for all ranks that share a pool; write "16GiB") and every other
            setting of `KVortexConfig`, given beside those below.
        min_hit_blocks: shorter hits are computed; a load has to be worth a step of waiting.
        pending_wait_s: how long a request may wait for blocks that are just being saved before it computes them.
        save_decoded: save blocks that fill up while decoding too: the next turn's prompt begins with them.
    """

    engine: KVortexConfig
    min_hit_blocks: int = 1
    pending_wait_s: float = 0.1
    save_decoded: bool = True

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> "ConnectorOptions":
        """Options by name.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or out of range.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {"engine"}
        values = {name: value for name, value in extra.items() if name in own}
        rest = {name: value for name, value in extra.items() if name not in own}
        known = {f.name for f in dataclasses.fields(KVortexConfig)}
        if unknown := sorted(set(rest) - known):
            raise ConfigError(
                f"kv_connector_extra_config: unknown option {unknown[0]!r}; known are {', '.join(sorted(own | known))}"
            )
        options = cls(engine=KVortexConfig.from_mapping({"max_batch_bytes": STAGING_BYTES, **rest}), **values)
        options._check()
        return options

    def _check(self) -> None:
        if type(self.min_hit_blocks) is not int or self.min_hit_blocks < 1:
            raise ConfigError(f"min_hit_blocks must be a positive number, not {self.min_hit_blocks!r}")
        if not isinstance(self.pending_wait_s, int | float) or self.pending_wait_s < 0:
            raise ConfigError(f"pending_wait_s must be seconds, not {self.pending_wait_s!r}")
        if not isinstance(self.save_decoded, bool):
            raise ConfigError(f"save_decoded must be true or false, not {self.save_decoded!r}")
