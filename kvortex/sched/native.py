"""Compiled functions that make the driver calls of a batch and wait for its end: Python makes one or two calls a batch.

C functions are called by their addresses, so that numba can cache the compiled code. Functions that call the driver
return its status as an int; 0 is success.
"""

import ctypes
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvortex.cuda.driver import COPY, LAUNCH, NOT_READY, QUERY, RECORD, SYNCHRONIZE, WAIT
from kvortex.runtime.jit import njit

SEM_WAIT, SEM_TRYWAIT, WRITE = range(3)
"""Positions in `libc_calls()`."""

STOP: Final = 0
"""Stands in the ring instead of an event: there is nothing more to watch."""

_ONE_KIND: Final = 1 << 32


def libc_calls() -> NDArray[np.int64]:
    """Addresses `int64 [3]` of the C library's functions that `report_events` needs."""
    libc = ctypes.CDLL(None)
    functions = (libc.sem_wait, libc.sem_trywait, libc.write)
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in functions], dtype=np.int64)


@intrinsic
def call(_context: Any, address: Any, arguments: Any) -> Any:
    """`(int64, tuple of integers)` -> int64: what the C function at `address` returns as an `int`."""
    # Integers of any width and pointers go into 64-bit registers and stack slots alike on x86-64 and AArch64.
    word, result = ir.IntType(64), ir.IntType(32)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = cgutils.unpack_tuple(builder, values[1])
        words = [
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(given, signature.args[1], strict=True)
        ]
        pointer = ir.FunctionType(result, [word] * len(words)).as_pointer()
        return builder.sext(builder.call(builder.inttoptr(values[0], pointer), words), word)

    return types.int64(types.int64, arguments), generate


@njit(nogil=True, cache=True)
def report_events(
    driver: NDArray[np.int64],
    libc: NDArray[np.int64],
    events: NDArray[np.int64],
    statuses: NDArray[np.int32],
    addition: NDArray[np.int64],
    semaphore: int,
    doorbell_fd: int,
    count_per_event: int,
) -> bool:
    """Sleep on events in turn until `STOP` comes; returns False if the doorbell could not be rung.

    Args:
        driver: addresses of the driver's functions.
        libc: addresses of the C library's functions.
        events: `[capacity]`, a ring of handles, filled in order.
        statuses: `[capacity]`; the result of waiting for an event is stored at the event's position.
        addition: `[1]`, scratch: what is added to the doorbell's count.
        semaphore: address of a semaphore that counts the handles stored in `events`.
        doorbell_fd: descriptor of a `Doorbell`, which is rung once for all events that have fired.
        count_per_event: what each of them adds to the doorbell's count.
    """
    place, is_counted = 0, False  # whether the semaphore has been decremented for the event at `place`
    while True:
        while not is_counted and call(libc[SEM_WAIT], (semaphore,)):
            pass  # interrupted by a signal
        if events[place] == STOP:
            return True
        statuses[place] = call(driver[SYNCHRONIZE], (events[place],))
        place = (place + 1) % events.size
        fired, is_counted = 1, False
        while call(libc[SEM_TRYWAIT], (semaphore,)) == 0:
            is_counted = True
            status = call(driver[QUERY], (events[place],)) if events[place] != STOP else NOT_READY
            if status == NOT_READY:
                break
            statuses[place] = status
            place = (place + 1) % events.size
            fired, is_counted = fired + 1, False
        addition[0] = fired * count_per_event
        if call(libc[WRITE], (doorbell_fd, addition.ctypes.data, 8)) != 8:
            return False


