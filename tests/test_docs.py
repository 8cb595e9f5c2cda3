"""README's code is that of docs/, which pytest runs, and docs/faq.md knows every message of the package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Inner errors, which a caller catches, and texts that are all placeholders: the messages inside them are listed.
PASSED_ON = {"CannotRun", "_at", ""}


def test_the_code_of_readme_is_that_of_the_quick_start():
    blocks, run = (
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for page in ("README.md", "docs/quickstart.md")
    )
    assert blocks
    assert set(blocks) <= set(run)


def raised() -> Iterator[str]:
    """Yield every message of an error or a warning in the package, with \0 for what is filled in."""
    for path in sorted((ROOT / "fused_adamw").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if (isinstance(node, ast.Raise) and name not in PASSED_ON) or name in ("warn", "warn_once"):
                parts = getattr(call.args[0], "values", [call.args[0]])
                yield "".join(p.value if isinstance(p, ast.Constant) else "\0" for p in parts)


def test_the_faq_has_every_message_and_no_other():
    """A quote in the first column of a table is a part of a message; "…" there stands for anything."""
    rows = re.findall(r"^\| (`.*?) \| .* \|$", (ROOT / "docs/faq.md").read_text("utf-8"), re.MULTILINE)
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    patterns = [re.compile(".*?".join(map(re.escape, quote.split("…"))), re.DOTALL) for quote in quotes]
    texts = [text for text in raised() if len(text.replace("\0", "").strip(": ()")) > 10]
    assert len(texts) > 90
    assert not [text for text in texts if not any(pattern.search(text) for pattern in patterns)]
    sources = [path.read_text("utf-8") for pattern in ("fused_adamw/*.py", "csrc/*.*") for path in ROOT.glob(pattern)]
    every = re.sub(r'" *\n *f?"', "", "\n".join([*texts, *sources]))
    assert not [q for q, pattern in zip(quotes, patterns, strict=True) if not pattern.search(every)]
