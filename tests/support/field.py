"""The users in the files of tests/data/field/users, which other programs wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data/field/users"
PEOPLE: Sequence[Mapping[str, Any]] = json.loads((FOLDER / "people.json").read_text())
