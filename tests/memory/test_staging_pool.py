"""Device staging: its bound is on what is out now, and every call reaches the device on the stream that was named."""

import pytest

from kvortex.errors import DoubleFreeError, OutOfPoolMemoryError
from kvortex.memory import DeviceStagingPool

POOL = 41


class RecordingDevice:
    """Hands out the address given back last, as CUDA's pool likes to."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.spare = [0x3000, 0x2000, 0x1000]

    def create_memory_pool(self, *, release_threshold_bytes: int) -> int:
        self.calls.append(("create", release_threshold_bytes))
        return POOL

    def destroy_memory_pool(self, pool: int) -> None:
        self.calls.append(("destroy", pool))

    def allocate_async(self, nbytes: int, pool: int, stream: int) -> int:
        self.calls.append(("allocate", nbytes, pool, stream))
        return self.spare.pop()

    def free_async(self, address: int, stream: int) -> None:
        self.calls.append(("free", address, stream))
        self.spare.append(address)


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


def test_calls_reach_the_device_in_order(device: RecordingDevice) -> None:
    pool = DeviceStagingPool(device, 4096)
    address = pool.allocate(1000, "save", stream=3)
    pool.free(address, stream=5)
    pool.close()
    assert device.calls == [
        ("create", 4096),
        ("allocate", 1000, POOL, 3),
        ("free", address, 5),
        ("destroy", POOL),
    ]


def test_what_came_back_can_be_handed_out_again(device: RecordingDevice) -> None:
    pool = DeviceStagingPool(device, 100)
    for _ in range(3):
        address = pool.allocate(100, "save", stream=0)
        assert (pool.allocated_bytes, pool.figures().largest_free_bytes) == (100, 0)
        with pytest.raises(OutOfPoolMemoryError, match="1 bytes asked, 0 left"):
            pool.allocate(1, "load", stream=0)
        pool.free(address, stream=0)
        with pytest.raises(DoubleFreeError):
            pool.free(address, stream=0)
        assert (pool.allocated_bytes, pool.figures().largest_free_bytes) == (0, 100)
    assert [call[0] for call in device.calls].count("free") == 3
    pool.close()


def test_a_request_beyond_the_bound_does_not_reach_the_device(device: RecordingDevice) -> None:
    pool = DeviceStagingPool(device, 100)
    with pytest.raises(OutOfPoolMemoryError, match="101 bytes asked, 100 left"):
        pool.allocate(101, "save", stream=0)
    assert device.calls == [("create", 100)]
    pool.close()


def test_figures(device: RecordingDevice) -> None:
    pool = DeviceStagingPool(device, 100)
    addresses = [pool.allocate(nbytes, owner, stream=0) for nbytes, owner in ((10, "a"), (20, "b"), (25, "a"))]
    figures = pool.figures()
    assert (figures.name, figures.capacity_bytes, figures.allocated_bytes) == ("staging", 100, 55)
    assert (figures.largest_free_bytes, figures.fragmentation, figures.num_extents) == (45, 0.0, 3)
    assert figures.pinned_bytes == 0
    assert pool.leak_report() == "a: 35 bytes, b: 20 bytes"
    for address in addresses:
        pool.free(address, stream=0)
    assert pool.leak_report() == ""
    pool.close()
