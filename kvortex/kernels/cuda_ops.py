"""The one module that imports `numba.cuda`: device operations, compilation, and the simulator's stand-ins.

Kernels are written once, over the operations of `DEVICE_OPS`. On a GPU these are 16-byte loads and stores and
64-bit atomics on raw pointers. A kernel is compiled to PTX, which the driver launches with raw addresses: that takes
a few microseconds, while a launch through numba's dispatcher takes 65 us of Python with five arrays. Under
`NUMBA_ENABLE_CUDASIM=1`, which has neither pointers nor warps, the operations are plain functions on arrays.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numba import cuda, types
from numba.core import config as numba_config

from kvortex.codecs import reference
from kvortex.codecs.packing import Format
from kvortex.kernels.conversions import Conversions, Emitter, make_conversions
from kvortex.kernels.digest import FIRST, MASK, POSITION, SECOND, mix

SIMULATED: Final = bool(numba_config.ENABLE_CUDASIM)
WARP: Final = 32
_TABLE: Final = "KVORTEX_TABLE"  # placeholder for the name of the table parameter
FIRST_WITH_FP8: Final = (8, 9)
FIRST_WITH_PAIRS: Final = (9, 0)


@dataclass(frozen=True)
class DeviceOps:
    """The device operations that kernels are written with.

    `load(words, lane)` gives the two words of a 16-byte lane, `store(words, lane, low, high)` writes them;
    `load_word` and `store_word` move one word. `key(position)` and `mix(word, key)` are the digest's arithmetic;
    the key of the next word is `key_step` more. `fetch_add(words, index, value)` is the 64-bit atomic.

    Operations over a warp, in which all lanes must take part: `warp_sum(lane, word)`, `warp_largest(lane, int32)`,
    `group_largest` over 16 lanes, `other_half(lane, word)` of the lane 16 away.

    `table_entry(table, index)` is an int32 of a table that the kernel gets by value.
    """

    load: Any
    store: Any
    load_word: Any
    store_word: Any
    key: Any
    mix: Any
    fetch_add: Any
    warp_sum: Any
    warp_largest: Any
    group_largest: Any
    other_half: Any
    table_entry: Any
    int32: Any
    int64: Any
    word: Any
    key_step: Any  # between neighbouring words
    lane_step: Any  # between neighbouring accesses of one thread: 32 lanes of two words


def word_constant(value: int) -> Any:
    """A 64-bit word that kernels may use as a constant."""
    return value if SIMULATED else np.uint64(value)


def int32_constant(value: int) -> Any:
    """A 32-bit integer that kernels may use as a constant."""
    return value if SIMULATED else np.int32(value)


def _simulated_ops() -> DeviceOps:
    lock = threading.Lock()
    barrier = threading.Barrier(WARP)
    values: list[Any] = [None] * WARP

    def exchange(lane: int, value: Any) -> list[Any]:
        # Here a thread block is one warp, and each of its threads is an operating-system thread.
        values[lane] = value
        barrier.wait(60)
        seen = list(values)
        barrier.wait(60)
        return seen

    def load(words: Any, lane: int) -> tuple[int, int]:
        return int(words[2 * lane]), int(words[2 * lane + 1])

    def store(words: Any, lane: int, low: int, high: int) -> None:
        words[2 * lane], words[2 * lane + 1] = low, high

    def store_word(words: Any, index: int, value: int) -> None:
        words[index] = value

    def fetch_add(words: Any, index: int, value: int) -> int:
        # The simulator's own atomics do not wrap around at 64 bits.
        with lock:
            before = int(words[index])
            words[index] = (before + value) & MASK
        return before

    return DeviceOps(
        load=load,
        store=store,
        load_word=lambda words, index: int(words[index]),
        store_word=store_word,
        key=lambda position: (int(position) + 1) * POSITION,
        mix=mix,
        fetch_add=fetch_add,
        warp_sum=lambda lane, value: sum(exchange(lane, value)) & MASK,
        warp_largest=lambda lane, value: max(exchange(lane, value)),
        group_largest=lambda lane, value: max(exchange(lane, value)[lane // 16 * 16 :][:16]),
        other_half=lambda lane, value: exchange(lane, value)[lane ^ 16],
        table_entry=lambda table, index: int(table[index]),
        int32=int,
        int64=int,
        word=int,
        key_step=POSITION,
        lane_step=2 * WARP * POSITION,
    )


def _device_ops() -> DeviceOps:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    u64, i64, i32 = types.uint64, types.int64, types.int32
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
    def load_word(typing_context: Any, words: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(builder.gep(arguments[0], [arguments[1]]), align=8)

        return u64(words_pointer, i64), codegen

    @intrinsic
    def store_word(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.store(arguments[2], builder.gep(arguments[0], [arguments[1]]), align=8)
            return context.get_dummy_value()

        return types.void(words_pointer, i64, u64), codegen

    @intrinsic
    def fetch_add(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, index, value = arguments
            return builder.atomic_rmw("add", builder.gep(pointer, [index]), value, "monotonic")

        return u64(words_pointer, i64, u64), codegen

    @intrinsic
    def table_entry(typing_context: Any, table: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            # Parameters of an entry point have addresses (PTX ISA, ld.param); `compile_ptx` inserts the name.
            offset = builder.shl(arguments[1], ir.Constant(ir.IntType(64), 2))
            text = f"{{ .reg .u64 at; mov.b64 at, {_TABLE}; add.u64 at, at, $1; ld.param.s32 $0, [at]; }}"
            kind = ir.FunctionType(ir.IntType(32), [offset.type])
            return builder.asm(kind, text, "=r,l", [offset], side_effect=False)

        return i32(types.CPointer(i32), i64), codegen

    @intrinsic
    def larger(typing_context: Any, first: Any, second: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.select(builder.icmp_signed(">", *arguments), *arguments)

        return i32(i32, i32), codegen

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
    def warp_sum(lane: Any, value: Any) -> Any:
        total = types.int64(value)
        for step in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        return types.uint64(total)

    @cuda.jit(device=True)
    def group_largest(lane: Any, value: Any) -> Any:
        for step in (8, 4, 2, 1):
            value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
        return value

    @cuda.jit(device=True)
    def warp_largest(lane: Any, value: Any) -> Any:
        for step in (16, 8, 4, 2, 1):
            value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, step))
        return value

    @cuda.jit(device=True)
    def other_half(lane: Any, word: Any) -> Any:
        return types.uint64(cuda.shfl_xor_sync(0xFFFFFFFF, types.int64(word), 16))

    return DeviceOps(
        load=load,
        store=store,
        load_word=load_word,
        store_word=store_word,
        key=key,
        mix=mix,
        fetch_add=fetch_add,
        warp_sum=warp_sum,
        warp_largest=warp_largest,
        group_largest=group_largest,
        other_half=other_half,
        table_entry=table_entry,
        int32=types.int32,
        int64=types.int64,
        word=types.uint64,
        key_step=position_,
        lane_step=np.uint64(2 * WARP * POSITION & MASK),
    )


DEVICE_OPS: Final = _simulated_ops() if SIMULATED else _device_ops()


def pack_ops(fmt: Format, compute_capability: tuple[int, int]) -> Conversions:
    """Conversions of one format for one compute capability; the simulator ignores the latter."""
    if SIMULATED:
        return _simulated_conversions(fmt)
    from numba.cuda.extending import intrinsic

    emitter = Emitter(
        fmt,
        fp8_hardware=compute_capability >= FIRST_WITH_FP8,
        pairs_hardware=compute_capability >= FIRST_WITH_PAIRS,
        cuda=True,
    )
    return make_conversions(emitter, intrinsic)


def _simulated_conversions(fmt: Format) -> Conversions:
    def one(words: tuple[int, ...]) -> Any:
        return np.array([words], dtype=np.uint64)

    def encode(words: tuple[int, ...], exponent: int) -> tuple[int, int, int]:
        packed, lost, there = reference.encode_units(one(words), np.array([exponent], np.int32), fmt)
        return int(packed[0]), int(lost[0]), int(there[0])

    def decode(word: int, scales: int, shift: int) -> tuple[int, ...]:
        exponent = np.array([scales >> shift & 0xFF], np.int32)
        return tuple(reference.decode_units(np.array([word], np.uint64), exponent, fmt)[0].tolist())

    return Conversions(
        largest=lambda words: int(reference.largest_bits(one(words), fmt)[0]),
        exponent=lambda largest: int(reference.scale_exponents(np.array([largest], np.int32))[0]),
        encode=encode,
        decode=decode,
        scale_byte=lambda exponent, shift: exponent << shift,
    )


__all__ = [
    "DEVICE_OPS", "SIMULATED", "ArgumentKind", "DeviceOps",
    "compile_ptx", "cuda", "device_function", "int32", "int32_constant", "nvvm_version", "pack_ops",
    "simulate", "word_constant",
]  # fmt: skip

int32: Final = types.int32


def device_function(function: Callable[..., Any]) -> Any:
    """A function that kernels may call."""
    return function if SIMULATED else cuda.jit(device=True)(function)


class ArgumentKind(Enum):
    """Type of a kernel's argument."""

    WORDS = "uint64*"
    INTEGERS = "int64*"
    TABLE = "int32 [n], copied by the launch"
    INTEGER = "int64"


