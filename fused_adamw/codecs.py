"""Reads and writes each storage format in PyTorch. ``formats.py`` says which of them a group asks for.

A format says how a parameter or a moment is read into float32, and how it is written back with one rounding; the rules
in ``reference.py`` never see it. ``csrc/formats.h`` and ``triton_kernels/formats.py`` are the same, to the bit.

*Stochastic rounding* of float32 to bfloat16 adds 16 random bits to the 16 that are cut off: up with the probability of
what is cut off, so that the mean of what is stored is what was computed. The bits are those of Philox 4x32-7 (Salmon et
al., SC 2011), keyed on (seed; step, index of the parameter, number of the element in the whole parameter): two
neighbours share a word of 32. The parameter of the even one draws its lower half, that of the odd one its upper half. A
moment draws the neighbour's half plus a multiple of its own. So what one stream draws is independent of what it draws
elsewhere, and so are parameter and moment of one element: whatever the one is, the other has each of its 65,536 values
once. Of all other pairs this holds but for the two lowest bits, because neither factor, nor their difference, is a
multiple of 8. The bits do not depend on the backend, on chunks, threads or shards. First moments and momentum buffers
in bfloat16, which move by much more than an ulp a step, are rounded to nearest, and so is max_exp_avg_sq. Averages of
parameters in bfloat16, which to nearest would stand still, draw by words of their own, that are independent of these:
their counters have the highest bit set, and no element has so high a number.

*Masters* hold the digits for which a 16-bit parameter has no room, under a name of their own in the state:

- ``kahan``: ``compensation`` c, bfloat16 as the parameter; the value is p + c (arXiv 2010.06192, Algorithm 2).
- ``split16``: ``lower_half``, 16 bits that are kept as a bfloat16, since neither gloo nor NCCL gathers an int16; with a
  bfloat16 parameter as its upper half the value is a float32, exactly.
- ``fp32``: ``master``, float32.

The parameter is the value rounded to nearest; of bfloat16, in split16 and fp32, with ties away from zero, so that each
value has one lower half. Where something else overwrites a parameter, elements of the master that no longer match it
are ignored: a float32 that does not round to it, a compensation beyond an ulp of it. An old lower half (under half an
ulp) or compensation (under one) can still match by chance: ``refresh_masters()`` clears them.

*int8* moments share a float32 scale in blocks of 128 neighbours: the largest magnitude among them, rounded up to 8
binary digits, whose reciprocals all processors agree on after one step of Newton's. A first moment has the sign and
c^2 / 16128 of the scale for c up to 127; a second one is on a logarithmic scale of 8 steps an octave, 256 in all, of
which the least stands for whatever is smaller, so that no denominator vanishes. A block of nothing but subnormals is
0. One with a NaN, an infinity or a magnitude of 2^126 or more is all NaN: its scale is. Rounded to nearest, a small
first moment beside a large one never comes to 0, and a second one decays only with its block; rounded stochastically
both do, on average.
"""

import math

import torch
from torch import Tensor

from fused_adamw.contract import Row, Tensors
from fused_adamw.tensors import Numbering, flat

BLOCK = 128  # elements to a scale


# ---- Stochastic rounding.


