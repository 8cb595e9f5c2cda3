"""How values are stored, beside the rules: what a group keeps of a parameter, and each format in PyTorch.

A format says how a parameter or a moment is read into float32, and how it is written back with one rounding; the rules
in ``reference.py`` never know. ``csrc/formats.h`` and ``triton_kernels/formats.py`` are the same, to the bit.

*Stochastic rounding* of float32 to bfloat16 adds 16 random bits to the 16 that are cut off: up with the probability of
what is cut off, so that the mean of what is stored is what was computed. The bits are those of Philox 4x32-10 (Salmon
et al., SC 2011), keyed on (seed; step, index of the parameter, number of the element in the whole parameter): every
element has a word of 32, of which the parameter takes the upper half, the second moment the lower, and the int8 code of
a first moment 16 bits that mix both. They do not depend on the backend, on chunks, threads or shards. First moments
and momentum buffers in bfloat16, which move by much more than an ulp a step, are rounded to nearest, and so is
max_exp_avg_sq.

*Masters* hold the digits for which a 16-bit parameter has no room, under a name of their own in the state:

- ``kahan``: ``compensation`` c, bfloat16 as the parameter; the value is p + c (arXiv 2010.06192, Algorithm 2).
- ``split16``: ``remainder``, int16; with a bfloat16 parameter as its upper half the value is a float32, exactly.
- ``fp32``: ``master``, float32.

The parameter is the value rounded to nearest; of bfloat16, in split16 and fp32, with ties away from zero, so that each
value has one remainder. A parameter that something else overwrites is noticed, element by element: a float32 that does
not round to it, or a compensation beyond an ulp of it, counts for nothing. What may stay is the old remainder, less
than half an ulp of the new value, or a compensation of less than one, until ``refresh_masters()``.

*int8* moments share a float32 scale in blocks of 128 neighbours, the largest finite magnitude among them. A first
moment has the sign and (c / 127)^2 of the scale; a second one is on a logarithmic scale of 8 steps an octave, 254 in
all, and 0 only if it was 0, so that no denominator vanishes. Each has a code for NaN, which infinities become. Rounded
to nearest, a small first moment beside a large one never comes to 0, and a second one decays only with its block;
rounded stochastically both do, on average.
"""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from fused_adamw.options import Rounding

if TYPE_CHECKING:
    from fused_adamw.plan import Row

MASTERS = {"kahan": "compensation", "split16": "remainder", "fp32": "master"}  # and their names in the state
ROUNDINGS = get_args(Rounding)
INT8 = ("int8", torch.int8)
BLOCK = 128  # elements to a scale
SMALL = 4096  # elements; moments of fewer are float32 where int8 is asked for
NARROW = (torch.bfloat16, torch.float16)
SECOND = "exp_avg_sq"
WHOLE = (0, 1 << 62, 0)  # the place of what is no shard: (offset, run, skip) of csrc/step.h


class Kept(NamedTuple):
    """In what form a parameter and its moments are kept."""

    master: str = "none"
    stochastic: bool = False
    int8: bool = False

    def moments(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names in the state of these moments."""
        return tuple(f"{name}_codes" for name in names) if self.int8 else names

    def scales(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """And of their scales."""
        return tuple(f"{name}_scales" for name in names) if self.int8 else ()

    @property
    def extra(self) -> str | None:
        """And of what the master holds."""
        return MASTERS.get(self.master)


def kept(p: Tensor, group: Mapping[str, Any], names: tuple[str, ...]) -> Kept:
    """How ``group`` keeps ``p`` and the moments ``names``; raises TypeError for what cannot be."""
    narrow, master = p.dtype in NARROW, group.get("master")
    master = master if narrow and master else "none"
    stochastic = group.get("rounding") == "stochastic"
    if p.dtype is torch.float16 and master in ("kahan", "split16"):
        raise TypeError(f'master="{master}" is for bfloat16 parameters, and this one is float16: use master="fp32"')
    if p.dtype is torch.float16 and master == "none" and stochastic:
        raise TypeError(
            'rounding="stochastic" rounds to bfloat16, and this parameter is float16: give its group master="fp32", '
            'or rounding="nearest"'
        )
    int8 = group.get("state_dtype") in INT8 and bool(names) and p.numel() >= SMALL
    if p.dim() == 1 and any(not placement.is_replicate() for placement in getattr(p, "placements", ())):
        int8 = False  # a sharded vector, whose blocks ranks would share
    if int8 and (p.is_complex() or p.dtype is torch.float64):
        raise TypeError(f"{p.dtype} with int8 moments is not supported: give this group another state_dtype")
    random = int8 or (SECOND in names and group.get("state_dtype") is torch.bfloat16)
    stochastic = stochastic and (random or (p.dtype is torch.bfloat16 and master == "none"))
    return Kept(master, stochastic, int8)


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of formats that there is not."""
    if group.get("rounding", "nearest") not in ROUNDINGS:
        raise ValueError(f"rounding={group['rounding']!r}: must be one of {', '.join(map(repr, ROUNDINGS))}")
    if group.get("master") not in (None, *MASTERS):
        raise ValueError(f"master={group['master']!r}: must be None or one of {', '.join(map(repr, MASTERS))}")
    seed = group.get("seed", 0)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r}: must be a whole number from 0 to 2**63 - 1")
    if group.get("state_dtype") in INT8 and group.get("amsgrad"):
        raise ValueError(
            "state_dtype='int8' with amsgrad=True is not supported, a running maximum only grows, with its errors: "
            "use state_dtype=torch.bfloat16"
        )


