"""Writes the tables of a JSON file into docs/performance.md, and draws their plots into docs.

usage: python -m bench.document FILE
"""

import re
import sys
from pathlib import Path

from bench.measure import ROOT
from bench.plot import draw
from bench.report import as_markdown, load

PAGE = ROOT / "docs/performance.md"


def main() -> None:
    page = PAGE.read_text()
    for table in load(Path(sys.argv[1])):
        between = re.compile(rf"(<!-- table {table.name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = f"\n{as_markdown(table)}\n![{table.title}]({draw(table, PAGE.parent).name})\n\n"
        page = between.sub(lambda found, text=text: found[1] + text + found[2], page)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