def words(
    seed: int, step: int, index: int, numbering: Numbering, n: int, device: torch.device, average: bool = False
) -> Tensor:
    """Return the random word of each of n elements, its own half as the lower, int64 [n]; for averages, other words."""
    offset, run, skip = numbering
    i = torch.arange(n, device=device)
    i = offset + i + i // run * skip
    group = i >> 3
    c = [group & _MASK, group >> 32 | average << 31, torch.full_like(i, step), torch.full_like(i, index)]
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(7):  # the fewest that pass BigCrush
        (high0, low0), (high1, low1) = _product(c[0], 0xD2511F53), _product(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    word = torch.stack(c).gather(0, (i >> 1 & 3)[None])[0]
    return torch.where(i & 1 == 1, (word << 16 | word >> 16) & _MASK, word)


_MASK = 0xFFFFFFFF


def for_parameter(own_first: Tensor) -> Tensor:
    """Return the 16 bits that a parameter draws."""
    return own_first & 0xFFFF


def for_moment(own_first: Tensor, second: bool) -> Tensor:
    """Return the 16 bits that a first or second moment draws."""
    return ((own_first >> 16) + own_first * (0x9E36 if second else 0xBB64)) & 0xFFFF


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of a product. A plain int64 product would overflow into the sign."""
    return (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16, (a * b) & _MASK


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & _MASK


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def stochastic(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability of the part that is cut off; ``random`` has 16 bits."""
    rounded = _from_bits((_bits(x) + random) & 0xFFFF0000)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


# ---- Masters.


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float32 to the parameter of its master: to nearest, in bfloat16 with ties away from zero."""
    if dtype is not torch.bfloat16:
        return x.to(dtype)
    return torch.where(x.isnan(), x, _from_bits((_bits(x) + 0x8000) & 0xFFFF0000)).to(dtype)


def read_master(master: str, p: Tensor, data: Tensor) -> Tensor:
    """Return the float32 that a parameter and the data of its master make together."""
    x = p.float()
    if master == "kahan":
        return torch.where((x + 0.5 * data.float()).to(p.dtype) == p, x + data.float(), x)
    value = data if master == "fp32" else _from_bits((_bits(x) + data.view(torch.int16).long()) & _MASK)
    same = _rounded(value, p.dtype).view(torch.int16) == p.view(torch.int16)  # 0 is not -0
    return torch.where(same, value, x)


def write_master(master: str, x: Tensor, p: Tensor, data: Tensor) -> None:
    """Split a float32 into a parameter and the data of its master, in place."""
    if master == "kahan":
        p.copy_(x)
        data.copy_(x - p.float())
        return
    p.copy_(_rounded(x, p.dtype))
    if master == "fp32":
        data.copy_(x)
    else:
        data.view(torch.int16).copy_(torch.where(x.isnan(), 0, _bits(x)))


# ---- int8.


def encode(x: Tensor, second: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes [n] of a float32 moment (int8; uint8 if it is the second) and their scales, float32 [n / 128].

    ``x`` is dense, and its elements are taken in the order of memory. With 16 ``random`` bits of each they are rounded
    stochastically, without to nearest.
    """
    x = flat(x)
    n, blocks = len(x), -(-len(x) // BLOCK)
    most = torch.nn.functional.pad(_bits(x) & 0x7FFFFFFF, (0, blocks * BLOCK - n)).view(blocks, BLOCK).amax(1)
    scales = _from_bits(torch.where(most < 0x7E800000, (most + 0xFFFF) & 0xFFFF0000, 0x7FC00000))
    inverse = torch.where(scales >= 2.0**-126, 1 / scales, 0).repeat_interleave(BLOCK)[:n]
    if second:
        ratio = _at_least(2.0**-32 * 1.125, x.abs() * inverse)
        added = 0x80000 if random is None else random << 4 | 8
        return (((_bits(ratio) + added) >> 20) - 761).to(torch.uint8), scales
    square = _at_least(2.0**-18, x.abs() * (inverse * 16128))
    code = square.sqrt().round()
    if random is not None:  # up by the place of the value between those of two codes, not of the root
        code, drawn = square.sqrt().floor(), (random.float() + 0.5) / 65536
        # In double no operation rounds, so the sign is that of an fma.
        code += square.double() - code.double().square() > drawn.double() * (2 * code + 1).double()
    return torch.copysign(code, x).to(torch.int8), scales


def _at_least(least: float, x: Tensor) -> Tensor:
    """Return the larger; ``least`` for NaN."""
    return torch.where(x > least, x, least)


def decode(codes: Tensor, scales: Tensor, second: bool) -> Tensor:
    """Return the float32 moment, in the shape and layout of the codes."""
    c = flat(codes).long()
    scales = scales.flatten().repeat_interleave(BLOCK)[: len(c)]
    numbers, unit = (_from_bits((c + 761) << 20), 1.0) if second else ((c * c.abs()).float(), 1 / 16128)
    shaped = torch.empty_like(codes, dtype=torch.float32)
    flat(shaped).copy_(numbers * (scales * unit))
    return shaped


def blocks_across(p: Tensor) -> int | None:
    """Return how many blocks that share a scale each index of p's first dimension has; None if some go across it."""
    inner = math.prod(p.shape[1:])
    return inner // BLOCK if p.dim() > 1 and inner % BLOCK == 0 and p.is_contiguous() else None


def scales_shape(codes: Tensor) -> torch.Size:
    """Return [first dimension, blocks] where the scales can be sharded as the codes are, since no block goes across it.

    Else [blocks], or [blocks, 1] where the order of memory is not that of the indices, so that no two are mistaken.
    """
    across, blocks = blocks_across(codes), -(-codes.numel() // BLOCK)
    if across is not None:
        return torch.Size((codes.shape[0], across))
    return torch.Size((blocks,) if codes.is_contiguous() else (blocks, 1))


# ---- The streams of a row, for the "reference" backend.


def read(row: Row, t: Tensors, compute: torch.dtype) -> list[Tensor]:
    """Return the parameter and its moments in the dtype of the arithmetic, as they are where that is the stored one."""
    p = t.p.to(compute) if t.master_data is None else read_master(row.master, t.p, t.master_data)
    if t.scales:
        coded = enumerate(zip(t.states, t.scales, strict=True))
        return [p, *(decode(codes, scales, j == row.second_moment) for j, (codes, scales) in coded)]
    return [p, *(x.to(compute) for x in t.states)]


def write(row: Row, t: Tensors, p: Tensor, states: list[Tensor], step: int) -> None:
    """Store what :func:`read` returned and a rule changed."""
    random = row.variant.random_streams
    word = None
    if any(random):
        word = words(row.seed, step, row.index, row.numbering, t.p.numel(), t.p.device)
    if t.master_data is not None:
        write_master(row.master, p, t.p, t.master_data)
    else:
        _store(p, t.p, for_parameter(word) if word is not None and random.param else None)
    for j, x in enumerate(states):  # the third is max_exp_avg_sq
        second = j == row.second_moment
        draws = random.second_moment if second else random.first_moment and j == 0
        bits = for_moment(word, second) if word is not None and draws else None
        if t.scales:
            codes, scales = encode(x, second, bits)
            flat(t.states[j]).copy_(codes)
            flat(t.scales[j]).copy_(scales)
        else:
            _store(x, t.states[j], bits)


def move_average(row: Row, t: Tensors, p: Tensor, weight: float, step: int) -> None:
    """Move the average towards the parameter, before that is rounded; round it, in bfloat16, stochastically."""
    if t.ema is None:
        return
    x = t.ema.to(p.dtype).lerp_(p, weight)
    bits = None
    if t.ema.dtype is not p.dtype:
        bits = for_parameter(words(row.seed, step, row.index, row.numbering, p.numel(), p.device, average=True))
    _store(x, t.ema, bits)


def _store(x: Tensor, to: Tensor, random: Tensor | None) -> None:
    if random is not None:
        flat(to).copy_(stochastic(flat(x), random))
    elif x is not to:
        to.copy_(x)
