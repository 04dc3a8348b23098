"""Packing and unpacking of one unit as LLVM IR: the same instructions for the CPU and the CUDA kernels.

This is IR because numba knows neither bfloat16 nor FP8, and because a GPU has single instructions where a CPU needs
a dozen. `codecs/reference.py` computes the same results in NumPy, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from kvortex.codecs.packing import LOST_STEPS, THERE_STEPS, Format

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def _i32(value: int) -> Any:
    return ir.Constant(I32, value)


def _f32(value: float) -> Any:
    return ir.Constant(F32, value)


@dataclass(frozen=True)
class Emitter:
    """Emits the arithmetic of one format.

    Args:
        fmt: packed format of the units.
        fp8_hardware: the target converts E4M3 itself (compute capability 8.9 and newer).
        pairs_hardware: the target compares pairs of 16-bit integers (compute capability 9.0 and newer).
        cuda: the target is a GPU, which converts half precision itself.
    """

    fmt: Format
    fp8_hardware: bool = False
    pairs_hardware: bool = False
    cuda: bool = False

    # -- elements of the cache ---------------------------------------------------------------------

    def floats(self, b: Any, words: Sequence[Any]) -> list[Any]:
        """Elements of the cache's words as float32."""
        halves = self._halves(b, words)
        if self.fmt.dtype == "float32":
            return [b.bitcast(half, F32) for half in halves]
        return [value for half in halves for value in self._pair_of(b, half)]

    def _halves(self, b: Any, words: Sequence[Any]) -> list[Any]:
        return [b.trunc(bits, I32) for word in words for bits in (word, b.lshr(word, ir.Constant(I64, 32)))]

    def _pair_of(self, b: Any, half: Any) -> list[Any]:
        if self.fmt.dtype == "bfloat16":
            return self._bf16_pair(b, half)
        return [self._half_to_float(b, b.trunc(bits, I16)) for bits in (half, b.lshr(half, _i32(16)))]

    def _bf16_pair(self, b: Any, half: Any) -> list[Any]:
        return [b.bitcast(b.shl(half, _i32(16)), F32), b.bitcast(b.and_(half, _i32(0xFFFF0000)), F32)]

    def _half_to_float(self, b: Any, bits: Any) -> Any:
        if self.cuda:
            return b.fpext(b.bitcast(bits, F16), F32)
        magnitude = b.and_(b.zext(bits, I32), _i32(0x7FFF))
        value = b.fmul(b.bitcast(b.shl(magnitude, _i32(13)), F32), _f32(2.0**112))
        finite = b.icmp_unsigned("<", magnitude, _i32(0x7C00))
        return self._with_sign(b, b.select(finite, value, _f32(float("inf"))), b.zext(bits, I32), 16)

    def _with_sign(self, b: Any, value: Any, bits: Any, shift: int) -> Any:
        sign = b.and_(b.shl(bits, _i32(shift)), _i32(0x80000000))
        return b.bitcast(b.or_(b.bitcast(value, I32), sign), F32)

    def words(self, b: Any, values: Sequence[Any]) -> list[Any]:
        """The cache's words for elements that its dtype can represent."""
        if self.fmt.dtype == "float32":
            halves = [b.bitcast(value, I32) for value in values]
        else:
            halves = [self._half_of(b, *values[i : i + 2]) for i in range(0, len(values), 2)]
        return [self._joined(b, *halves[i : i + 2]) for i in range(0, len(halves), 2)]

    def _half_of(self, b: Any, low: Any, high: Any) -> Any:
        if self.fmt.dtype == "bfloat16":
            bits = b.lshr(b.bitcast(low, I32), _i32(16))
            return b.or_(bits, b.and_(b.bitcast(high, I32), _i32(0xFFFF0000)))
        bits = [b.zext(self._float_to_half(b, value), I32) for value in (low, high)]
        return b.or_(bits[0], b.shl(bits[1], _i32(16)))

    def _float_to_half(self, b: Any, value: Any) -> Any:
        if self.cuda:
            return b.bitcast(b.fptrunc(value, F16), I16)
        bits = b.bitcast(value, I32)
        magnitude = b.bitcast(b.and_(bits, _i32(0x7FFFFFFF)), F32)
        small = b.lshr(b.bitcast(b.fmul(magnitude, _f32(2.0**-112)), I32), _i32(13))
        return b.trunc(b.or_(small, b.and_(b.lshr(bits, _i32(16)), _i32(0x8000))), I16)

    def _joined(self, b: Any, low: Any, high: Any) -> Any:
        return b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), ir.Constant(I64, 32)))

    # -- scales ------------------------------------------------------------------------------------

    def largest(self, b: Any, words: Sequence[Any]) -> Any:
        """Bits of the largest magnitude of a unit."""
        if self.pairs_hardware and self.fmt.dtype != "float32":
            return self._largest_half(b, words)
        largest = _i32(0)
        for value in self.floats(b, words):
            magnitude = b.and_(b.bitcast(value, I32), _i32(0x7FFFFFFF))
            largest = b.select(b.icmp_signed(">", magnitude, largest), magnitude, largest)
        return largest

    def _largest_half(self, b: Any, words: Sequence[Any]) -> Any:
        w, x, y, z = (b.and_(half, _i32(0x7FFF7FFF)) for half in self._halves(b, words))
        largest = _larger_pair(b, _larger_pair(b, w, x), _larger_pair(b, y, z))
        low, high = (b.bitcast(value, I32) for value in self._pair_of(b, largest))
        return b.select(b.icmp_signed(">", low, high), low, high)

    def exponent(self, b: Any, largest: Any) -> Any:
        """Scale byte of a group."""
        exponent = b.lshr(b.add(largest, _i32(0x1FFFFF)), _i32(23))
        exponent = b.select(b.icmp_signed(">", exponent, _i32(9)), exponent, _i32(9))
        return b.select(b.icmp_signed("<", exponent, _i32(255)), exponent, _i32(255))

    # -- codes -------------------------------------------------------------------------------------

    def encode(self, b: Any, words: Sequence[Any], exponent: Any) -> tuple[Any, Any, Any]:
        """A unit's packed word, and the sums of squares of the rounding errors and of the values, in whole steps."""
        values = self.floats(b, words)
        factor = b.bitcast(b.shl(b.sub(_i32(262), exponent), _i32(23)), F32)
        scaled = [b.fmul(value, factor) for value in values]
        word, rounded = self._e4m3(b, scaled) if self.fmt.has_scales else self._bf16(b, values, factor)
        lost, there = _f32(0.0), _f32(0.0)
        for value, back in zip(scaled, rounded, strict=True):
            difference = b.fsub(value, back)
            lost = b.fadd(lost, b.fmul(difference, difference))
            there = b.fadd(there, b.fmul(value, value))
        return word, self._steps(b, lost, LOST_STEPS), self._steps(b, there, THERE_STEPS)

    def _steps(self, b: Any, value: Any, steps: int) -> Any:
        return b.zext(b.fptoui(b.fmul(value, _f32(float(steps))), I32), I64)

    def decode(self, b: Any, word: Any, scales: Any, shift: Any) -> list[Any]:
        """The cache's words for a packed word; `scales` holds the group's scale byte at bit `shift`."""
        if not self.fmt.has_scales:
            halves = b.trunc(word, I32), b.trunc(b.lshr(word, ir.Constant(I64, 32)), I32)
            return self.words(b, [value for half in halves for value in self._bf16_pair(b, half)])
        exponent = b.and_(b.trunc(b.lshr(scales, shift), I32), _i32(0xFF))
        factor = b.bitcast(b.shl(b.sub(exponent, _i32(8)), _i32(23)), F32)
        return self.words(b, [b.fmul(value, factor) for value in self._from_e4m3(b, word)])

    def _bf16(self, b: Any, values: Sequence[Any], factor: Any) -> tuple[Any, list[Any]]:
        rounded = []
        for value in values:
            bits = b.bitcast(value, I32)
            odd = b.and_(b.lshr(bits, _i32(16)), _i32(1))
            rounded.append(b.add(b.add(bits, _i32(0x7FFF)), odd))
        halves = [
            b.or_(b.lshr(rounded[i], _i32(16)), b.and_(rounded[i + 1], _i32(0xFFFF0000)))
            for i in range(0, len(rounded), 2)
        ]
        backs = [b.fmul(b.bitcast(b.and_(bits, _i32(0xFFFF0000)), F32), factor) for bits in rounded]
        return self._joined(b, *halves), backs

    def _e4m3(self, b: Any, scaled: Sequence[Any]) -> tuple[Any, list[Any]]:
        if self.fp8_hardware:
            pairs = [b.zext(_asm(b, I16, "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", *scaled[i : i + 2]), I32)
                     for i in range(0, 8, 2)]  # fmt: skip
        else:
            codes = [self._code(b, value) for value in scaled]
            pairs = [b.or_(codes[i], b.shl(codes[i + 1], _i32(8))) for i in range(0, 8, 2)]
        halves = [b.or_(pairs[i], b.shl(pairs[i + 1], _i32(16))) for i in (0, 2)]
        word = self._joined(b, *halves)
        return word, self._from_e4m3(b, word)

    def _code(self, b: Any, value: Any) -> Any:
        bits = b.bitcast(value, I32)
        magnitude = b.and_(bits, _i32(0x7FFFFFFF))
        odd = b.and_(b.lshr(magnitude, _i32(20)), _i32(1))
        normal = b.sub(b.lshr(b.add(b.add(magnitude, _i32(0x7FFFF)), odd), _i32(20)), _i32(960))
        small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, F32), _f32(16384.0)), I32), _i32(0x46800000))
        code = b.select(b.icmp_unsigned("<", magnitude, _i32(0x3C800000)), small, normal)
        code = b.select(b.icmp_unsigned("<", code, _i32(0x7E)), code, _i32(0x7E))
        return b.or_(code, b.and_(b.lshr(bits, _i32(24)), _i32(0x80)))

    def _from_e4m3(self, b: Any, word: Any) -> list[Any]:
        if self.fp8_hardware:
            values = []
            for i in range(4):
                pair = b.trunc(b.lshr(word, ir.Constant(I64, 16 * i)), I16)
                both = _asm(b, I32, "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", pair)
                halves = b.trunc(both, I16), b.trunc(b.lshr(both, _i32(16)), I16)
                values += [b.fpext(b.bitcast(half, F16), F32) for half in halves]
            return values
        codes = [b.trunc(b.lshr(word, ir.Constant(I64, 8 * i)), I32) for i in range(8)]
        return [
            self._with_sign(
                b,
                b.fmul(b.bitcast(b.shl(b.and_(code, _i32(0x7F)), _i32(20)), F32), _f32(2.0**120)),
                b.and_(code, _i32(0xFF)),
                24,
            )
            for code in codes
        ]


