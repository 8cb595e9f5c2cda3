"""That the arithmetic of GPUs, whose reciprocal roots are not exact, gives the int8 codes of IEEE arithmetic.

csrc/formats.h and triton_kernels/formats.py refine a reciprocal root by one step of Newton's. What they get is tried
here for every reciprocal root within 3 ulps, which is more than the errors of NVIDIA's (1.0 ulp) and AMD's (1 ulp).
"""

import numpy as np
import pytest

F32, WIDE = np.float32, np.longdouble
MAGIC = F32(12582912)
ULPS = range(-3, 4)


def fma(a, b, c):
    """Return a * b + c, rounded once: the product of two float32 is exact, and a sum has 11 bits to spare."""
    return (WIDE(a) * WIDE(b) + WIDE(c)).astype(F32)


def moved(x, ulps):
    return (x.view(np.int32) + np.int32(ulps)).view(F32)


def root_of(square, ulps):
    near = moved((1 / np.sqrt(square.astype(WIDE))).astype(F32), ulps)
    root = square * near
    return fma(fma(-root, root, square), F32(0.5) * near, root)


def squares():
    """Those around which a code changes, 200 float32 to each side, and some of all others.

    Elsewhere an error of a few ulps changes no code, as codes grow with their squares.
    """
    edges = (np.arange(1, 255) / 2) ** 2
    near = (edges.astype(F32).view(np.int32)[:, None] + np.arange(-200, 201, dtype=np.int32)).ravel()
    first, last = (int(F32(x).view(np.int32)) for x in (2.0**-18, 16128))
    bits = np.concatenate([near, np.arange(first, last + 3, 997, dtype=np.int32)])
    return bits[bits <= last + 2].view(F32)


def drawn_up(square, below, drawn):
    """Return the code where ``drawn`` of 2^16 random numbers came."""
    rest = fma(-below, below, square)
    return below + (fma(-(F32(drawn) + F32(0.5)), fma(below, F32(2.0**-15), F32(2.0**-16)), rest) > 0)


@pytest.mark.parametrize("ulps", ULPS)
def test_codes_of_first_moments(ulps):
    x = squares()
    exact, near = np.sqrt(x), root_of(x, ulps)
    assert np.array_equal(exact + MAGIC, near + MAGIC)
    for drawn in (0, 1, 1 << 15, (1 << 16) - 1):
        code = drawn_up(x, np.floor(exact), drawn)
        assert np.array_equal(code, drawn_up(x, near - F32(0.5) + MAGIC - MAGIC, drawn))
        assert 0 <= code.min() <= code.max() <= 127


@pytest.mark.parametrize("exponent", [-126, -1, 0, 125])
def test_reciprocals_of_scales(exponent):
    """Scales have 8 digits. Their reciprocals are squares of reciprocal roots, which doubles the error."""
    scale = (np.arange(128, 256) / 128 * 2.0**exponent).astype(F32)
    for ulps in range(-32, 33):
        near = moved(1 / scale, ulps)
        assert np.array_equal(fma(fma(-scale, near, F32(1)), near, near), 1 / scale)


def test_a_worse_reciprocal_root_would_be_seen():
    x = squares()
    assert not np.array_equal(np.sqrt(x) + MAGIC, root_of(x, 1 << 12) + MAGIC)
