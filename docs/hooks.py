"""What MkDocs does besides: the site's pages and pictures that are kept elsewhere in the repository, and the blocks' names."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results/full/"

# In the repository a fence's second word names its block for the tests: ```python upper. On the site it would be no fence.
NAMED_FENCE = re.compile(r"^(```\w+) [\w.-]+$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page, the change log, and the report of the benchmarks with its pictures."""
    sources = {"index.md": ROOT / "README.md", "changelog.md": ROOT / "CHANGELOG.md"}
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".svg", ".html"):
            sources[RESULTS + path.name] = path
    for name, path in sources.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links that are right in the repository be right on the site, and take the blocks' names away."""
    markdown = NAMED_FENCE.sub(r"\1", markdown)
    markdown = markdown.replace(f"../../{RESULTS}", RESULTS).replace("report.md)", "report.html)")
    markdown = markdown.replace("](docs/pages/", "](").replace("](../../README.md", "](index.md")
    return markdown.replace("](CHANGELOG.md)", "](changelog.md)").replace("](../../CHANGELOG.md)", "](changelog.md)")
