"""What a package index shows: the README, with links and a picture that are right there, and the command for a release.

Hatch runs it when it builds (`tool.hatch.metadata.hooks.custom` in pyproject.toml). An index knows no relative links. So they
become links to the repository, if `project.urls` names one as `Source`, and otherwise text.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CHECKOUT = re.compile(r"<!-- checkout:begin -->.*?<!-- checkout:end -->", re.DOTALL)
RELEASE = "```sh\npip install aioecho && python -m aioecho\n```"
PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)]+)\)\n*")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)]+)\)")
COMMENT = re.compile(r"<!--.*?-->\n?")


def make_page(readme: str, source: str | None) -> str:
    """Return the README for the index; `source` is the address of the repository, without a slash at the end."""
    page = CHECKOUT.sub(RELEASE, readme)
    if source:
        page = PICTURE.sub(rf"![\1]({source}/raw/HEAD/\2)\n\n", page)
        page = LINK.sub(rf"[\1]({source}/blob/HEAD/\2)", page)
    else:
        page = LINK.sub(r"\1", PICTURE.sub("", page))
    return COMMENT.sub("", page)


class ReadmeHook(MetadataHookInterface):
    """Give the project its description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README as it is for the index."""
        text = (Path(self.root) / "README.md").read_text("utf-8")
        page = make_page(text, metadata.get("urls", {}).get("Source", "").rstrip("/") or None)
        metadata["readme"] = {"content-type": "text/markdown", "text": page}