def warn_of_losses(p: Tensor, group: Mapping[str, Any], names: tuple[str, ...], form: Kept) -> None:
    """Warn, once each, of updates that rounding to nearest loses."""
    if p.dtype in NARROW and form.master == "none" and not form.stochastic:
        _warn_once(
            "Parameters in bfloat16 or float16 are trained with rounding to nearest and no master: an update of less "
            "than half an ulp (1/512 of a bfloat16, 1/4096 of a float16) is lost, and weight decay is the first to go. "
            'Cures, as arguments of the optimizer: rounding="stochastic" (bfloat16, no more memory), master="kahan" or '
            '"split16" (bfloat16, 2 bytes more a parameter), master="fp32" (4 bytes).'
        )
    if form.int8 and not form.stochastic:
        _warn_once(
            "Moments in int8 are rounded to nearest: a second one hardly ever decays, and a small first one beside "
            'large ones never comes to 0. Use rounding="stochastic", with which both do on average.'
        )
    if SECOND not in names or form.stochastic or group.get("state_dtype") not in NARROW:
        return
    if 1 - float(group["betas"][1]) < torch.finfo(group["state_dtype"]).eps / 2:
        _warn_once(
            f"Second moments in {group['state_dtype']} with beta2 = {float(group['betas'][1])} never decay under "
            'rounding to nearest: use rounding="stochastic" (bfloat16), or float32 moments, which are the default.'
        )


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


# ---- Stochastic rounding.


