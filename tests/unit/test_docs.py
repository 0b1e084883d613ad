"""Check the links of the documentation."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGES = [
    *(
        CHECKOUT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "deploy/README.md",
            "examples/README.md",
            "examples/changes/README.md",
            "clients/go/README.md",
            "clients/typescript/README.md",
        )
    ),
    *sorted((CHECKOUT / "docs").glob("*.md")),
]
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PROGRAM = re.compile(r"^```(?:python|go|js)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([\w.]+)`")


def names(node: ast.AST, path: str = "") -> Iterator[str]:
    """Yield the names that a module defines: functions, classes and constants, and those of its classes."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield from (name, path + name)
            case ast.ClassDef(name=name):
                yield from (name, *names(child, f"{name}."))
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield path + name


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_to_what_they_say(page: Path) -> None:
    """Links lead to existing files and headings, labels in code style to names that the module defines."""
    missing = []
    for label, target, anchor in LINK.findall(page.read_text()):
        file = page.parent / target if target else page
        name = CODE.fullmatch(label)
        if not file.exists():
            missing.append(target)
        elif anchor and anchor not in anchors(file):
            missing.append(f"{target}#{anchor}")
        elif name and file.suffix == ".py" and not file.name.startswith(name[1]):
            known = set(names(ast.parse(file.read_text())))
            missing += [f"{name[1]} in {target}"] if name[1] not in known else []
    assert missing == []


def test_index_lists_every_page() -> None:
    """Readers find pages by the index of docs/."""
    index = CHECKOUT / "docs/README.md"
    linked = {target for _, target, _ in LINK.findall(index.read_text())}
    pages = {page.name for page in index.parent.glob("*.md")} - {index.name}
    assert pages - linked == set()


def test_page_of_the_feed_shows_its_examples() -> None:
    """Its programs are parts of the examples, which are tested."""
    files = [CHECKOUT / "examples/mirror.py", *(CHECKOUT / "examples/changes").iterdir()]
    code = "\0".join(file.read_text() for file in files)
    shown = PROGRAM.findall((CHECKOUT / "docs/changes.md").read_text())

    assert shown
    assert [part for part in shown if part not in code] == []
