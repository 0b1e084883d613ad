"""What the documentation points at is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)#]+)[^)]*\)")
CODE = re.compile(r"`([\w.]+)`")


def names(node: ast.AST, path: str = "") -> Iterator[str]:
    """What a module defines: its functions, classes and constants, and those of its classes."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield from (name, path + name)
            case ast.ClassDef(name=name):
                yield from (name, *names(child, f"{name}."))
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield path + name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_they_say(page: Path) -> None:
    """To a file that exists; one in code style that leads to a module names what it defines."""
    missing = []
    for label, target in LINK.findall(page.read_text()):
        file = page.parent / target
        name = CODE.fullmatch(label)
        if not file.exists():
            missing.append(target)
        elif name and file.suffix == ".py" and not file.name.startswith(name[1]):
            known = set(names(ast.parse(file.read_text())))
            missing += [f"{name[1]} in {target}"] if name[1] not in known else []
    assert missing == []