def words(seed: int, step: int, index: int, place: tuple[int, int, int], n: int, device: torch.device) -> Tensor:
    """The 32 random bits of each of n elements, int64 [n]."""
    offset, run, skip = place
    i = torch.arange(n, device=device)
    i = offset + i + i // run * skip
    group = i >> 2
    c = [group & _MASK, group >> 32, torch.full_like(i, step), torch.full_like(i, index)]
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c[0], 0xD2511F53), _product(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack(c).gather(0, (i & 3)[None])[0]


_MASK = 0xFFFFFFFF


def for_second_moment(word: Tensor) -> Tensor:
    """The lower half; the upper is the parameter's."""
    return word & 0xFFFF


def for_first_moment(word: Tensor) -> Tensor:
    """16 bits of which any given half of the word tells nothing."""
    return (word * 0x9E3779B9 & _MASK) >> 16


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The halves of the 64 bits of a product, without a sign bit in the way."""
    return (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16, (a * b) & _MASK


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & _MASK


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def stochastic(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16, up with the probability of what is cut off; ``random`` has 16 bits."""
    rounded = _from_bits((_bits(x) + random) & 0xFFFF0000)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


# ---- Masters.


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the parameter is of a float32: to nearest, of bfloat16 with ties away from zero."""
    if dtype is not torch.bfloat16:
        return x.to(dtype)
    return torch.where(x.isnan(), x, _from_bits((_bits(x) + 0x8000) & 0xFFFF0000)).to(dtype)


def read_master(master: str, p: Tensor, extra: Tensor) -> Tensor:
    """The float32 that a parameter and its extra stream are."""
    x = p.float()
    if master == "kahan":
        return torch.where((x + 0.5 * extra.float()).to(p.dtype) == p, x + extra.float(), x)
    value = extra if master == "fp32" else _from_bits((_bits(x) + extra.long()) & _MASK)
    same = _rounded(value, p.dtype).view(torch.int16) == p.view(torch.int16)  # 0 is not -0
    return torch.where(same, value, x)


def write_master(master: str, x: Tensor, p: Tensor, extra: Tensor) -> None:
    """Split a float32 into a parameter and its extra stream, in place."""
    if master == "kahan":
        p.copy_(x)
        extra.copy_(x - p.float())
        return
    p.copy_(_rounded(x, p.dtype))
    extra.copy_(x if master == "fp32" else torch.where(x.isnan(), 0, _bits(x)))


# ---- int8.


def encode(x: Tensor, second: bool, word: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 as codes [n] (int8, of a second moment uint8), and their scales, float32 [n / 128].

    Of a dense tensor, in the order of memory; with the words of its elements, rounded stochastically.
    """
    x = flat(x)
    bits = _bits(x) & 0x7FFFFFFF
    finite = bits < 0x7F800000
    counted = torch.where(finite & (bits >= 0x00800000), bits, 0)
    n, blocks = len(x), -(-len(x) // BLOCK)
    scales = torch.nn.functional.pad(counted, (0, blocks * BLOCK - n)).view(blocks, BLOCK).amax(1)
    scales = _from_bits(scales)
    inverse = torch.where(scales == 0, 0, 1 / scales).repeat_interleave(BLOCK)[:n]
    ratio = torch.where(finite, x.abs(), 0) * inverse
    if not second:
        root = ratio.sqrt() * 127
        code = root.round()
        if word is not None:  # up by the place of the value between those of two codes, not of the root
            code, drawn = root.floor(), (for_first_moment(word).float() + 0.5) / 65536
            code = (code + (ratio * 16129 - code * code > drawn * (2 * code + 1))).clamp(max=127)
        return torch.where(finite, torch.copysign(code, x), -128).to(torch.int8), scales
    code = ((_bits(ratio) + (0x80000 if word is None else for_second_moment(word) << 4 | 8)) >> 20) - 762
    code = torch.where((bits == 0) | (inverse == 0), 0, code.clamp(1, 254))
    return torch.where(finite, code, 255).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, second: bool) -> Tensor:
    """float32, in the shape and layout of the codes."""
    c = flat(codes).long()
    scales = scales.flatten().repeat_interleave(BLOCK)[: len(c)]
    if second:
        x = torch.where(c == 0, 0, _from_bits((c + 762) << 20) * scales)
        x = torch.where(c == 255, torch.nan, x)
    else:
        x = torch.where(c == -128, torch.nan, (c * c.abs()).float() * (scales / 16129))
    shaped = torch.empty_like(codes, dtype=torch.float32)
    flat(shaped).copy_(x)
    return shaped


def flat(t: Tensor) -> Tensor:
    """A dense tensor as one row, in the order of memory."""
    return t.as_strided((t.numel(),), (1,))


# ---- The streams of a row, for the "reference" backend.


def read(row: "Row", compute: torch.dtype) -> list[Tensor]:
    """The parameter and its moments, in the dtype of the arithmetic; in place where that is the stored one."""
    p = row.p.to(compute) if row.extra is None else read_master(row.master, row.p, row.extra)
    if row.scales:
        coded = enumerate(zip(row.states, row.scales, strict=True))
        return [p, *(decode(t, scales, j == row.second) for j, (t, scales) in coded)]
    return [p, *(t.to(compute) for t in row.states)]


def write(row: "Row", p: Tensor, states: list[Tensor], step: int) -> None:
    """Store what :func:`read` gave and a rule changed."""
    word = None
    if row.stochastic:
        word = words(row.seed, step, row.index, row.place, row.p.numel(), row.p.device)
    if row.extra is not None:
        write_master(row.master, p, row.p, row.extra)
    else:
        _store(p, row.p, None if word is None else word >> 16)
    for j, x in enumerate(states):
        if row.scales:
            codes, scales = encode(x, j == row.second, word)
            flat(row.states[j]).copy_(codes)
            flat(row.scales[j]).copy_(scales)
        else:
            _store(x, row.states[j], None if word is None or j != row.second else for_second_moment(word))


def _store(x: Tensor, to: Tensor, random: Tensor | None) -> None:
    if random is not None and to.dtype is torch.bfloat16:
        flat(to).copy_(stochastic(flat(x), random))
    elif x is not to:
        to.copy_(x)
