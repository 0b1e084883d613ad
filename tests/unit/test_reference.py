"""docs/reference.md has everything that the protos say, and is up to date."""

import re
import shutil
from pathlib import Path

from tools.contract_image import PROTOS
from tools.contract_reference import PAGE, page

SHOWN = PAGE.read_text()


def test_page_is_up_to_date() -> None:
    """Otherwise run `make reference`."""
    assert page() == SHOWN


def test_page_is_complete() -> None:
    """It has every RPC, message, enum, field and value of the protos."""
    source = "".join(re.sub(r"//.*", "", path.read_text()) for path in (PROTOS / "roster").rglob("*.proto"))
    rpcs, types = (
        set(re.findall(rf"\b{kind} (\w+)", source)) for kind in ("rpc", "(?:service|message|enum)")
    )
    members = set(re.findall(r"(\w+) = \d+[; ]", source))
    headings = {name.rpartition(".")[2] for name in re.findall(r"^#{3,4} (\S+)$", SHOWN, re.MULTILINE)}
    assert headings == rpcs | types
    assert set(re.findall(r"^\| \d+ \| `(\w+)`", SHOWN, re.MULTILINE)) == members


def test_links_lead_to_sections() -> None:
    """By the anchors of the headings."""
    sections = {name.lower().replace(".", "") for name in re.findall(r"^#+ (\S+)$", SHOWN, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", SHOWN)) <= sections


def test_changed_comment_changes_the_page(tmp_path: Path) -> None:
    """The check itself can fail."""
    protos = Path(shutil.copytree(PROTOS, tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*")))
    users = protos / "roster/v1/users.proto"
    users.write_text(users.read_text().replace("Creates a user", "Makes a user", 1))
    assert page(protos) == SHOWN.replace("Creates a user", "Makes a user", 1)