def _larger_pair(b: Any, first: Any, second: Any) -> Any:
    return _asm(b, I32, "max.u16x2 $0, $1, $2;", "=r,r,r", first, second)


def _asm(b: Any, result: Any, text: str, constraints: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.asm(kind, text, constraints, list(arguments), side_effect=False)


@dataclass(frozen=True)
class Conversions:
    """The emitter's functions as numba intrinsics. Words are tuples of `2 * lanes` uint64.

    `largest(words)` int32; `exponent(largest)` int32; `encode(words, exponent)` three uint64;
    `decode(word, scales, shift)` words; `scale_byte(exponent, shift)` uint64.
    """

    largest: Any
    exponent: Any
    encode: Any
    decode: Any
    scale_byte: Any


def make_conversions(emitter: Emitter, intrinsic: Callable[..., Any]) -> Conversions:
    """The intrinsics of one target: `intrinsic` is that of `numba.extending` or of numba-cuda."""
    u64, i32, i64 = types.uint64, types.int32, types.int64
    count = 2 * emitter.fmt.lanes
    unit = types.UniTuple(u64, count)
    coded = types.UniTuple(u64, 3)

    def words_of(builder: Any, value: Any) -> list[Any]:
        return [builder.extract_value(value, i) for i in range(count)]

    @intrinsic
    def largest(typing_context: Any, words: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emitter.largest(builder, words_of(builder, arguments[0]))

        return i32(unit), codegen

    @intrinsic
    def exponent(typing_context: Any, largest: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return emitter.exponent(builder, arguments[0])

        return i32(i32), codegen

    @intrinsic
    def encode(typing_context: Any, words: Any, exponent: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            parts = emitter.encode(builder, words_of(builder, arguments[0]), arguments[1])
            return context.make_tuple(builder, coded, parts)

        return coded(unit, i32), codegen

    @intrinsic
    def decode(typing_context: Any, word: Any, scales: Any, shift: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return context.make_tuple(builder, unit, emitter.decode(builder, *arguments))

        return unit(u64, u64, i64), codegen

    @intrinsic
    def scale_byte(typing_context: Any, exponent: Any, shift: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.shl(builder.zext(arguments[0], I64), arguments[1])

        return u64(i32, i64), codegen

    return Conversions(largest, exponent, encode, decode, scale_byte)
