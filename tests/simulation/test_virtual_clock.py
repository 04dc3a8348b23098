"""The loop with a virtual clock: its time, its order, its end."""

import asyncio
import random
import time

import pytest

from kvortex.testing.simulation import NothingLeftToDoError, VirtualClockLoop


def order_of(shuffle: random.Random | None) -> list[int]:
    loop = VirtualClockLoop(shuffle=shuffle)
    ran: list[int] = []

    async def main() -> None:
        for number in range(10):
            loop.call_soon(ran.append, number)
        await asyncio.sleep(1)

    loop.run_until_complete(main())
    loop.close()
    return ran


def test_hours_pass_in_no_time() -> None:
    loop = VirtualClockLoop()

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.sleep(7200)
        assert await asyncio.to_thread(sum, [1, 2]) == 3
        return loop.time()

    began_s, really_s = loop.time(), time.monotonic()
    assert loop.run_until_complete(main()) - began_s == 3600
    assert time.monotonic() - really_s < 60
    loop.close()


def test_the_order_is_the_one_of_asyncio_or_of_the_dice() -> None:
    assert order_of(None) == list(range(10))
    assert order_of(random.Random(1)) == order_of(random.Random(1)) != list(range(10))
    assert order_of(random.Random(1)) != order_of(random.Random(2))


def test_who_waits_for_ever_is_told_at_once() -> None:
    loop = VirtualClockLoop()
    event = asyncio.Event()
    waiting = loop.create_task(event.wait())
    with pytest.raises(NothingLeftToDoError):
        loop.run_until_complete(waiting)
    loop.call_soon(event.set)
    assert loop.run_until_complete(waiting)
    loop.close()


def test_what_is_raised_after_a_pass_ends_the_run() -> None:
    passes: list[float] = []

    def after_pass() -> None:
        passes.append(loop.time())
        if len(passes) == 3:
            raise ValueError("enough")

    loop = VirtualClockLoop(after_pass=after_pass)
    sleeping = loop.create_task(asyncio.sleep(1))
    with pytest.raises(ValueError, match="enough"):
        loop.run_forever()
    assert not sleeping.cancelled()
    loop.close()
