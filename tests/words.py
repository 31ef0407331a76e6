"""Counts the pronouns that stand where a noun should, in prose: ``python tests/words.py README.md docs/pages aioecho``.

In Markdown prose is what is neither code nor a link's address; in Python it is docstrings and comments.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

PRONOUNS = ("who", "whoever", "whom", "whose", "those", "nobody", "somebody", "each")

FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
NOT_PROSE = re.compile(r"``[^`]+``|`[^`]+`|\]\([^)]*\)|https?://\S+|<!--.*?-->|<[^>]+>", re.DOTALL)
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


def find_files(paths: Iterable[str]) -> Iterator[Path]:
    """Yield the Markdown and Python files among `paths` and in the folders among them."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.suffix in (".md", ".py"))
        else:
            yield path


def read_prose(path: Path) -> str:
    """Return a file's prose."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = "\n".join((*_docstrings(text), *_comments(text)))
    return NOT_PROSE.sub(" ", FENCE.sub(" ", text))


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            # Of attributes too, which follow them.
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value.value
                if isinstance(value, str):
                    yield value


def _comments(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# type:", "# noqa")):
            yield token.string.lstrip("# ")


def count(paths: Iterable[str]) -> tuple[Counter[str], int]:
    """Return how often each pronoun stands in the prose of `paths`, and the number of words."""
    found: Counter[str] = Counter()
    total = 0
    for path in find_files(paths):
        words = [word.lower() for word in WORD.findall(read_prose(path))]
        total += len(words)
        found.update(word for word in words if word in PRONOUNS)
    return found, total


def main(paths: list[str]) -> None:
    """Print the figure."""
    found, total = count(paths)
    in_a_thousand = 1000 * found.total() / max(total, 1)
    counts = ", ".join(f"{word} {times}" for word, times in found.most_common())
    print(f"{in_a_thousand:.2f} in 1,000 words ({found.total()} of {total:,}){': ' * bool(counts)}{counts}")


if __name__ == "__main__":
    main(sys.argv[1:])
