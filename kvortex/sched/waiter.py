"""A thread that waits for CUDA events, and the callbacks of events that have fired."""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np

from kvortex.cuda.driver import SYNCHRONIZE, Device, Event
from kvortex.errors import DeviceError
from kvortex.sched.doorbell import Doorbell
from kvortex.sched.native import STOP, libc_calls, report_events

_SEMAPHORE_BYTES = 64  # no `sem_t` is larger

Fired: TypeAlias = Callable[[DeviceError | None], object]


class EventWaiter:
    """Reports events in the order in which they were watched, each with the error if the device failed.

    Its thread works without the GIL: if another thread runs Python code, getting the GIL takes milliseconds. It waits
    for an event, checks which others have fired, and rings the doorbell once for all of them.

    Args:
        device: device of the events.
        name: name of the waiting thread.
        doorbell: rung when events have fired; `fired` then returns their callbacks.
        count_per_event: what each event adds to the doorbell's count; different for waiters that share a doorbell.
        capacity: maximum number of events watched at a time.
    """

    def __init__(self, device: Device, name: str, doorbell: Doorbell, *, count_per_event: int, capacity: int) -> None:
        self._device = device
        self._capacity = capacity
        self._events = np.full(capacity + 1, STOP, dtype=np.int64)  # one more, to stop
        self._statuses = np.zeros(capacity + 1, dtype=np.int32)
        self._callbacks: deque[Fired] = deque()
        self._next_event = 0
        self._next_status = 0
        libc = ctypes.PyDLL(None)  # its calls keep the GIL: none blocks
        self._semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        libc.sem_init(self._semaphore, 0, 1)
        self._work_is_there = partial(libc.sem_post, self._semaphore)
        self._report(doorbell.fd, count_per_event)  # returns at once: compiled here, so that the caller sees an error
        self._thread = threading.Thread(target=self._run, args=(doorbell.fd, count_per_event), name=name, daemon=True)
        self._thread.start()

    def _run(self, doorbell_fd: int, count_per_event: int) -> None:
        self._device.enter_thread()
        if not self._report(doorbell_fd, count_per_event):
            raise OSError(f"descriptor {doorbell_fd} takes no count: no further events are reported")

    def _report(self, doorbell_fd: int, count_per_event: int) -> bool:
        addition, semaphore = np.zeros(1, dtype=np.int64), ctypes.addressof(self._semaphore)
        ended: bool = report_events(
            self._device.calls,
            libc_calls(),
            self._events,
            self._statuses,
            addition,
            semaphore,
            doorbell_fd,
            count_per_event,
        )
        return ended

    def watch(self, event: Event, callback: Fired) -> None:
        """Watch `event`; when it has fired, `fired` returns `callback`."""
        assert len(self._callbacks) < self._capacity
        self._callbacks.append(callback)
        self._push(event)

    def _push(self, event: Event) -> None:
        self._events[self._next_event] = event
        self._next_event = (self._next_event + 1) % len(self._events)
        self._work_is_there()

    def fired(self, count: int) -> Iterator[Callable[[], object]]:
        """Callbacks of the next `count` events, which is the count taken from the doorbell."""
        for _ in range(count):
            status = int(self._statuses[self._next_status])
            self._next_status = (self._next_status + 1) % len(self._statuses)
            error = self._device.error(SYNCHRONIZE, status) if status else None
            yield partial(self._callbacks.popleft(), error)

    def close(self) -> None:
        """Block until all watched events have fired, then end the thread; call it once. Pending callbacks are lost."""
        self._push(STOP)
        self._thread.join()
