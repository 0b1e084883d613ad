"""What the pages for people show: their commands, typed into a shell, print what stands there.

A ```console block has commands, each behind `$ `, and what they print: `…` alone on a line stands for any
lines. A ```python block that begins with `# name.py` is a file in the same folder.
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
from service.settings import Settings

CHECKOUT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(CHECKOUT / ".tools/bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
ADDRESS, METRICS = "127.0.0.1:50051", "127.0.0.1:9464"  # as the pages have them
FREE = "127.0.0.1:0"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*<<'END'\n(?:.*\n)*?END|.*)\n", re.MULTILINE)
# What differs from run to run: times, durations, rates.
VARIABLE = re.compile(r"\d{4}-\d\d-\d\d[T ][\d:.]+Z?|\d[\d.,]* (?:s|rows/s)\b")


def steps(page: str) -> Iterator[tuple[str, str]]:
    """The commands of a page, in order, each with what it is said to print."""
    for kind, block in BLOCK.findall(page):
        if kind == "python":
            name = re.match(r"# (\w+\.py)\n", block)
            if name:
                yield f"cat > {name[1]} <<'END'\n{block}END", ""
            continue
        _, *parts = COMMAND.split(block)
        yield from zip(parts[::2], parts[1::2], strict=True)


def same(text: str) -> str:
    """A text without what differs from run to run, and without blank lines."""
    return "".join(f"{line}\n" for line in VARIABLE.sub("~", text).splitlines() if line)


def pattern(shown: str) -> str:
    """A regular expression for what is shown."""
    lines = same(shown).splitlines(keepends=True)
    return "".join(r"(?:.*\n)*" if line == "…\n" else re.escape(line) for line in lines)


async def typed(command: str, folder: Path, address: str) -> str:
    """What a command prints, errors included."""
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
    """The database that `make run` has."""
    return sqlite_url


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server of the test's own, with its metrics."""
    server = Server(Settings(database_url=database_url, listen=FREE, metrics_listen=FREE))
    await server.start()
    yield server
    await server.stop(grace=0)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("api", "bulk-loading", "calling", "operating"))]
)
async def test_commands_print_what_is_shown(page: str, server: Server, tmp_path: Path) -> None:
    """Every command of a page, in order, against a new server."""
    if not shutil.which("grpcurl", path=PATH):
        pytest.skip("grpcurl is missing, so nobody has checked what the pages show: run `make tools`")
    folder = tmp_path / "typed"
    folder.mkdir()
    shown_steps = list(steps((CHECKOUT / page).read_text()))
    assert shown_steps

    for command, shown in shown_steps:
        printed = await typed(command.replace(METRICS, server.metrics_address), folder, server.address)
        told = same(printed.replace(server.address, ADDRESS).replace(FREE, ADDRESS))
        assert re.fullmatch(pattern(shown), told), f"$ {command}\nis shown as\n{shown}\nand printed\n{told}"
