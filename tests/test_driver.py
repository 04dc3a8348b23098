"""What of the driver's wrapper can be tested without one."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from kvortex.arithmetic import align_up
from kvortex.cuda.driver import Device, KernelArguments, stream_handle
from kvortex.errors import DeviceError, DeviceUnavailableError, UnsupportedKernelError


class WithProtocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 77


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (5, 5),
        (WithProtocol(), 77),
        (SimpleNamespace(cuda_stream=9), 9),
        (SimpleNamespace(ptr=11), 11),
        (SimpleNamespace(handle=SimpleNamespace(value=13)), 13),
        (SimpleNamespace(handle=SimpleNamespace(value=None)), 0),
    ],
)
def test_streams_of_all_kinds(stream: object, handle: int) -> None:
    assert stream_handle(stream) == handle


def test_what_is_no_stream() -> None:
    with pytest.raises(TypeError, match="str is no CUDA stream"):
        stream_handle("stream")


def test_kernel_arguments_lie_where_the_driver_looks() -> None:
    arguments = KernelArguments(1, 2**63 + 5, 3)
    arguments[2] = 99
    pointers = (ctypes.c_void_p * 3).from_address(arguments.address)
    values = [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]
    assert values == [1, 2**63 + 5, 99]


@pytest.mark.parametrize(("nbytes", "up"), [(0, 0), (1, 128), (128, 128), (129, 256), (2**60 + 1, 2**60 + 128)])
def test_align_up(nbytes: int, up: int) -> None:
    assert align_up(nbytes, 128) == up


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(DeviceUnavailableError, match="device 0"):
        Device(0)


@pytest.mark.parametrize(
    ("status", "error"), [(222, UnsupportedKernelError), (218, UnsupportedKernelError), (2, DeviceError)]
)
def test_ptx_that_is_too_new_is_told_from_other_failures(status: int, error: type[DeviceError]) -> None:
    device = Device.__new__(Device)
    names = SimpleNamespace(CUresult=lambda number: SimpleNamespace(name=f"CUDA_ERROR_{number}"))
    device._driver = SimpleNamespace(cuModuleLoadData=lambda image: (status, None), CUresult=names.CUresult)
    with pytest.raises(error, match=f"cuModuleLoadData failed: CUDA_ERROR_{status}") as caught:
        device.load_kernel(".version 99.0", "move")
    assert ("update the driver" in str(caught.value)) == (error is UnsupportedKernelError)
