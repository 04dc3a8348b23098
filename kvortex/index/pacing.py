"""When to evict, and how much at a time."""

from kvortex.errors import ConfigError

_FLOOR_DIVISOR = 256


class EvictionPacer:
    """Spreads eviction over the saves that cause it: no save waits for a fifth of the pool to be freed.

    A cycle begins when `used + incoming` passes `watermark * capacity`, and ends with the step that brings it down to
    `watermark * capacity * (1 - eviction_ratio)`; then the pool fills again. Each step works off at most twice what
    comes in, or 1/256 of the capacity if that is more: twice, so that the pool empties as fast as it fills and a
    cycle always ends; the floor, so that a trickle of small saves ends one too. The one exception is the pool's end:
    a step asks for as much as it takes to keep `used + incoming` within the capacity, whatever the pace.

    The distance between the two lines is the hysteresis: between cycles nothing is evicted, so recency is
    judged over many saves and not block by block. In a steady stream the pool is filled to between the two.

    Args:
        capacity_bytes: size of the pool, above 0.
        watermark: share of the capacity that begins a cycle, in (0, 1].
        eviction_ratio: share of the watermark that a cycle frees, in (0, 1).

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, capacity_bytes: int, watermark: float, eviction_ratio: float) -> None:
        if not 0 < watermark <= 1:
            raise ConfigError(f"watermark must be in (0, 1], not {watermark}")
        if not 0 < eviction_ratio < 1:
            raise ConfigError(f"eviction_ratio must be in (0, 1), not {eviction_ratio}")
        self._watermark = watermark
        self._eviction_ratio = eviction_ratio
        self._in_cycle = False
        self.resize(capacity_bytes)

    def resize(self, capacity_bytes: int) -> None:
        """Keep to a pool of another size from now on.

        Raises:
            ConfigError: it is not above 0.
        """
        if capacity_bytes <= 0:
            raise ConfigError(f"capacity_bytes must be above 0, not {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._high_bytes = int(capacity_bytes * self._watermark)
        self._low_bytes = int(capacity_bytes * self._watermark * (1 - self._eviction_ratio))
        self._floor_bytes = max(1, capacity_bytes // _FLOOR_DIVISOR)

    def step(self, used_bytes: int, incoming_bytes: int) -> int:
        """Bytes to evict before `incoming_bytes` are taken from a pool that holds `used_bytes`.

        Never more than `used_bytes`. A caller that could not evict as much (blocks were pinned) need not say
        so: the next step sees it in `used_bytes`.

        Raises:
            ConfigError: an argument is negative.
        """
        if used_bytes < 0 or incoming_bytes < 0:
            raise ConfigError(f"negative bytes: used {used_bytes}, incoming {incoming_bytes}")
        wanted_bytes = used_bytes + incoming_bytes
        if wanted_bytes > self._high_bytes:
            self._in_cycle = True
        excess = wanted_bytes - self._low_bytes
        if not self._in_cycle or excess <= 0:
            self._in_cycle = False
            return 0
        paced = min(excess, max(2 * incoming_bytes, self._floor_bytes))
        self._in_cycle = paced < excess
        overflow = wanted_bytes - self._capacity_bytes
        return min(used_bytes, max(paced, overflow))
