"""Turns docstrings, which are reStructuredText for help(), into Markdown for the site; mkdocs.yml names this file."""

import re
import textwrap

import griffe
from latex2mathml.converter import convert


class Markdown(griffe.Extension):
    """Rewrites every docstring once, when its object is read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return the text with formulas as MathML, code blocks fenced, and roles as code."""
    text = re.sub(
        r"^\.\. math::\n((?:[ ]+\S.*\n?)+)",
        _display,
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(
        r"\s*\(default:\s+(?:[^()]|\([^()]*\))*\)\.$",
        ".",
        text,
        flags=re.MULTILINE,
    )  # told by the site
    text = re.sub(
        r":math:`([^`]+)`",
        lambda found: f"<span>{convert(found[1])}</span>",
        text,
    )
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(
        r"^( *)(\S.*):: *\n\n((?:\1    .*\n|\n)+)",
        _fenced,
        text + "\n",
        flags=re.MULTILINE,
    )
    return re.sub(
        r"(?:^>>> .*\n(?:.*\S.*\n)*)+",
        lambda found: f"```pycon\n{found[0]}```\n",
        text,
        flags=re.MULTILINE,
    )


def _display(found: re.Match) -> str:
    kept: list[
        str
    ] = []  # environments within a line, whose & and \\ are their own

    def keep(part: re.Match) -> str:
        kept.append(part[0])
        return f"@{len(kept) - 1}@"

    text = " ".join(found[1].split())
    text = re.sub(r"\\begin\{(\w+)\}.*?\\end\{\1\}", keep, text)
    lines = text.replace("&", "").split(r"\\")
    lines = [
        re.sub("@(.)@", lambda k: kept[int(k[1])], line) for line in lines
    ]
    return (
        "\n\n".join(convert(x.strip(), display="block") for x in lines) + "\n"
    )


def _fenced(found: re.Match) -> str:
    indent, code = found[1], textwrap.dedent(found[3]).rstrip()
    block = textwrap.indent(f"```python\n{code}\n```", indent)
    return f"{indent}{found[2]}:\n\n{block}\n\n"
