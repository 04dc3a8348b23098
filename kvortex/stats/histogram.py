"""A histogram of latencies whose buckets are the same in every process."""

import math
from bisect import bisect_left
from itertools import accumulate


class LatencyHistogram:
    """Latencies in log-spaced buckets from 1 us to about 1,074 s, eight to an octave: 242 integers.

    A percentile is the geometric middle of its bucket, so for latencies in that range its error is at most 4.5%.
    Shorter and longer latencies share one bucket at either end. A result is never outside of the recorded latencies.
    Not thread-safe.
    """

    LOWEST_S = 1e-6
    BUCKETS_PER_OCTAVE = 8
    OCTAVES = 30

    def __init__(self) -> None:
        self._counts = [0] * (self.BUCKETS_PER_OCTAVE * self.OCTAVES + 2)
        self._count = 0
        self._sum_s = 0.0
        self._min_s = math.inf
        self._max_s = 0.0

    @property
    def count(self) -> int:
        """Number of recorded latencies."""
        return self._count

    @property
    def sum(self) -> float:
        """Their sum, in seconds; exact."""
        return self._sum_s

    def record(self, seconds: float) -> None:
        """Add one latency; `ValueError` unless it is finite and not negative."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a latency of {seconds} s; pass finite seconds, zero or more")
        self._counts[self._bucket_of(seconds)] += 1
        self._count += 1
        self._sum_s += seconds
        self._min_s = min(self._min_s, seconds)
        self._max_s = max(self._max_s, seconds)

    def cumulative(self) -> tuple[tuple[float, int], ...]:
        """Pairs of (seconds, number of latencies below them). Seconds grow by a factor of four, and are the same in
        every histogram, so the pairs of several engines can be added."""
        sums = list(accumulate(self._counts))
        octaves = range(self.OCTAVES % 4, self.OCTAVES + 1, 2)
        return tuple((self.LOWEST_S * 2**n, sums[n * self.BUCKETS_PER_OCTAVE]) for n in octaves)

    def percentile(self, p: float) -> float:
        """The latency in seconds that `p` percent (0 to 100) of the latencies do not exceed; 0.0 without latencies.

        By nearest rank. `ValueError` for any other `p`.
        """
        if not 0 <= p <= 100:
            raise ValueError(f"percentile {p}; pass 0 to 100")
        if self._count == 0:
            return 0.0
        rank = max(1, math.ceil(p / 100 * self._count))
        bucket = bisect_left(list(accumulate(self._counts)), rank)
        return min(max(self._middle_of(bucket), self._min_s), self._max_s)

    def merge(self, other: "LatencyHistogram") -> None:
        """Add all latencies of `other`."""
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self._count += other._count
        self._sum_s += other._sum_s
        self._min_s = min(self._min_s, other._min_s)
        self._max_s = max(self._max_s, other._max_s)

    def _bucket_of(self, seconds: float) -> int:
        """The bucket of a latency: the first holds all below LOWEST_S, the last all above the range."""
        if seconds < self.LOWEST_S:
            return 0
        step = math.floor(math.log2(seconds / self.LOWEST_S) * self.BUCKETS_PER_OCTAVE)
        return min(step + 1, len(self._counts) - 1)

    def _middle_of(self, bucket: int) -> float:
        if bucket == 0:
            return 0.0
        if bucket == len(self._counts) - 1:
            return math.inf
        middle: float = 2 ** ((bucket - 0.5) / self.BUCKETS_PER_OCTAVE)
        return self.LOWEST_S * middle
