"""The parts of an engine that a program may bring itself."""

from kvortex.config import KVortexConfig
from kvortex.hashing import Namespace
from kvortex.sched import TransferExecutor
from kvortex.tiering import tier_of
from kvortex.tiers import Tier


class EngineParts:
    """Makes what an engine consists of. Subclass it to bring a tier of your own, or to put a double in a test.

    class WithMyTier(EngineParts):
        def make_tier(self, config, namespace):
            return MyTier(namespace=namespace.digest)

    KVortexEngine.create(config, WithMyTier())
    """

    def make_tier(self, config: KVortexConfig, namespace: Namespace) -> Tier | None:
        """The lower tier, not opened; None where there is none. By default it is the one that the settings name.

        Args:
            config: the engine's settings.
            namespace: what the blocks of this engine belong to.

        Raises:
            ConfigError: the settings name a tier that cannot be made.
        """
        return tier_of(config, namespace)

    def wrap_executor(self, executor: TransferExecutor) -> TransferExecutor:
        """What carries out the transfers: the executor of the cache's device, or another around it.

        Args:
            executor: of the device that the cache lies on.
        """
        return executor