def _signature(arguments: Sequence[ArgumentKind]) -> Any:
    kinds = {
        ArgumentKind.WORDS: types.CPointer(types.uint64),
        ArgumentKind.INTEGERS: types.CPointer(types.int64),
        ArgumentKind.TABLE: types.CPointer(types.int32),
        ArgumentKind.INTEGER: types.int64,
    }
    return types.void(*(kinds[kind] for kind in arguments))


def compile_ptx(
    function: Callable[..., None],
    arguments: Sequence[ArgumentKind],
    compute_capability: tuple[int, int],
    *,
    threads: int,
    table_entries: int,
) -> tuple[str, str]:
    """PTX of a kernel and the name of its entry point.

    Args:
        function: the kernel's body.
        arguments: types of the kernel's arguments; one is a table.
        compute_capability: (major, minor) of the device.
        threads: maximum threads per thread block; it limits the registers per thread.
        table_entries: length of the table; the launch copies all arguments, at most 4,096 bytes.
    """
    ptx, _ = cuda.compile(
        function,
        _signature(arguments),
        device=False,
        abi="numba",
        cc=compute_capability,
        output="ptx",
    )
    text = ptx.decode() if isinstance(ptx, bytes) else str(ptx)
    entry = next(line for line in text.splitlines() if ".entry" in line)
    name = entry.split(".entry", 1)[1].split("(")[0].strip()
    table = f"{name}_param_{arguments.index(ArgumentKind.TABLE)}"
    text = text.replace(f".param .u64 {table}", f".param .align 8 .b8 {table}[{4 * table_entries}]")
    text = text.replace(_TABLE, table)
    body = text.index("{", text.index(entry))
    # If only one thread block per multiprocessor is required, ptxas assigns as many registers as it wants.
    return f"{text[:body]}.maxntid {threads}, 1, 1\n.minnctapersm 1\n{text[body:]}", name


def nvvm_version() -> tuple[object, ...]:
    """Identifies the NVVM in use: versions of its IR, name and size of its library.

    Its own version number has been the same for years.
    """
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    from numba.cuda.cudadrv.nvvm import NVVM

    try:
        path = load_nvidia_dynamic_lib("nvvm").abs_path
    except DynamicLibNotFoundError:  # then numba-cuda cannot compile and raises an error itself
        return ()
    library = Path(path or "").resolve()
    return (*NVVM().get_ir_version(), library.name, library.stat().st_size if path else 0)


def simulate(function: Callable[..., None], grid: int, block: int, *arguments: Any) -> None:
    """Run a kernel in numba's simulator, on NumPy arrays in place."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    # Wrapped by hand: the simulator would copy an array to its device, and an arena has gaps that are not mapped.
    wrapped = [FakeCUDAArray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    cuda.jit(function)[grid, block](*wrapped)
