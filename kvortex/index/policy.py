"""Who goes first when room is needed: eviction policies over block keys."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from kvortex.errors import ConfigError


class EvictionPolicy(ABC):
    """An order over keys, coldest first. Not thread-safe: the index calls it under its lock.

    The keys of one `insert` or `access` are a prefix chain, root first. A prefix cache can use a head without
    its tail but never a tail without its head, so after the call a key must not be colder than one behind it.
    """

    @abstractmethod
    def insert(self, keys: Sequence[bytes]) -> None:
        """Take in a chain of keys; a key that is held already counts as accessed."""

    @abstractmethod
    def access(self, keys: Sequence[bytes]) -> None:
        """Note that a chain of keys was used; keys that are not held are ignored."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """Forget a key; one that is not held is ignored."""

    @abstractmethod
    def victims(self) -> Iterator[bytes]:
        """All keys, coldest first. The policy must not be changed while the iterator is in use."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of keys held."""


class LRUPolicy(EvictionPolicy):
    """Least recently used, over chains: a chain's tail is colder than its root. O(1) per key."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, keys: Sequence[bytes]) -> None:
        order = self._order
        for key in reversed(keys):
            order[key] = None
            order.move_to_end(key)

    def access(self, keys: Sequence[bytes]) -> None:
        order = self._order
        for key in reversed(keys):
            if key in order:
                order.move_to_end(key)

    def remove(self, key: bytes) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRUPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """A new, empty policy by its name.

    Raises:
        ConfigError: no policy has that name; the message lists those that exist.
    """
    if name not in _POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
