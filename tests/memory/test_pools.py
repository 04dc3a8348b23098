"""The pinned pool and device staging, on a device that keeps a record."""

import asyncio
import mmap
import threading

import numpy as np
import pytest

from kvortex.errors import (
    ConfigError,
    DeviceError,
    DoubleFreeError,
    ForeignExtentError,
    OutOfPoolMemoryError,
    PoolLeakError,
)
from kvortex.memory import DeviceStagingPool, PinnedPool, numa
from kvortex.types import Extent

PAGE = mmap.PAGESIZE


class FakeDevice:
    """Registers when allowed to, fails when told to."""

    def __init__(self, *, fail_at: int | None = None, gate: threading.Semaphore | None = None) -> None:
        self.registered: dict[int, int] = {}
        self.fail_at = fail_at
        self.gate = gate
        self.next_address = 1 << 20
        self.live: set[int] = set()
        self.pools = 0

    def make_current(self) -> None: ...
    def enter_thread(self) -> None: ...

    def numa_node(self) -> int | None:
        return None

    def register_host(self, address: int, nbytes: int) -> None:
        if self.gate is not None:
            assert self.gate.acquire(timeout=10)
        if self.fail_at is not None and len(self.registered) == self.fail_at:
            raise DeviceError("injected: no more memory can be pinned")
        self.registered[address] = nbytes

    def unregister_host(self, address: int) -> None:
        del self.registered[address]

    def create_memory_pool(self, *, release_threshold_bytes: int) -> int:
        self.pools += 1
        return 7

    def destroy_memory_pool(self, pool: int) -> None:
        self.pools -= 1

    def allocate_async(self, nbytes: int, pool: int, stream: int) -> int:
        if nbytes > 1000:
            raise DeviceError("injected: the device is full")
        self.next_address += 4096
        self.live.add(self.next_address)
        return self.next_address

    def free_async(self, address: int, stream: int) -> None:
        self.live.remove(address)


def test_host_memory_is_ready_at_once_and_exact() -> None:
    with PinnedPool(3 * PAGE + 1) as pool:
        assert pool.capacity_bytes == pool.pinned_bytes == pool.bytes.size == 4 * PAGE
        assert pool.address % PAGE == 0
        pool.view(Extent(128, 256))[:] = 9
        assert pool.bytes[128:384].tolist() == [9] * 256
        assert pool.view(Extent(128, 256), 10).size == 10
        assert not pool.bytes[384:].any()
    pool.close()


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot map"):
        PinnedPool(1 << 60)


async def test_pieces_become_ready_one_by_one() -> None:
    gate = threading.Semaphore(0)
    device = FakeDevice(gate=gate)
    pool = PinnedPool(5 * PAGE, device=device, piece_bytes=2 * PAGE)
    waiting = asyncio.create_task(pool.ready(3 * PAGE))
    await asyncio.sleep(0.01)
    assert not pool.is_ready(1)
    gate.release()
    await pool.ready(2 * PAGE)
    assert not waiting.done()
    gate.release()
    await asyncio.wait_for(waiting, 5)
    gate.release()
    await pool.ready(5 * PAGE)
    assert sorted(device.registered.values()) == [PAGE, 2 * PAGE, 2 * PAGE]
    pool.close()
    assert not device.registered


async def test_a_failure_reaches_whoever_waits() -> None:
    pool = PinnedPool(4 * PAGE, device=FakeDevice(fail_at=1), piece_bytes=2 * PAGE)
    await pool.ready(2 * PAGE)
    with pytest.raises(DeviceError, match="no more memory"):
        await pool.ready(4 * PAGE)
    pool.close()


async def test_closing_while_pinning() -> None:
    gate = threading.Semaphore(0)
    device = FakeDevice(gate=gate)
    pool = PinnedPool(8 * PAGE, device=device, piece_bytes=PAGE)
    waiting = asyncio.create_task(pool.ready(8 * PAGE))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(asyncio.to_thread(pool.close))
    await asyncio.sleep(0.01)
    gate.release()
    await closing
    with pytest.raises(DeviceError, match="closed"):
        await waiting
    assert not device.registered


def test_a_view_outlives_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    pool = PinnedPool(PAGE)
    view = pool.view(Extent(0, 128))
    view[:] = 3
    pool.close()
    assert view.tolist() == [3] * 128
    assert "still alive" in caplog.text


def test_staging_is_bounded_and_accounted() -> None:
    device = FakeDevice()
    pool = DeviceStagingPool(device, 1500)
    first = pool.allocate(1000, "save", stream=0)
    with pytest.raises(OutOfPoolMemoryError, match="left of its bound"):
        pool.allocate(501, "load", stream=0)
    second = pool.allocate(500, "load", stream=0)
    assert pool.figures().allocated_bytes == 1500
    assert pool.leak_report() == "save: 1000 bytes, load: 500 bytes"
    with pytest.raises(PoolLeakError, match="save: 1000"):
        pool.close()
    assert device.pools == 1
    pool.free(first, stream=0)
    with pytest.raises(DoubleFreeError):
        pool.free(first, stream=0)
    with pytest.raises(ForeignExtentError):
        pool.free(12345, stream=0)
    pool.free(second, stream=0)
    pool.close()
    pool.close()
    assert (device.pools, device.live) == (0, set())


def test_a_full_device_is_out_of_memory() -> None:
    pool = DeviceStagingPool(FakeDevice(), 1 << 20)
    with pytest.raises(OutOfPoolMemoryError, match="device has no"):
        pool.allocate(2000, "save", stream=0)
    assert pool.figures().allocated_bytes == 0
    pool.close()


@pytest.mark.parametrize(("text", "nodes"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0,2-3\n", [0, 2, 3])])
def test_numa_nodes(text: str, nodes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.Path, "read_text", lambda self: text)
    assert numa.online_nodes() == nodes


def test_one_node_needs_no_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "online_nodes", lambda: [0])
    assert not numa.prefer_node(0, PAGE, 0)
    monkeypatch.setattr(numa, "online_nodes", lambda: [0, 1])
    assert not numa.prefer_node(0, PAGE, None)


def test_a_preferred_node_is_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "online_nodes", lambda: [0, 1])
    with PinnedPool(4 * PAGE) as pool:
        agreed = numa.prefer_node(pool.address, pool.capacity_bytes, 0)
        pool.bytes[:] = 1  # usable either way
        assert agreed in (True, False)
        assert np.all(pool.bytes == 1)
