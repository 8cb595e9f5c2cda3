"""List what a static model of the kernels predicted for an H100 and an H200, before any of them ran.

The model counts bytes and instructions of the compiled kernels, and times the host's part over stubbed kernels.
"""

from typing import Any, NamedTuple

MODEL = "static model"
HOST = "host part over stubbed kernels, the rest guessed"
PUBLISHED = "published for another machine or version"
GOAL = "goal"
MARGIN = 0.05  # beyond a prediction, before it counts as missed

Range = tuple[float, float] | None


class Prediction(NamedTuple):
    """Predict a field of one row of the results, which is named by workload, algorithm, dtypes and arm."""

    row: tuple[str, str, str, str]
    field: str  # of the row
    unit: str
    h100: Range
    h200: Range
    source: str = MODEL


TRITON, CUDA, FUSED = "fused_adamw triton", "fused_adamw cuda", "torch fused"


def _ours(row: tuple[str, str, str], *rest: Any) -> list[Prediction]:
    return [Prediction((*row, arm), *rest) for arm in (TRITON, CUDA)]


def _of_stream(dtypes: str, triton: tuple[float, float], cuda: tuple[float, float]) -> list[Prediction]:
    """Predict the least share of the stream; a kernel that computes for longer than it moves data has less."""
    row = ("1x256Mi", "adamw", dtypes)
    return [
        Prediction((*row, arm), "of_ceiling", "of the stream", (h100, 1.0), (h200, 1.0))
        for arm, (h100, h200) in ((TRITON, triton), (CUDA, cuda))
    ]


PREDICTIONS = [
    Prediction(("copy", "", "", ""), "gb_per_s", "GB/s", (3000, 3000), (4300, 4300)),
    *_ours(("1x1Gi", "adamw", "fp32"), "ms_median", "ms", (10.3, 10.9), (7.2, 7.6)),
    Prediction(("1x1Gi", "adamw", "fp32", FUSED), "ms_median", "ms", None, (7.6, 7.6), PUBLISHED),
    *_ours(("1x1Gi", "adamw", "fp32"), "of_ceiling", "of the stream", (0.97, 1.0), (0.97, 1.0), GOAL),
    *_ours(("gpt2", "adamw", "fp32"), "ms_median", "ms", (1.20, 1.27), (0.845, 0.885)),
    Prediction(("gpt2", "adamw", "fp32", f"{TRITON}, graph"), "ms_median", "ms", (1.20, 1.27), (0.845, 0.885)),
    Prediction(("gpt2", "adamw", "fp32", FUSED), "ms_median", "ms", (1.17, 1.22), None),
    *_ours(("gpt2", "adamw-clip", "fp32"), "ms_median", "ms", (1.335, 1.335), None),
    *_ours(("llama-2b", "adamw", "fp32"), "ms_median", "ms", (20.0, 21.1), (14.0, 14.8)),
    Prediction(("llama-2b", "adamw", "fp32", FUSED), "ms_median", "ms", (19.5, 19.8), None),
    *_ours(("1000x1k", "adamw", "fp32"), "ms_median", "ms", (0.13, 0.17), (0.13, 0.17), HOST),
    Prediction(("1000x1k", "adamw", "fp32", FUSED), "ms_median", "ms", (4.1, 4.1), (4.1, 4.1), HOST),
    *_ours(("10000x64", "adamw", "fp32"), "ms_median", "ms", (2.0, 2.0), (2.0, 2.0), HOST),
    Prediction(("10000x64", "adamw", "fp32", f"{TRITON}, graph"), "ms_median", "ms", (0.011, 0.011), None),
    Prediction(("10000x64", "adamw", "fp32", FUSED), "ms_median", "ms", None, (20.8, 20.8), PUBLISHED),
    *_ours(("465-groups", "adamw", "fp32"), "ms_median", "ms", (0.19, 0.19), (0.19, 0.19), HOST),
    Prediction(("465-groups", "adamw", "fp32", FUSED), "ms_median", "ms", (58.8, 58.8), (58.8, 58.8), PUBLISHED),
    *_ours(("148x64", "adamw", "fp32"), "host_us", "us", (31, 33), (31, 33), HOST),
    *_of_stream("fp32", (0.97, 0.97), (0.97, 0.97)),
    *_of_stream("bf16+fp32", (0.97, 0.97), (0.97, 0.97)),
    *_of_stream("bf16", (0.97, 0.97), (0.97, 0.97)),
    *_of_stream("bf16+fp32-split16", (0.97, 0.97), (0.97, 0.97)),
    *_of_stream("bf16-stochastic", (0.97, 0.97), (0.97, 0.97)),
    *_of_stream("bf16+int8", (0.97, 1 / 1.36), (0.97, 1 / 1.38)),
    *_of_stream("bf16+int8-stochastic", (1 / 1.38, 1 / 1.98), (1 / 1.37, 1 / 1.97)),
]


def key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return the workload, algorithm, dtypes and arm of a row."""
    if row.get("kind") == "ceiling":
        return (row["name"], "", "", "")
    return tuple(str(row.get(name, "")) for name in ("workload", "algorithm", "dtypes", "arm"))


def of(gpu: str, prediction: Prediction) -> Range:
    """Return the prediction for a GPU of this name, or None."""
    return prediction.h200 if "H200" in gpu else prediction.h100 if "H100" in gpu else None


def verdict(value: float, predicted: Range, unit: str) -> str:
    """Say what a measurement makes of a prediction."""
    if predicted is None:
        return "no prediction"
    low, high = predicted
    more_is_better = unit not in ("ms", "us")
    worse = low / value - 1 if more_is_better else value / high - 1
    better = value / high - 1 if more_is_better else low / value - 1
    if worse > MARGIN:
        return f"short by {worse:.0%}"
    return f"better by {better:.0%}" if better > MARGIN else "confirmed"
