"""Let the reference link what docstrings name by Sphinx's roles: these are not Markdown's."""

import ast
import re
from pathlib import Path

import griffe

PACKAGE = ast.parse((Path(__file__).resolve().parent.parent / "aioecho" / "__init__.py").read_text("utf-8"))

# What the reference has a heading for: the names that users get.
PUBLIC = {
    name
    for statement in PACKAGE.body
    if isinstance(statement, ast.Assign) and "__all__" in (getattr(target, "id", None) for target in statement.targets)
    for name in ast.literal_eval(statement.value)
}

ROLE = re.compile(r":(?:class|data|func|meth|mod):`(~?)([\w.]+)`")


def link(match: re.Match[str]) -> str:
    """Return the Markdown for one role: a link if the reference has its target, else the name as code."""
    is_short, name = match.groups()
    name = name.removeprefix("aioecho.")
    shown = f"`{name.rpartition('.')[2] if is_short else name}`"
    return f"[{shown}][aioecho.{name}]" if name.partition(".")[0] in PUBLIC else shown


class Roles(griffe.Extension):
    """Rewrites the roles in every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite those of one object."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
