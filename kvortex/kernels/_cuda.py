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

from kvortex.codecs import reference
from kvortex.codecs.packing import Format
from kvortex.kernels.conversions import Emitter, make_conversions
from kvortex.kernels.digest import FIRST, MASK, POSITION, SECOND

SIMULATED: Final = bool(numba_config.ENABLE_CUDASIM)
WARP: Final = 32
FIRST_WITH_FP8: Final = (8, 9)
INFINITE_BITS: Final = 0x7F800000


@dataclass(frozen=True)
class DeviceOps:
    """What the kernels are built from.

    `load(words, lane)` gives the two words of a 16-byte lane, `store(words, lane, low, high)` writes them;
    `key(position)` and `mix(word, key)` are the digest's arithmetic, keys of later words follow by adding
    `key_step` a word; `warp_sum` adds over a warp; `fetch_add(words, index, value)` and `fetch_max` are 64-bit atomics.
    """

    load: Any
    store: Any
    key: Any
    mix: Any
    warp_sum: Any
    fetch_add: Any
    fetch_max: Any
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

    def fetch_max(words: Any, index: int, value: int) -> int:
        with lock:
            before = int(words[index])
            words[index] = max(before, value)
        return before

    return DeviceOps(
        load=load,
        store=store,
        key=lambda position: (int(position) + 1) * POSITION,
        mix=mix,
        warp_sum=int,
        fetch_add=fetch_add,
        fetch_max=fetch_max,
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

    @intrinsic
    def fetch_max(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, index, value = arguments
            return builder.atomic_rmw("umax", builder.gep(pointer, [index]), value, "monotonic")

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
        fetch_max=fetch_max,
        int32=types.int32,
        word=types.uint64,
        key_step=position_,
        lane_step=np.uint64(2 * WARP * POSITION & MASK),
        adders=1,
    )


@dataclass(frozen=True)
class PackOps:
    """What packing kernels are built from besides `DeviceOps`, for one format.

    Of a unit: `largest`, `exponent`, `encode`, `decode`, `scale_byte`, `error_bits` as `Conversions` says. Over the
    lanes of a warp, every lane taking part: `group_largest(lane, value)` over 16 lanes, `warp_largest`,
    `warp_sum(lane, words)`, `warp_total(lane, float)`, `other_half(lane, word)` of the lane 16 away. `load_word`
    and `store_word` move 8 bytes.
    """

    largest: Any
    exponent: Any
    encode: Any
    decode: Any
    scale_byte: Any
    error_bits: Any
    group_largest: Any
    warp_largest: Any
    warp_sum: Any
    warp_total: Any
    other_half: Any
    load_word: Any
    store_word: Any


def _simulated_pack_ops(fmt: Format) -> PackOps:
    barrier = threading.Barrier(WARP)
    values: list[Any] = [None] * WARP

    def exchange(lane: int, value: Any) -> list[Any]:
        # A block is one warp here, and each of its threads is a real one.
        values[lane] = value
        barrier.wait(60)
        seen = list(values)
        barrier.wait(60)
        return seen

    def one(words: tuple[int, ...]) -> Any:
        return np.array([words], dtype=np.uint64)

    def encode(words: tuple[int, ...], exponent: int) -> tuple[int, Any, Any]:
        with np.errstate(all="ignore"):
            packed, lost, there = reference.encode_units(one(words), np.array([exponent], np.int32), fmt)
        return int(packed[0]), lost[0], there[0]

    def decode(word: int, scales: int, shift: int) -> tuple[int, ...]:
        exponent = np.array([scales >> shift & 0xFF], np.int32)
        with np.errstate(all="ignore"):
            return tuple(reference.decode_units(np.array([word], np.uint64), exponent, fmt)[0].tolist())

    def error_bits(lost: Any, there: Any, largest: int) -> int:
        if largest > fmt.largest_bits:
            return INFINITE_BITS
        return int(np.float32(lost / there).view(np.uint32)) if there > 0 else 0

    def store_word(words: Any, index: int, value: int) -> None:
        words[index] = value

    return PackOps(
        largest=lambda words: int(reference.largest_bits(one(words), fmt)[0]),
        exponent=lambda largest: int(reference.scale_exponents(np.array([largest], np.int32))[0]),
        encode=encode,
        decode=decode,
        scale_byte=lambda exponent, shift: exponent << shift,
        error_bits=error_bits,
        group_largest=lambda lane, value: max(exchange(lane, value)[lane // 16 * 16 :][:16]),
        warp_largest=lambda lane, value: max(exchange(lane, value)),
        warp_sum=lambda lane, value: sum(exchange(lane, value)) & MASK,
        warp_total=lambda lane, value: sum(exchange(lane, value), np.float32(0)),
        other_half=lambda lane, value: exchange(lane, value)[lane ^ 16],
        load_word=lambda words, index: int(words[index]),
        store_word=store_word,
    )


def _device_pack_ops(fmt: Format, compute_capability: tuple[int, int]) -> PackOps:
    from numba.cuda.extending import intrinsic

    emitter = Emitter(fmt, fp8_hardware=compute_capability >= FIRST_WITH_FP8, cuda=True)
    conversions = make_conversions(emitter, intrinsic)
    sum_words = DEVICE_OPS.warp_sum
    u64, i64 = types.uint64, types.int64
    words_pointer = types.CPointer(u64)

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
    def larger(typing_context: Any, first: Any, second: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.select(builder.icmp_signed(">", *arguments), *arguments)

        return types.int32(types.int32, types.int32), codegen

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
    def warp_sum(lane: Any, value: Any) -> Any:
        return sum_words(value)

    @cuda.jit(device=True)
    def warp_total(lane: Any, value: Any) -> Any:
        for step in (16, 8, 4, 2, 1):
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, step)
        return value

    @cuda.jit(device=True)
    def other_half(lane: Any, word: Any) -> Any:
        return types.uint64(cuda.shfl_xor_sync(0xFFFFFFFF, types.int64(word), 16))

    return PackOps(
        largest=conversions.largest,
        exponent=conversions.exponent,
        encode=conversions.encode,
        decode=conversions.decode,
        scale_byte=conversions.scale_byte,
        error_bits=conversions.error_bits,
        group_largest=group_largest,
        warp_largest=warp_largest,
        warp_sum=warp_sum,
        warp_total=warp_total,
        other_half=other_half,
        load_word=load_word,
        store_word=store_word,
    )


DEVICE_OPS: Final = _simulated_ops() if SIMULATED else _device_ops()


def pack_ops(fmt: Format, compute_capability: tuple[int, int]) -> PackOps:
    """Operations of one format on devices of one compute capability; the simulator has none."""
    return _simulated_pack_ops(fmt) if SIMULATED else _device_pack_ops(fmt, compute_capability)


__all__ = [
    "DEVICE_OPS", "SIMULATED", "WARP", "DeviceOps", "PackOps",
    "compile_ptx", "cuda", "device_function", "int32", "pack_ops", "simulate",
]  # fmt: skip

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
