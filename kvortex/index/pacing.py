"""Decides when to evict and how many bytes at a time."""

from typing import Self

from kvortex.errors import ConfigError

_FLOOR_DIVISOR = 256


class EvictionPacer:
    """Spreads eviction over many saves, so that no single save waits until a large part of the pool is freed.

    An eviction cycle begins when `used + incoming` exceeds the high mark, `watermark * capacity`. It ends with the step
    that brings `used + incoming` down to the low mark, `watermark * capacity * (1 - eviction_ratio)`. Then the pool
    fills again.

    A step evicts at most twice the incoming bytes, or 1/256 of the capacity if that is more. Twice, so that the pool
    empties as fast as it fills and every cycle ends; at least 1/256, so that a cycle of small saves ends too. There is
    one exception: a step evicts as much as is needed to keep `used + incoming` within the capacity.

    The distance between the two marks is a hysteresis: nothing is evicted between cycles, so recency is judged over
    many saves. In a steady stream of saves the fill of the pool stays between the two marks.

    Args:
        capacity_bytes: bytes of the pool, above 0.
        watermark: share of the capacity at which a cycle begins, in (0, 1].
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

    def of(self, capacity_bytes: int) -> Self:
        """Another pacer with these shares, for as many bytes."""
        return type(self)(capacity_bytes, self._watermark, self._eviction_ratio)

    def resize(self, capacity_bytes: int) -> None:
        """Use another pool size from now on.

        Args:
            capacity_bytes: bytes of the pool, above 0.

        Raises:
            ConfigError: `capacity_bytes` is not above 0.
        """
        if capacity_bytes <= 0:
            raise ConfigError(f"capacity_bytes must be above 0, not {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._high_bytes = int(capacity_bytes * self._watermark)
        self._low_bytes = int(capacity_bytes * self._watermark * (1 - self._eviction_ratio))
        self._floor_bytes = max(1, capacity_bytes // _FLOOR_DIVISOR)

    def step(self, used_bytes: int, incoming_bytes: int) -> int:
        """Return the number of bytes to evict before a save, at most `used_bytes`.

        A caller that could not evict as many bytes, because blocks were pinned, need not report it: the next step sees
        it in `used_bytes`.

        Args:
            used_bytes: bytes that the pool holds now.
            incoming_bytes: bytes that the save will take from the pool.

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
