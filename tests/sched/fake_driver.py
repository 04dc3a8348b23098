"""A driver without a device: events are semaphores that a test fires, and waiting for them takes no GIL."""

import ctypes
from typing import Any

import numpy as np
from numba import carray, cfunc, types

from kvortex.cuda.driver import COPY, LAUNCH, NOT_READY, QUERY, RECORD, SYNCHRONIZE, WAIT, Launch
from kvortex.errors import DeviceError
from kvortex.sched.native import call

_LIBC = ctypes.CDLL(None)
_WORDS = 16  # of an event: 8 for a `sem_t`, then status, times slept on, times queried
_STATUS, _SLEPT, _QUERIED = 8, 9, 10


def _address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value


_SEM_WAIT, _SEM_TRYWAIT = _address(_LIBC.sem_wait), _address(_LIBC.sem_trywait)


@cfunc(types.int32(types.CPointer(types.int32)))
def _synchronize(event):  # type: ignore[no-untyped-def]
    words = carray(event, _WORDS)
    words[_SLEPT] += 1
    while call(_SEM_WAIT, (words.ctypes.data,)):
        pass
    return words[_STATUS]


@cfunc(types.int32(types.CPointer(types.int32)))
def _query(event):  # type: ignore[no-untyped-def]
    words = carray(event, _WORDS)
    words[_QUERIED] += 1
    return NOT_READY if call(_SEM_TRYWAIT, (words.ctypes.data,)) else words[_STATUS]


class FakeDriver:
    """What `EventWaiter` and `CudaExecutor` need of a `Device`.

    `log` has the calls of batches, names and arguments; `fail_at` names one that fails with status 700.
    """

    ordinal = 0
    compute_capability = (9, 0)

    def __init__(self, num_events: int = 64) -> None:
        self._events = np.zeros((num_events, _WORDS), dtype=np.int32)
        self._num_events = 0
        self._num_handles = 0
        self._host: dict[int, Any] = {}
        self.log: list[tuple[Any, ...]] = []
        self.fail_at = ""
        self._functions = [
            self._function("record", 2),
            self._function("wait", 3),
            _query,
            _synchronize,
            self._function("copy", 4),
            self._function("launch", 11),
        ]
        self.calls = np.zeros(6, dtype=np.int64)
        self.calls[[RECORD, WAIT, COPY, LAUNCH]] = [_address(self._functions[i]) for i in (0, 1, 4, 5)]
        self.calls[[QUERY, SYNCHRONIZE]] = _query.address, _synchronize.address

    def _function(self, name: str, num_arguments: int) -> Any:
        def log(*arguments: int) -> int:
            self.log.append((name, *arguments))
            return 700 if name == self.fail_at else 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * num_arguments)(log)

    # -- events that a test fires ------------------------------------------------------------------

    def create_event(self) -> int:
        address = int(self._events[self._num_events].ctypes.data)
        self._num_events += 1
        assert _LIBC.sem_init(ctypes.c_void_p(address), 0, 0) == 0
        return address

    def _event(self, event: int) -> Any:
        return self._events[(event - self._events.ctypes.data) // (4 * _WORDS)]

    def fire(self, *events: int, status: int = 0) -> None:
        """An event is there to be waited for once."""
        for event in events:
            self._event(event)[_STATUS] = status
            assert _LIBC.sem_post(ctypes.c_void_p(event)) == 0

    def fire_all(self) -> None:
        """Whatever is waited for, or will be, is over."""
        for row in self._events[: self._num_events]:
            for _ in range(4):
                _LIBC.sem_post(ctypes.c_void_p(row.ctypes.data))

    def times_slept_on(self, event: int) -> int:
        return int(self._event(event)[_SLEPT])

    # -- the rest of a device ----------------------------------------------------------------------

    def error(self, position: int, status: int) -> DeviceError:
        return DeviceError(f"call {position}: {status}")

    def make_current(self) -> None:
        pass

    enter_thread = make_current

    def _handle(self, *_: object, **__: object) -> int:
        self._num_handles += 1
        return self._num_handles << 20

    create_stream = create_memory_pool = allocate_async = _handle

    def allocate_host(self, nbytes: int) -> int:
        memory = np.zeros(nbytes, dtype=np.uint8)
        address = int(memory.ctypes.data)
        self._host[address] = memory
        return address

    def free_host(self, address: int) -> None:
        del self._host[address]

    def launch(self, launch: Launch, stream: int) -> None:
        raise AssertionError("batches are launched by compiled code")

    def _nothing(self, *_: object) -> None:
        pass

    destroy_stream = destroy_event = destroy_memory_pool = synchronize_stream = _nothing
    free_async = fill_async = copy_async = _nothing
