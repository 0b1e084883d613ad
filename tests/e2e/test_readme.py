"""Run the commands of the documentation in a shell, and compare what they print with what the pages show.

A ```console block has commands, each after `$ `, and their output: `…` alone on a line stands for any number
of lines. A ```python or ```jq block that begins with `# name.py` or `# name.jq` is a file in the same folder.
"""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from service.server import Server
from tests.support.server import FREE_PORT, serve

CHECKOUT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(CHECKOUT / ".tools/bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
ADDRESS, METRICS = "127.0.0.1:50051", "127.0.0.1:9464"  # as the pages have them
FREE = "127.0.0.1:0"
BLOCK = re.compile(r"^```(console|python|jq)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*<<'END'\n(?:.*\n)*?END|.*)\n", re.MULTILINE)
START = re.compile(r"^## Start$", re.MULTILINE)
# Values that differ from run to run: times, durations, rates, and the row at which a killed load continues.
# The digest that names a load may differ between releases.
VARIABLE = re.compile(
    r"\d{4}-\d\d-\d\d[T ][\d:.]+Z?|\d[\d.,]* (?:s|rows/s)\b|(?<=at row )[\d,]+|[\d,]+(?= of them )|"
    r"(?<=users-create-)[0-9a-f]{32}\b"
)


def steps(page: str) -> Iterator[tuple[str, str]]:
    """Yield the commands of a page in order, each with the output that the page shows."""
    for kind, block in BLOCK.findall(page):
        if kind != "console":
            name = re.match(r"# (\w+\.(?:py|jq))\n", block)
            if name:
                yield f"cat > {name[1]} <<'END'\n{block}END", ""
            continue
        _, *parts = COMMAND.split(block)
        yield from zip(parts[::2], parts[1::2], strict=True)


def normalise(text: str) -> str:
    """Return a text without blank lines and without values that differ from run to run."""
    return "".join(f"{line}\n" for line in VARIABLE.sub("~", text).splitlines() if line)


def pattern(shown: str) -> str:
    """Return a regular expression that matches the output that a page shows."""
    lines = normalise(shown).splitlines(keepends=True)
    return "".join(r"(?:.*\n)*" if line == "…\n" else re.escape(line) for line in lines)


async def output_of(command: str, folder: Path, address: str) -> str:
    """Run a command and return its output, standard error included."""
    process = await asyncio.create_subprocess_shell(
        command.replace(ADDRESS, address),
        cwd=folder,
        env={**os.environ, "PATH": PATH, "ROSTER_ADDRESS": address, "ROSTER_LISTEN": FREE, "COLUMNS": "200"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    return printed.decode()


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return a SQLite database, as `make run` uses."""
    return sqlite_url


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """Start a new server with a metrics port."""
    async with serve(database_url, metrics_listen=FREE_PORT) as server:
        yield server


def parts(page: str) -> list[str]:
    """Split a page at its heading "Start": readers begin there, with a new server."""
    return [part for part in START.split((CHECKOUT / page).read_text()) if BLOCK.search(part)]


PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("api", "bulk-loading", "calling", "changes", "importing", "mirroring", "operating")
    ),
]
PARTS = [
    pytest.param(part, id=f"{page}-{number}") for page in PAGES for number, part in enumerate(parts(page))
]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_commands(page: str) -> None:
    """A page without commands would pass the test below without being checked."""
    assert [step for part in parts(page) for step in steps(part)]


@pytest.mark.parametrize("part", PARTS)
async def test_commands_print_what_is_shown(part: str, server: Server, tmp_path: Path) -> None:
    """Run every command in order against a new server."""
    if not shutil.which("grpcurl", path=PATH):
        pytest.skip("grpcurl is missing, so the commands of the pages are not checked: run `make tools`")
    if "$ jq " in part and not shutil.which("jq", path=PATH):
        pytest.skip("jq is missing, so the commands of a page are not checked: install jq")
    folder = tmp_path / "typed"
    folder.mkdir()

    for command, shown in steps(part):
        printed = await output_of(command.replace(METRICS, server.metrics_address), folder, server.address)
        actual = normalise(printed.replace(server.address, ADDRESS).replace(FREE, ADDRESS))
        assert re.fullmatch(pattern(shown), actual), (
            f"$ {command}\nis shown as\n{shown}\nand printed\n{actual}"
        )
