"""Follows an owner that is started anew: the engine's planes move to the pool of the new one.

    lost        the owner has ended: nothing is found or saved, transfers in flight end in the old memory
    replaced    another owner listens at the socket: leases end, the old pool is unpinned and unmapped
    joining     the new owner is asked, its memory is mapped, blocks are seen to arrive there
    joined      saves and loads are planned in the new pool

A new owner that refuses, or ends meanwhile, is asked again later, or the next one is.
"""

import asyncio
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final

from kvortex.errors import KVortexError
from kvortex.owner.client import OwnerClient
from kvortex.owner.control import RemoteControl, scratch_of
from kvortex.owner.protocol import Kind
from kvortex.planes.data import DataPlane
from kvortex.runtime.blocking import run_blocking, run_to_its_end

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 0.5
"""Seconds between two looks whether the owner was started anew."""

JOIN_AGAIN_S: Final = 5.0
"""Seconds between two attempts to join an owner that was started anew."""


class OwnerFollower:
    """Has the planes of an engine follow its owner, beside the engine's calls. On one event loop.

    Args:
        control: the remote control plane.
        data: the data plane, over the owner's memory.
        deadline_s: seconds that a call to an owner may take.
        on_left: called when the old pool is over, before its transfers have ended.
    """

    def __init__(self, control: RemoteControl, data: DataPlane, deadline_s: float, on_left: Callable[[], None]) -> None:
        self._control = control
        self._data = data
        self._deadline_s = deadline_s
        self._on_left = on_left
        self._loop = asyncio.get_running_loop()
        self._not_before_s = 0.0
        self._said = ""
        self._moving: asyncio.Task[None] | None = None
        self._look_later()

    def _look_later(self) -> None:
        # A weak reference, so that an engine that is not shut down is not kept by the loop.
        self._timer = self._loop.call_later(LOOK_INTERVAL_S, _look, weakref.ref(self))

    def look(self) -> None:
        """Begin to move if the owner was started anew, or has refused some time ago."""
        self._look_later()
        client = self._control.client
        client.probe()
        is_due = self._moving is None and self._loop.time() >= self._not_before_s
        if is_due and (client.is_replaced or self._data.is_away):
            self._moving = self._loop.create_task(self._move(), name="kvortex-move")

    async def _move(self) -> None:
        self._not_before_s = self._loop.time() + JOIN_AGAIN_S
        try:
            self._on_left()
            await self._data.leave()
            await self._join()
        except KVortexError as error:
            if str(error) != self._said:
                self._said = str(error)
                path = self._control.client.path
                logger.warning("the new owner of the pool at %s cannot be used, so nothing is stored: %s", path, error)
        else:
            self._not_before_s, self._said = 0.0, ""
            logger.info("the pool of the new owner at %s is used", self._control.client.path)
        finally:
            self._moving = None

    async def _join(self) -> None:
        client = await run_to_its_end(self._introduced, OwnerClient.close)
        try:
            try:
                await self._data.enter(client.memory, client.piece_bytes, partial(scratch_of, client))
            finally:
                client.tell(Kind.SCRATCH_DONE)  # otherwise the owner keeps it for as long as this process lives
        except BaseException:
            await run_blocking(client.close)
            raise
        self._control.switch_to(client)  # and at once, so that no plan is carried out in another pool
        self._data.arrive()

    def _introduced(self) -> OwnerClient:
        client = OwnerClient(self._control.client.path, self._deadline_s)
        self._control.introduce(client)
        return client

    async def aclose(self) -> None:
        """Look no more, and wait until nothing is under way; idempotent."""
        self._timer.cancel()
        if self._moving is not None and not self._loop.is_closed():
            self._moving.cancel()
            await asyncio.wait([self._moving])


def _look(follower: "weakref.ref[OwnerFollower]") -> None:
    if (found := follower()) is not None:
        found.look()


__all__ = ["JOIN_AGAIN_S", "OwnerFollower"]
