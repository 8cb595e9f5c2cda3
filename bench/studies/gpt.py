"""Define the small character-level GPT, and its text, for the demo, the study of formats and examples/; torch alone."""

import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHARACTERS = 4_000_000  # of text that is read
VOCABULARY = 128
WIDTH, BLOCKS, HEADS, CONTEXT, BATCH = 192, 2, 12, 32, 32


class Block(nn.Module):
    """Add attention and a perceptron, each of normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Predict logits of the next character at every position; the head is the embedding, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight
        return F.linear(self.norm(self.blocks(x)), self.characters.weight)


def corpus() -> tuple[Tensor, Tensor]:
    """Return source text of the standard library as character numbers: for training, and the last tenth for validation.

    0 stands for all characters beyond the most common ones.
    """
    library = Path(sysconfig.get_path("stdlib"))
    text = ""
    for folder in ("", "asyncio", "email", "json", "unittest"):
        for path in sorted((library / folder).glob("*.py")):
            if len(text) < CHARACTERS:
                text += path.read_text("utf-8", "replace")
    if len(text) < CHARACTERS // 10:
        raise SystemExit(f"{library} has no source text to train on")
    common = [c for c, _ in Counter(text).most_common(VOCABULARY - 1)]
    numbers = defaultdict(lambda: "\0", {ord(c): chr(i) for i, c in enumerate(common, 1)})
    data = torch.frombuffer(bytearray(text.translate(numbers), "latin-1"), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batches(data: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield endless random excerpts, one character longer than the context."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=generator).tolist()
        yield torch.stack([data[i : i + CONTEXT + 1] for i in starts]).long()
