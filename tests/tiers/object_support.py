"""Tiers over a dict of objects, which fail and hang on command."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

from kvortex.tiers import BaseTier


class DictTier(BaseTier):
    """A dict is the store. `before` is awaited before each of its calls, with the call's name and its object's."""

    name = "dict"
    outlives_process = False

    def __init__(self, objects: dict[str, bytes], **named: Any) -> None:
        super().__init__(**named)
        self.objects = objects
        self.calls: list[str] = []
        self.before: Callable[[str, str], Any] = self._turn

    async def _turn(self, call: str, name: str) -> None:
        await asyncio.sleep(0)

    async def _call(self, call: str, name: str = "") -> None:
        self.calls.append(call)
        await self.before(call, name)

    async def connect(self) -> None:
        await self._call("connect")

    async def disconnect(self) -> None:
        self.calls.append("disconnect")

    async def get_object(self, name: str) -> bytes | None:
        await self._call("get", name)
        return self.objects.get(name)

    async def put_object(self, name: str, data: bytes) -> None:
        await self._call("put", name)
        self.objects[name] = data

    async def find_objects(self, names: Sequence[str]) -> list[int]:
        await self._call("find")
        return [len(self.objects.get(name, b"")) for name in names]

    async def delete_objects(self, names: Sequence[str]) -> None:
        await self._call("delete")
        for name in names:
            self.objects.pop(name, None)

    async def list_objects(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        await self._call("list")
        for name, data in list(self.objects.items()):
            if name.startswith(prefix):
                yield name, len(data), 1.0


class UnlistedTier(DictTier):
    lists_objects: ClassVar[bool] = False


def keys_in(tier: DictTier) -> set[bytes]:
    prefix = f"{tier.namespace.hex()}/"
    return {bytes.fromhex(name.removeprefix(prefix)) for name in tier.objects if name.startswith(prefix)}


def failing(*calls: str, error: BaseException | None = None) -> Callable[[str, str], Any]:
    async def before(call: str, name: str) -> None:
        if call in calls:
            raise error or ConnectionError("no route to the store")

    return before


def hanging(*calls: str) -> Callable[[str, str], Any]:
    async def before(call: str, name: str) -> None:
        if call in calls:
            await asyncio.sleep(3600)

    return before
