"""The one module that imports `numba.cuda`: device operations, compilation, and the simulator's stand-ins.

Kernels are written once, over the operations of `DEVICE_OPS`. On a GPU these are 16-byte loads and stores and
64-bit atomics on raw pointers, and a kernel becomes PTX that the driver launches with raw addresses: a launch
through numba's dispatcher costs 65 us of Python with five arrays, this one a few. Under
`NUMBA_ENABLE_CUDASIM=1`, which knows neither pointers nor warps, they are plain functions on arrays.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numba import cuda, types
from numba.core import config as numba_config

from kvortex.kernels.digest import FIRST, MASK, POSITION, SECOND

SIMULATED: Final = bool(numba_config.ENABLE_CUDASIM)
WARP: Final = 32


@dataclass(frozen=True)
class DeviceOps:
    """What the kernels are built from.

    `load(words, lane)` gives the two words of a 16-byte lane, `store(words, lane, low, high)` writes them;
    `key(position)` and `mix(word, key)` are the digest's arithmetic, keys of later words follow by adding
    `key_step` a word; `warp_sum` adds over a warp; `fetch_add(words, index, value)` is the 64-bit atomic.
    """

    load: Any
    store: Any
    key: Any
    mix: Any
    warp_sum: Any
    fetch_add: Any
    int32: Any
    word: Any
    key_step: Any  # between neighbouring words
    lane_step: Any  # between neighbouring accesses of one thread: 32 lanes of two words
    adders: int  # threads of a warp that add to the digest: one after a warp sum, all without


def _simulated_ops() -> DeviceOps:
    lock = threading.Lock()

    def load(words: Any, lane: int) -> tuple[int, int]:
        return int(words[2 * lane]), int(words[2 * lane + 1])

    def store(words: Any, lane: int, low: int, high: int) -> None:
        words[2 * lane], words[2 * lane + 1] = low, high

    def mix(word: int, key: int) -> int:
        x = word ^ (key & MASK)
        x = (x ^ (x >> 32)) * FIRST & MASK
        x = (x ^ (x >> 29)) * SECOND & MASK
        return x ^ (x >> 32)

    def fetch_add(words: Any, index: int, value: int) -> int:
        # The simulator's own atomics do not wrap around at 64 bits.
        with lock:
            before = int(words[index])
            words[index] = (before + value) & MASK
        return before

    return DeviceOps(
        load=load,
        store=store,
        key=lambda position: (int(position) + 1) * POSITION,
        mix=mix,
        warp_sum=int,
        fetch_add=fetch_add,
        int32=int,
        word=int,
        key_step=POSITION,
        lane_step=2 * WARP * POSITION,
        adders=WARP,
    )


def _device_ops() -> DeviceOps:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    u64, i64 = types.uint64, types.int64
    words_pointer = types.CPointer(u64)
    pair = types.UniTuple(u64, 2)
    lane_type = ir.VectorType(ir.IntType(64), 2)
    position_, first, second = (np.uint64(c) for c in (POSITION, FIRST, SECOND))
    one, b29, b32 = np.uint64(1), np.uint64(29), np.uint64(32)

    def lane_pointer(builder: Any, pointer: Any, lane: Any) -> Any:
        return builder.gep(builder.bitcast(pointer, lane_type.as_pointer()), [lane])

    @intrinsic
    def load(typing_context: Any, words: Any, lane: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(lane_pointer(builder, *arguments), align=16)
            parts = [builder.extract_element(value, ir.Constant(ir.IntType(32), i)) for i in (0, 1)]
            return context.make_tuple(builder, pair, parts)

        return pair(words_pointer, i64), codegen

    @intrinsic
    def store(typing_context: Any, words: Any, lane: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, lane, *parts = arguments
            value = ir.Constant(lane_type, ir.Undefined)
            for i, part in enumerate(parts):
                value = builder.insert_element(value, part, ir.Constant(ir.IntType(32), i))
            builder.store(value, lane_pointer(builder, pointer, lane), align=16)
            return context.get_dummy_value()

        return types.void(words_pointer, i64, u64, u64), codegen

    @intrinsic
    def fetch_add(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, index, value = arguments
            return builder.atomic_rmw("add", builder.gep(pointer, [index]), value, "monotonic")

        return u64(words_pointer, i64, u64), codegen

    @cuda.jit(device=True)
    def key(position: Any) -> Any:
        return (types.uint64(position) + one) * position_

    @cuda.jit(device=True)
    def mix(word: Any, key: Any) -> Any:
        x = word ^ key
        x = (x ^ (x >> b32)) * first
        x = (x ^ (x >> b29)) * second
        return x ^ (x >> b32)

    @cuda.jit(device=True)
    def warp_sum(value: Any) -> Any:
        total = types.int64(value)
        for step in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        return types.uint64(total)

    return DeviceOps(
        load=load,
        store=store,
        key=key,
        mix=mix,
        warp_sum=warp_sum,
        fetch_add=fetch_add,
        int32=types.int32,
        word=types.uint64,
        key_step=position_,
        lane_step=np.uint64(2 * WARP * POSITION & MASK),
        adders=1,
    )


DEVICE_OPS: Final = _simulated_ops() if SIMULATED else _device_ops()


__all__ = ["DEVICE_OPS", "SIMULATED", "DeviceOps", "compile_ptx", "cuda", "device_function", "int32", "simulate"]

int32: Final = types.int32


def device_function(function: Callable[..., Any]) -> Any:
    """A function that kernels may call."""
    return function if SIMULATED else cuda.jit(device=True)(function)


def pointer_signature(arguments: str) -> Any:
    """A kernel signature from one letter an argument: `u` uint64*, `l` int64*, `i` int32*, `n` int64 value."""
    kinds = {
        "u": types.CPointer(types.uint64),
        "l": types.CPointer(types.int64),
        "i": types.CPointer(types.int32),
        "n": types.int64,
    }
    return types.void(*(kinds[letter] for letter in arguments))


def compile_ptx(function: Callable[..., None], arguments: str, compute_capability: tuple[int, int]) -> tuple[str, str]:
    """PTX of a kernel and the name of its entry point."""
    ptx, _ = cuda.compile(
        function,
        pointer_signature(arguments),
        device=False,
        abi="numba",
        cc=compute_capability,
        output="ptx",
    )
    text = ptx.decode() if isinstance(ptx, bytes) else str(ptx)
    entry = next(line for line in text.splitlines() if ".entry" in line)
    return text, entry.split(".entry", 1)[1].split("(")[0].strip()


def simulate(function: Callable[..., None], grid: int, block: int, *arguments: Any) -> None:
    """Run a kernel in numba's simulator, on NumPy arrays in place."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    # Wrapped by hand: the simulator would copy an array to its device, and an arena has gaps that are not mapped.
    wrapped = [FakeCUDAArray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    cuda.jit(function)[grid, block](*wrapped)
