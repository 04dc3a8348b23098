"""The driver calls of a batch and the wait for its end, compiled: a batch costs Python a call or two.

A C function is called by its address, so that what is compiled can be cached. A result is an int: the driver's
status (0 is success) in what calls the driver.
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
"""No event: the end of what is watched."""

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
    told: NDArray[np.int64],
    work: int,
    done_fd: int,
    unit: int,
) -> bool:
    """Sleep on events in turn until `STOP` comes; returns False if a report could not be written.

    Args:
        driver: addresses of the driver's functions.
        libc: addresses of the C library's functions.
        events: `[capacity]`, a ring of handles, filled in order.
        statuses: `[capacity]`, in which the result of waiting for each is stored.
        told: `[1]`, for what `done_fd` is told.
        work: address of a semaphore that counts the handles stored in `events`.
        done_fd: is told of every status stored, `unit` each: once for all that have fired.
    """
    place, taken = 0, False  # whether the semaphore has been decremented for the event at `place`
    while True:
        while not taken and call(libc[SEM_WAIT], (work,)):
            pass  # interrupted by a signal
        if events[place] == STOP:
            return True
        statuses[place] = call(driver[SYNCHRONIZE], (events[place],))
        place = (place + 1) % events.size
        fired, taken = 1, False
        while call(libc[SEM_TRYWAIT], (work,)) == 0:
            taken = True
            status = call(driver[QUERY], (events[place],)) if events[place] != STOP else NOT_READY
            if status == NOT_READY:
                break
            statuses[place] = status
            place = (place + 1) % events.size
            fired, taken = fired + 1, False
        told[0] = fired * unit
        if call(libc[WRITE], (done_fd, told.ctypes.data, 8)) != 8:
            return False


@njit(cache=True)
def queue_batch(
    driver: NDArray[np.int64],
    loads: bool,
    after: NDArray[np.int64],
    streams: tuple[int, int],
    events: tuple[int, int, int],
    launch: NDArray[np.int64],
    memory: tuple[int, int],
    sizes: tuple[int, int],
    offsets: NDArray[np.int64],
) -> int:
    """Queue a batch in two stages: what fills staging and what empties it; 0, or a failure for `failed_call`.

    Keeps the GIL. For a save the kernel, a gather, is the first stage and the copies are the second; for a load the
    copies come first, then the kernel, a scatter.

    Args:
        driver: addresses of the driver's functions.
        loads: or saves.
        after: events that the kernel waits for.
        streams: raw handles of the stream that runs the kernel and of those that carry the copies.
        events: the end of the staging buffer's last batch, or 0; then those to record when staging is filled, and
            when all is done.
        launch: the kernel's, see `kvortex.cuda.driver.Launch`.
        memory: addresses of the staging buffer and of the pool.
        sizes: bytes of a block in both, and of a piece of the pool, which no copy may cross.
        offsets: byte offset of each block in the pool, `int64 [n]`.
    """
    kernels, copies = streams
    emptied, staged, done = events
    failure = 0
    for stage in range(2):
        moves = (stage == 0) == loads
        stream = copies if moves else kernels
        before, behind = (staged, done) if stage else (emptied, staged)
        if before:
            failure = failure or _checked(driver, WAIT, (stream, before, 0))
        if moves:
            failure = failure or _copy_runs(driver, loads, stream, memory, sizes, offsets)
        else:
            failure = failure or _launch(driver, stream, after, launch)
        failure = failure or _checked(driver, RECORD, (behind, stream))
    return failure


def failed_call(failure: int) -> tuple[int, int]:
    """Which of the driver's functions failed, by its position, and with which status."""
    return divmod(failure, _ONE_KIND)


@njit(cache=True)
def _checked(driver: NDArray[np.int64], kind: int, arguments: tuple[int, ...]) -> int:
    status = call(driver[kind], arguments)
    return kind * _ONE_KIND + status if status else 0


@njit(cache=True)
def _launch(driver: NDArray[np.int64], stream: int, after: NDArray[np.int64], launch: NDArray[np.int64]) -> int:
    failure = 0
    for event in after:
        failure = failure or _checked(driver, WAIT, (stream, event, 0))
    kernel, grid, threads, arguments = launch[0], launch[1], launch[2], launch[3]
    return failure or _checked(driver, LAUNCH, (kernel, grid, 1, 1, threads, 1, 1, 0, stream, arguments, 0))


@njit(cache=True)
def _copy_runs(
    driver: NDArray[np.int64],
    loads: bool,
    stream: int,
    memory: tuple[int, int],
    sizes: tuple[int, int],
    offsets: NDArray[np.int64],
) -> int:
    """Copy blocks that follow each other in one piece of the pool at once."""
    staging, pool = memory
    block_nbytes, piece_nbytes = sizes
    first, failure = 0, 0
    while first < offsets.size and not failure:
        count = run_length(offsets, first, block_nbytes, piece_nbytes)
        target, source = pool + offsets[first], staging + first * block_nbytes
        if loads:
            target, source = source, target
        failure = _checked(driver, COPY, (target, source, count * block_nbytes, stream))
        first += count
    return failure


@njit(cache=True)
def run_length(offsets: NDArray[np.int64], first: int, block_nbytes: int, piece_nbytes: int) -> int:
    """How many extents from `first` on follow each other in one piece of the pool."""
    end = first + 1
    while end < offsets.size and offsets[end] - offsets[end - 1] == block_nbytes and offsets[end] % piece_nbytes:
        end += 1
    return end - first
