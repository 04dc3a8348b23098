"""What the tier needs of a store of objects."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing: its name in its folder, and its bytes."""

    name: str
    nbytes: int


class Objects(Protocol):
    """The objects of one folder. Every call raises `StoreFailure` if the store does not do what it is asked to."""

    async def put(self, name: str, data: NDArray[np.uint8] | bytes) -> None:
        """Store an object, which nobody sees before it is complete. The memory must not change any more."""
        ...

    async def get(self, name: str, start: int, stop: int) -> tuple[NDArray[np.uint8], int]:
        """Bytes `start` to `stop` of an object, or fewer if it is shorter, and the number of bytes of the whole."""
        ...

    def pages(self, after: str = "") -> AsyncIterator[list[Listed]]:
        """The objects whose names come after this one, in order, up to 1000 at a time. A page takes one request."""
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""
        ...

    def close(self) -> None:
        """Close the connections; nothing may be asked any more."""
        ...
