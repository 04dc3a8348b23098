"""What goes wrong with a server, as our causes."""

from typing import Final

from kvortex.tiers.base import Cause
from kvortex.tiers.redis.resp import ReplyError

_CAUSES: Final = {
    "OOM": Cause.NO_SPACE,
    "NOPERM": Cause.PERMISSION,
    "NOAUTH": Cause.PERMISSION,
    "WRONGPASS": Cause.PERMISSION,
    "TLS": Cause.PERMISSION,
    "READONLY": Cause.READ_ONLY,
}
_LASTING: Final = ("NOPERM", "NOAUTH", "WRONGPASS", "TLS", "ERR")


class StoreFailure(Exception):
    """The server did not do what it was asked to.

    Args:
        error: what the socket or the server said.
    """

    def __init__(self, error: OSError | ReplyError) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.kind = error.code if isinstance(error, ReplyError) else type(error).__name__
        self.cause = _CAUSES.get(self.kind, Cause.IO_ERROR) if isinstance(error, ReplyError) else Cause.IO_ERROR

    @property
    def is_lasting(self) -> bool:
        """True if the server refuses this client, so that another attempt is of no use before somebody acts."""
        return self.kind in _LASTING
