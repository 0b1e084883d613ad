"""Errors about files that a command names: one sentence, and no usage."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli import main

TOKEN = ["--issuer", "a", "--audience", "b"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file and a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("email\n")
    (tmp_path / "directory").mkdir()
    return tmp_path


def check(words: list[str], expected: str, **environment: str) -> None:
    """Check that a command prints one line, with status 2."""
    ended = CliRunner().invoke(main, words, env=environment)
    assert ended.exit_code == 2
    assert len(ended.output.splitlines()) == 1
    assert ended.output.startswith("Error: ")
    assert expected in ended.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["load", "users", "nosuch.csv"], "'FILE': File 'nosuch.csv' does not exist."),
        (["load", "users", "directory"], "'FILE': File 'directory' is a directory."),
        (
            ["load", "users", "file", "--rejects", "directory"],
            "'--rejects': File 'directory' is a directory.",
        ),
        (["loads", "--tls-ca", "nosuch.pem"], "File 'nosuch.pem' does not exist."),
        (["export", "users", "--tls-ca", "file", "--tls-key", "nosuch.pem"], "'nosuch.pem' does not exist."),
        (["token", "issue", "ada", "--key", "nosuch.pem", *TOKEN], "'--key': File 'nosuch.pem' does not"),
        (["token", "keys", "file"], "'DIRECTORY': Directory 'file' is a file."),
        (["token", "keys", "file/keys"], "directory file/keys can't be created: Not a directory"),
        (
            ["token", "keys", "/proc/x/keys"],
            "directory /proc/x/keys can't be created: No such file or directory",
        ),
        (["export", "users", "--output", "nosuch/users.csv"], "can't write nosuch/users.csv: No such file"),
        (["export", "users", "--output", "file/users.csv"], "can't write file/users.csv: Not a directory"),
        (["load", "users", "a\n\x1b[2J"], r"File 'a\n\x1b[2J' does not exist."),
    ],
)
def test_begins_with_the_cause(words: list[str], expected: str) -> None:
    """The command itself is right: its usage would hide the cause."""
    check(words, expected)


@pytest.mark.parametrize("name", ["ROSTER_TLS_CA_FILE", "ROSTER_TLS_CLIENT_CERT_FILE", "ROSTER_TOKEN_FILE"])
def test_names_the_variable_of_a_file(name: str) -> None:
    """The option was not typed."""
    check(["loads"], f"(env var: '{name}'): File 'nosuch.pem' does not exist.", **{name: "nosuch.pem"})


@pytest.mark.parametrize(
    "words",
    [["load", "users"], ["load", "users", "file", "--batch-rows", "0"], ["loads", "--what"], ["export", "x"]],
)
def test_wrong_use_keeps_the_usage(words: list[str]) -> None:
    """It shows what would be right."""
    ended = CliRunner().invoke(main, words)

    assert ended.exit_code == 2
    assert ended.output.startswith(f"Usage: main {words[0]} [OPTIONS] ")
