"""The pinned pool where machines differ, and what its callers may rely on around its end."""

import asyncio
import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest

from kvortex.errors import DeviceError
from kvortex.memory import PinnedPool, numa, pinned

PAGE = mmap.PAGESIZE


class RecordingDevice:
    """Writes down what is asked of it; a gate holds pinning back, a closed device refuses everything."""

    def __init__(self, *, node: int | None = None, gate: threading.Semaphore | None = None) -> None:
        self.node = node
        self.gate = gate
        self.registering = threading.Event()
        self.closed = False
        self.fails = False
        self.calls: list[tuple[str, int]] = []
        self.threads: dict[str, set[int]] = {}

    def _note(self, name: str, value: int = 0) -> None:
        if self.closed:
            raise DeviceError("the device was given back")
        self.calls.append((name, value))
        self.threads.setdefault(name, set()).add(threading.get_ident())

    def named(self, name: str) -> list[int]:
        return [value for call, value in self.calls if call == name]

    def numa_node(self) -> int | None:
        self._note("numa_node")
        return self.node

    def make_current(self) -> None:
        self._note("make_current")

    def enter_thread(self) -> None:
        self._note("enter_thread")

    def register_host(self, address: int, nbytes: int) -> None:
        self.registering.set()
        if self.gate is not None:
            assert self.gate.acquire(timeout=10)
        if self.fails:
            raise DeviceError("injected: no more memory can be pinned")
        self._note("register_host", address)

    def unregister_host(self, address: int) -> None:
        self._note("unregister_host", address)


def test_every_piece_is_pinned_once_lowest_first_and_unpinned() -> None:
    device = RecordingDevice()
    pool = PinnedPool(7 * PAGE, device=device, piece_bytes=2 * PAGE)
    pool.wait_ready(7 * PAGE)
    pinned_at = device.named("register_host")
    assert pinned_at == [pool.address + start * PAGE for start in (0, 2, 4, 6)]
    pool.close()
    assert sorted(device.named("unregister_host")) == pinned_at
    assert pool.pinned_bytes == 0


def test_the_context_is_bound_in_the_thread_that_pins_and_in_the_one_that_closes() -> None:
    device = RecordingDevice()
    pool = PinnedPool(PAGE, device=device)
    pool.wait_ready(PAGE)
    pool.close()
    assert device.threads["register_host"] == device.threads["enter_thread"]
    assert device.threads["unregister_host"] == device.threads["make_current"]
    assert device.threads["register_host"] != device.threads["unregister_host"]


def test_closing_again_asks_nothing_of_a_device_that_is_gone() -> None:
    device = RecordingDevice()
    pool = PinnedPool(2 * PAGE, device=device, piece_bytes=PAGE)
    pool.wait_ready(2 * PAGE)
    pool.close()
    device.closed = True
    pool.close()
    assert len(device.named("unregister_host")) == 2


def test_leaving_the_block_closes() -> None:
    device = RecordingDevice()
    with PinnedPool(PAGE, device=device) as pool:
        pool.wait_ready(PAGE)
    assert device.named("unregister_host") == device.named("register_host")
    assert pool.bytes.size == 0


def test_closing_during_the_first_piece_pins_no_second() -> None:
    gate = threading.Semaphore(0)
    device = RecordingDevice(gate=gate)
    pool = PinnedPool(4 * PAGE, device=device, piece_bytes=PAGE)
    assert device.registering.wait(10)
    closing = threading.Thread(target=pool.close)
    closing.start()
    while not pool._stopping:
        threading.Event().wait(0.001)
    gate.release(4)
    closing.join(10)
    assert device.named("register_host") == device.named("unregister_host") == [pool.address]


async def test_many_wait_for_one_piece_and_all_are_woken() -> None:
    gate = threading.Semaphore(0)
    pool = PinnedPool(2 * PAGE, device=RecordingDevice(gate=gate), piece_bytes=PAGE)
    early = [asyncio.create_task(pool.ready(nbytes)) for nbytes in (1, PAGE)]
    late = [asyncio.create_task(pool.ready(nbytes)) for nbytes in (PAGE + 1, 2 * PAGE)]
    await asyncio.sleep(0.01)
    gate.release()
    await asyncio.wait_for(asyncio.gather(*early), 5)
    assert pool.is_ready(PAGE)
    assert not pool.is_ready(PAGE + 1)
    assert not any(task.done() for task in late)
    gate.release()
    await asyncio.wait_for(asyncio.gather(*late), 5)
    pool.close()


