"""Measure the bytes of memory per parameter: of parameters, gradients and state of each format, as allocated."""

import argparse
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

import fused_adamw
from bench import measures
from bench.output import begin, console, new_table
from fused_adamw.contract import MASTER_KEYS
from tests import cases

BF16 = torch.bfloat16


class Form(NamedTuple):
    """Hold a way to keep parameters and moments: the dtype of the parameters, and the options of AdamW."""

    dtype: torch.dtype
    options: dict[str, Any]


FORMS = {
    "fp32": Form(torch.float32, {}),
    "fp32, int8 moments": Form(torch.float32, {"state_dtype": "int8"}),
    "bf16, to nearest": Form(BF16, {}),
    "bf16, stochastic": Form(BF16, {"rounding": "stochastic"}),
    "bf16, kahan": Form(BF16, {"master": "kahan"}),
    "bf16, split16": Form(BF16, {"master": "split16"}),
    "bf16, fp32 master": Form(BF16, {"master": "fp32"}),
    "all bf16, to nearest": Form(BF16, {"state_dtype": BF16}),
    "all bf16, stochastic": Form(BF16, {"state_dtype": BF16, "rounding": "stochastic"}),
    "bf16, split16, int8 moments": Form(BF16, {"master": "split16", "state_dtype": "int8"}),
    "bf16, stochastic, int8 moments": Form(BF16, {"rounding": "stochastic", "state_dtype": "int8"}),
}
# The bytes that others publish, gradients included, and the source.
PUBLISHED = {
    "torch.optim.AdamW, fp32": ("16", "4 tensors of 4 bytes"),
    "mixed precision with fp32 master (ZeRO)": ("16", "arXiv 1910.02054, section 3.1: bf16 parameter and gradient"),
    "FlashAdamW": ("7", "flashoptim: 24-bit parameters, 8-bit moments, bf16 gradient; 5 with gradient release"),
    "bitsandbytes AdamW8bit, fp32 parameters": ("10", "arXiv 2110.02861: 2 instead of 8 bytes of moments"),
}


def run(args: argparse.Namespace) -> int:
    """Make each, step it once, and print what it holds."""
    begin("Memory per parameter", args.threads)
    shapes = cases.WORKLOADS[args.workload].groups(cases.WORKLOADS[args.workload].layers)
    columns = ("AdamW", "parameter", "moments", "master", "sum", "with gradient")
    shown = new_table(*columns, title=f"{args.workload}, bytes")
    for name, form in FORMS.items():
        found = measured(form, shapes)
        held = found["parameter"] + found["moments"] + found["master"]
        cells = [found["parameter"], found["moments"], found["master"], held, held + found["gradient"]]
        shown.add_row(name, *(f"{x:.2f}" if x else "" for x in cells))
    console.print(shown)
    console.print(
        "Memory of all tensors after a step, by the number of parameters. Gradients are in the parameters' dtype, and\n"
        "need next to none with gradient release (optimizer.step_parameter). Published, with gradient:"
    )
    published = Table.grid(padding=(0, 2))
    for name, (size, source) in PUBLISHED.items():
        published.add_row(f"  {name}", size, source)
    console.print(published)
    return 0


def measured(form: Form, like: cases.Groups) -> dict[str, float]:
    """Return the bytes per parameter of parameters, gradients, moments (with scales and step) and masters."""
    params = cases.parameters([shape for shapes, _ in like for shape in shapes], form.dtype)
    cases.set_gradients(params, 0)
    optimizer = fused_adamw.AdamW(measures.grouped(params, like), **form.options)
    optimizer.step()
    masters = set(MASTER_KEYS.values())
    states = [item for own in optimizer.state.values() for item in own.items()]
    tensors: dict[str, list[Tensor]] = {
        "parameter": params,
        "gradient": [p.grad for p in params],
        "moments": [t for name, t in states if name not in masters],
        "master": [t for name, t in states if name in masters],
    }
    count = sum(p.numel() for p in params)
    return {name: sum(t.untyped_storage().nbytes() for t in found) / count for name, found in tensors.items()}