@njit(cache=True)
def queue_save(
    driver: NDArray[np.int64],
    kernel_stream: int,
    copy_stream: int,
    emptied: int,
    staged: int,
    done: int,
    staging: int,
    pool: int,
    block_nbytes: int,
    piece_nbytes: int,
    after: NDArray[np.int64],
    launch: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> int:
    """Queue a batch of saves: a kernel gathers blocks into staging, then they are copied to the pool.

    Keeps the GIL. Returns 0, or a failure for `failed_call`. The arguments are flat: numba takes a microsecond to look
    at a named tuple.

    Args:
        driver: addresses of the driver's functions.
        kernel_stream, copy_stream: raw handles of the streams that run the kernel and the copies.
        emptied: event to wait for: the end of the last batch that used the staging buffer, or 0.
        staged: event to record when the staging buffer is filled.
        done: event to record when the batch has ended.
        staging, pool: addresses of the staging buffer and of the pool.
        block_nbytes: bytes from one block to the next, in both.
        piece_nbytes: bytes of a piece of the pool, which no copy may cross.
        after: events that the kernel waits for, `int64 [m]`.
        launch: the kernel's launch, see `kvortex.cuda.driver.Launch`.
        offsets: byte offset of each block in the pool, `int64 [n]`.
    """
    failure: int = _wait(driver, kernel_stream, emptied)
    failure = failure or _launch(driver, kernel_stream, after, launch)
    failure = failure or _checked(driver, RECORD, (staged, kernel_stream))
    failure = failure or _wait(driver, copy_stream, staged)
    failure = failure or _copy_runs(driver, copy_stream, True, staging, pool, block_nbytes, piece_nbytes, offsets)
    return failure or _checked(driver, RECORD, (done, copy_stream))


@njit(cache=True)
def queue_load(
    driver: NDArray[np.int64],
    kernel_stream: int,
    copy_stream: int,
    emptied: int,
    staged: int,
    done: int,
    staging: int,
    pool: int,
    block_nbytes: int,
    piece_nbytes: int,
    after: NDArray[np.int64],
    launch: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> int:
    """Queue a batch of loads: blocks are copied from the pool to staging, then a kernel scatters them.

    Arguments and result are those of `queue_save`.
    """
    failure: int = _wait(driver, copy_stream, emptied)
    failure = failure or _copy_runs(driver, copy_stream, False, staging, pool, block_nbytes, piece_nbytes, offsets)
    failure = failure or _checked(driver, RECORD, (staged, copy_stream))
    failure = failure or _wait(driver, kernel_stream, staged)
    failure = failure or _launch(driver, kernel_stream, after, launch)
    return failure or _checked(driver, RECORD, (done, kernel_stream))


def failed_call(failure: int) -> tuple[int, int]:
    """Which of the driver's functions failed, by its position, and with which status."""
    return divmod(failure, _ONE_KIND)


@njit(cache=True)
def _checked(driver: NDArray[np.int64], kind: int, arguments: tuple[int, ...]) -> int:
    status: int = call(driver[kind], arguments)
    return kind * _ONE_KIND + status if status else 0


@njit(cache=True)
def _wait(driver: NDArray[np.int64], stream: int, event: int) -> int:
    return _checked(driver, WAIT, (stream, event, 0)) if event else 0


@njit(cache=True)
def _launch(driver: NDArray[np.int64], stream: int, after: NDArray[np.int64], launch: NDArray[np.int64]) -> int:
    failure = 0
    for event in after:
        failure = failure or _wait(driver, stream, event)
    kernel, grid, threads, arguments = launch[0], launch[1], launch[2], launch[3]
    return failure or _checked(driver, LAUNCH, (kernel, grid, 1, 1, threads, 1, 1, 0, stream, arguments, 0))


@njit(cache=True)
def _copy_runs(
    driver: NDArray[np.int64],
    stream: int,
    to_pool: bool,
    staging: int,
    pool: int,
    block_nbytes: int,
    piece_nbytes: int,
    offsets: NDArray[np.int64],
) -> int:
    first, failure = 0, 0
    while first < offsets.size and not failure:
        count = run_length(offsets, first, block_nbytes, piece_nbytes)
        in_pool, in_staging = pool + offsets[first], staging + first * block_nbytes
        target, source = (in_pool, in_staging) if to_pool else (in_staging, in_pool)
        failure = _checked(driver, COPY, (target, source, count * block_nbytes, stream))
        first += count
    return failure


@njit(cache=True)
def run_length(offsets: NDArray[np.int64], first: int, block_nbytes: int, piece_nbytes: int) -> int:
    """How many extents from `first` on follow each other in one piece of the pool: they are copied at once."""
    end = first + 1
    while end < offsets.size and offsets[end] - offsets[end - 1] == block_nbytes and offsets[end] % piece_nbytes:
        end += 1
    return end - first