async def test_a_failure_wakes_who_waits_already() -> None:
    gate = threading.Semaphore(0)
    device = RecordingDevice(gate=gate)
    device.fails = True
    pool = PinnedPool(PAGE, device=device)
    waiting = [asyncio.create_task(pool.ready(PAGE)) for _ in range(2)]
    await asyncio.sleep(0.02)
    gate.release()
    for task in waiting:
        with pytest.raises(DeviceError, match="no more memory"):
            await asyncio.wait_for(task, 5)
    pool.close()
    assert device.named("unregister_host") == []


async def test_closing_wakes_who_waits_though_the_driver_does_not_answer() -> None:
    gate = threading.Semaphore(0)
    pool = PinnedPool(PAGE, device=RecordingDevice(gate=gate))
    waiting = asyncio.create_task(pool.ready(PAGE))
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(asyncio.to_thread(pool.close))
    with pytest.raises(DeviceError, match="closed"):
        await asyncio.wait_for(waiting, 5)
    assert not closing.done()
    gate.release()
    await closing


async def test_what_is_ready_costs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("a thread for nothing")

    monkeypatch.setattr(asyncio, "to_thread", refused)
    with PinnedPool(PAGE) as pool:
        await pool.ready(PAGE)


@pytest.mark.parametrize("device", [None, RecordingDevice()])
async def test_nothing_is_ready_after_the_end(device: RecordingDevice | None) -> None:
    pool = PinnedPool(PAGE, device=device)
    await pool.ready(PAGE)
    pool.close()
    assert not pool.is_ready(1)
    with pytest.raises(DeviceError, match="closed"):
        await pool.ready(1)
    with pytest.raises(DeviceError, match="closed"):
        pool.wait_ready(1)


@pytest.mark.parametrize(("agreed", "numa_aware", "node"), [(True, True, 1), (False, True, None), (True, False, None)])
def test_the_node_is_named_when_the_kernel_agreed(
    agreed: bool, numa_aware: bool, node: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int | None]] = []

    def prefer(address: int, nbytes: int, wanted: int | None) -> bool:
        asked.append((address, nbytes, wanted))
        return agreed and wanted is not None

    monkeypatch.setattr(pinned, "prefer_node", prefer)
    with PinnedPool(3 * PAGE, device=RecordingDevice(node=1), numa_aware=numa_aware) as pool:
        assert pool.numa_node == node
        assert asked == [(pool.address, 3 * PAGE, 1 if numa_aware else None)]


def test_a_kernel_without_huge_pages_serves_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class SmallPages(mmap.mmap):
        def madvise(self, option: int, *args: int) -> None:
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(22, "Invalid argument")
            super().madvise(option, *args)

    monkeypatch.setattr(pinned.mmap, "mmap", SmallPages)
    with PinnedPool(PAGE) as pool:
        pool.bytes[:] = 5
        assert pool.is_ready(PAGE)


def test_a_forked_child_does_not_have_the_pool() -> None:
    with PinnedPool(PAGE) as pool:
        pool.bytes[:] = 1
        lines = _smaps_of(pool.address)
        assert "dc" in next(line for line in lines if line.startswith("VmFlags:")).split()


def _smaps_of(address: int) -> list[str]:
    if not os.path.exists("/proc/self/smaps"):
        pytest.skip("the kernel does not list mappings")
    lines: list[str] = []
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                first, last = (int(end, 16) for end in head.split("-"))
                inside = first <= address < last
            if inside:
                lines.append(line)
    return lines


def test_while_held_only_what_somebody_waits_for_is_pinned() -> None:
    gate = threading.Semaphore(0)
    device = RecordingDevice(gate=gate)
    pool = PinnedPool(6 * PAGE, device=device, piece_bytes=PAGE)
    with pool.held():
        gate.release(6)
        pool.wait_ready(3 * PAGE)
        threading.Event().wait(0.05)
        assert pool.pinned_bytes <= 4 * PAGE  # the first may have begun before
    pool.wait_ready(6 * PAGE)
    assert device.named("register_host") == [pool.address + i * PAGE for i in range(6)]
    pool.close()


def test_closing_while_held_ends_the_thread() -> None:
    pool = PinnedPool(4 * PAGE, device=RecordingDevice(), piece_bytes=PAGE)
    with pool.held():
        pool.close()
    assert pool.pinned_bytes == 0


def test_pages_are_made_present() -> None:
    mapping = mmap.mmap(-1, 64 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    before = resident_bytes()
    assert numa.make_present(address, 64 * PAGE)
    assert resident_bytes() - before >= 32 * PAGE
    assert not numa.make_present(address + 1, PAGE)  # not a page's address
    assert bytes(mapping[:16]) == bytes(16)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
