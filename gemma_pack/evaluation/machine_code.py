"""Numbers in loops of our own that numba makes machine code of: bfloat16 by its bits, and the exponential.

What torch computes by several operations, each a pass over memory of its own, such a loop computes while the numbers
are in registers. The first call of each takes a second or two of work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., object])

_SMALLEST: Final = np.float32(-87)
"""Whose exponential is still a normal float32; below it is as good as 0."""
_LOG2_E: Final = np.float32(1.44269504)
_LN2_HIGH: Final = np.float32(0.693359375)
_LN2_LOW: Final = np.float32(-2.12194440e-4)
_POLYNOMIAL: Final = tuple(
    map(np.float32, (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666666e-1, 5.0000001e-1))
)


def compiled(function: Function) -> Function:
    """Compile a function of numbers; several threads may run it at once."""
    made: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)
    return cast("Function", made)


def summing(function: Function) -> Function:
    """Compile a function whose sums may be taken in any order, so that the processor can take many terms at once."""
    made: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})(function)
    return cast("Function", made)


@intrinsic
def _float32_of(context: Any, bits: Any) -> Any:  # noqa: ANN401 - numba's own
    """Return the float32 that 32 bits stand for."""
    del context, bits

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - numba's own
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.float32(types.int32), generate


@intrinsic
def _bits_of(context: Any, number: Any) -> Any:  # noqa: ANN401 - numba's own
    """Return the 32 bits of a float32."""
    del context, number

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - numba's own
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.int32(types.float32), generate


_float32 = cast("Callable[[np.int32], np.float32]", _float32_of)
_bits = cast("Callable[[np.float32], np.int32]", _bits_of)


@compiled
def widened(bits: np.int16) -> np.float32:
    """Return a bfloat16, given by its bits: they are the upper half of a float32's."""
    return _float32(np.int32(bits) << np.int32(16))


@compiled
def rounded(number: np.float32) -> np.int16:
    """Return the bits of the nearest bfloat16, of two as near that whose last bit is 0; of NaN those of a NaN.

    A NaN must be of a bfloat16 or made by the processor: its lower bits are 0, so adding to them changes no other.
    """
    bits = _bits(number)
    last = np.int32(bits >> np.int32(16)) & np.int32(1)
    return np.int16(np.int32(bits + np.int32(0x7FFF) + last) >> np.int32(16))


@compiled
def exponential(x: np.float32) -> np.float32:
    """Return exp(x), x from -87 to 88, within 2 units in the last place; below -87 that of -87.

    exp(x) = 2^n exp(r), n the integer next to x / ln 2, exp(r) by the polynomial of Moshier's Cephes library, expf.c.
    """
    x = max(x, _SMALLEST)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    value = np.float32(0)
    for coefficient in _POLYNOMIAL:
        value = value * r + coefficient
    value = value * r * r + r + np.float32(1)
    return np.float32(value * _float32((np.int32(n) + np.int32(127)) << np.int32(23)))
