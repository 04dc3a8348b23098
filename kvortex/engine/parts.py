"""The parts of an engine that a program may replace."""

from kvortex.config import KVortexConfig
from kvortex.hashing import Namespace
from kvortex.sched import TransferExecutor
from kvortex.tiering import tier_of
from kvortex.tiers import Tier


class EngineParts:
    """Makes the replaceable parts of an engine. Subclass it to use your own tier, or a test double.

    class WithMyTier(EngineParts):
        def make_tier(self, config, namespace):
            return MyTier(namespace=namespace.digest)

    KVortexEngine.create(config, WithMyTier())
    """

    def make_tier(self, config: KVortexConfig, namespace: Namespace) -> Tier | None:
        """The lower tier, not opened yet, or None. By default the tier that the settings name.

        Args:
            config: the engine's settings.
            namespace: the namespace of this engine's blocks.

        Raises:
            ConfigError: the settings name a tier that cannot be made.
        """
        return tier_of(config, namespace.digest)

    def wrap_executor(self, executor: TransferExecutor) -> TransferExecutor:
        """The executor of the transfers: `executor` itself, or a wrapper around it.

        Args:
            executor: the executor for the cache's device.
        """
        return executor
