"""The programs of docs/importing.md, run on exports of other systems."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from roster.v1.resources_pb2 import User
from service.cli.formats import Json
from service.users.hashes import matches, password_hash_error
from tests.support.field import FOLDER, PEOPLE
from tests.support.files import columns_of, rows_of

PAGE = Path(__file__).parents[2] / "docs/importing.md"
PROGRAMS = dict(re.findall(r"^```jq\n# (\w+)\.jq\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
PARAMETERS = ["--slurpfile", "parameters", FOLDER / "firebase-parameters.json"]
EXPORTS = [
    ("auth0", "auth0-passwords.ndjson", True),
    ("auth0", "auth0.ndjson", False),
    ("cognito", "cognito.json", False),
    ("django", "django-dumpdata.json", True),
    ("firebase", "firebase-export.json", True),
    ("keycloak", "keycloak-argon2.json", True),
    ("keycloak", "keycloak-pbkdf2-sha256.json", True),
    ("keycloak", "keycloak-pbkdf2-sha512.json", True),
    ("keycloak", "keycloak-users.json", True),
    ("kratos", "kratos.json", True),
    ("okta", "okta.json", False),
]


def test_every_program_is_run() -> None:
    """A program of the page without an export would not be tested."""
    assert {*PROGRAMS} == {program for program, _, _ in EXPORTS}


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize(("program", "export", "has_hashes"), EXPORTS)
def test_converts_the_export_of_a_user_store(program: str, export: str, has_hashes: bool) -> None:
    """The users have their names and states, and their passwords match."""
    command = ["jq", "-c", *(PARAMETERS if program == "firebase" else []), PROGRAMS[program], FOLDER / export]
    lines = subprocess.run(command, check=True, capture_output=True).stdout

    users = {}
    for row in rows_of(Json(columns_of()), lines):
        assert isinstance(row.message, User)
        users[row.message.email] = row.message

    for person in PEOPLE:
        user = users.pop(person["email"])
        full_name = user.full_name if user.HasField("full_name") else None
        assert (full_name, user.is_active) == (person["full_name"], person["is_active"])
        assert bool(user.hashed_password) == has_hashes
        if has_hashes:
            assert password_hash_error(user.hashed_password) is None
    assert users == {}


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize(("program", "export"), [(name, file) for name, file, has in EXPORTS if has])
def test_converted_hashes_match_the_passwords(program: str, export: str) -> None:
    """The right password is accepted, and another one is not."""
    command = ["jq", "-c", *(PARAMETERS if program == "firebase" else []), PROGRAMS[program], FOLDER / export]
    lines = subprocess.run(command, check=True, capture_output=True).stdout
    people = {person["email"]: person for person in PEOPLE}

    for row in rows_of(Json(columns_of()), lines)[:2]:
        assert isinstance(row.message, User)
        password = f"secret-{people[row.message.email]['id']}"
        assert matches(row.message.hashed_password, password)
        assert not matches(row.message.hashed_password, f"{password}0")
