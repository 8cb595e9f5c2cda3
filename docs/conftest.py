"""Runs every block of Python in these pages; the blocks of a page share their names, and find those of ``given``."""

from typing import Any

import fused_adamw
import pytest
import torch

try:
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
except ModuleNotFoundError:  # with the Python at hand
    Sybil = None


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Let a block write its files into a folder of its own."""
    monkeypatch.chdir(tmp_path)


def given(names: dict[str, Any]) -> None:
    """Give a page a small model, batches and a loss, as a reader has them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)
    )
    x = torch.randn(192, 8)
    batches = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    names |= {
        "torch": torch,
        "fused_adamw": fused_adamw,
        "model": model,
        "loader": torch.utils.data.DataLoader(batches, batch_size=16),
        "loss_of": lambda x, y: (names["model"](x) - y).square().mean(),
    }


if Sybil:
    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()],
        patterns=["*.md"],
        setup=given,
        fixtures=["elsewhere"],
    ).pytest()
else:

    def pytest_terminal_summary(terminalreporter):
        terminalreporter.write_line(
            "the blocks of docs/ were not run: sybil is not installed"
        )
