"""Settings: from where they come, and what is said of wrong ones."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from service.cli import main
from service.settings import Settings

TLS: dict[str, Any] = {"tls_cert_file": "cert.pem", "tls_key_file": "key.pem"}
CERTIFICATES: dict[str, Any] = {"tls_client_ca_file": "ca.pem", "policy_file": "policy.toml"}
TOKENS: dict[str, Any] = {
    "jwt_issuer": "https://issuer.example.org",
    "jwt_audience": "roster",
    "jwt_keys_file": "keys.pem",
    "policy_file": "policy.toml",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without settings, in a folder without `.env`."""
    for name in os.environ:
        if name.startswith("ROSTER_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def refused(**values: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Settings(**values)  # type: ignore[arg-type]
    return caught.value


def test_the_defaults_are_safe() -> None:
    """Nobody else can call, and a database that needs no server."""
    settings = Settings()

    assert settings.listen == "127.0.0.1:50051"
    assert settings.database_url == "sqlite+aiosqlite:///roster.db"
    assert settings.is_embedded


def test_a_setting_is_an_environment_variable(environment: pytest.MonkeyPatch) -> None:
    """Its name in capitals, with the prefix."""
    for name, value in {"LISTEN": "[::1]:7000", "POOL_TIMEOUT": "0.5", "REFLECTION": "false"}.items():
        environment.setenv(f"ROSTER_{name}", value)
    settings = Settings()

    assert (settings.listen, settings.pool_timeout, settings.reflection) == ("[::1]:7000", 0.5, False)


def test_the_database_s_url_has_two_names(environment: pytest.MonkeyPatch) -> None:
    """DATABASE_URL is what platforms set; our own name goes before it."""
    environment.setenv("DATABASE_URL", "sqlite:///platform.db")
    assert Settings().database_url == "sqlite+aiosqlite:///platform.db"
    environment.setenv("ROSTER_DATABASE_URL", "sqlite:///own.db")
    assert Settings().database_url == "sqlite+aiosqlite:///own.db"


def test_the_nearest_source_wins(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An argument before the environment, that before a secret's file, that before `.env`."""
    (tmp_path / ".env").write_text("ROSTER_DATABASE_URL=sqlite:///dotenv.db\nROSTER_POOL_SIZE=1\n")
    assert (Settings().database_url, Settings().pool_size) == ("sqlite+aiosqlite:///dotenv.db", 1)

    (tmp_path / "secret").write_text("sqlite:///secret.db\n")
    environment.setenv("ROSTER_DATABASE_URL_FILE", str(tmp_path / "secret"))
    assert (Settings().database_url, Settings().pool_size) == ("sqlite+aiosqlite:///secret.db", 1)

    environment.setenv("ROSTER_DATABASE_URL", "sqlite:///environment.db")
    assert Settings().database_url == "sqlite+aiosqlite:///environment.db"
    assert Settings(database_url="sqlite:///argument.db").database_url == "sqlite+aiosqlite:///argument.db"


def test_any_setting_can_be_a_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With white space around its value, as editors leave it; `.env` may name it too."""
    (tmp_path / "size").write_text("  7\n\n")
    (tmp_path / ".env").write_text(f"ROSTER_MAX_OVERFLOW_FILE={tmp_path}/size\n")
    environment.setenv("ROSTER_POOL_SIZE_FILE", str(tmp_path / "size"))

    assert (Settings().pool_size, Settings().max_overflow) == (7, 7)


def test_a_pause_leaves_time_for_calls() -> None:
    """Otherwise all of them would be cut off when it is over."""
    assert Settings(drain_pause=5, grace=8).grace == 8
    with pytest.raises(ValidationError, match="at least 3 s more than ROSTER_DRAIN_PAUSE"):
        Settings(drain_pause=5, grace=7)


IN_SECONDS = [name for name, field in Settings.model_fields.items() if "seconds" in str(field.description)]


@pytest.mark.parametrize("name", IN_SECONDS)
def test_every_setting_in_seconds_takes_the_same_texts(name: str, environment: pytest.MonkeyPatch) -> None:
    """Whole or with a fraction, and with what files and platforms leave at the end; nothing else."""
    variable = f"ROSTER_{name.upper()}"
    environment.setenv("ROSTER_GRACE", "1000000")  # of which a pause may be a part
    for text, seconds in {"604800": 604800, "90.5": 90.5, " 90\n": 90, "9e1": 90}.items():
        environment.setenv(variable, text)
        value = getattr(Settings(), name)
        assert (value.total_seconds() if isinstance(value, timedelta) else value) == seconds
    for text in ("30s", "", " ", "-1", "inf", "nan", "1e9", "1e99", "half a minute"):
        environment.setenv(variable, text)
        if name != "bulk_load_ttl" or text != "1e9":  # kept for up to a century
            refused()


def test_the_ttl_of_loads_takes_iso_8601_too(environment: pytest.MonkeyPatch) -> None:
    """But no time in the past, and none before the calendar begins."""
    environment.setenv("ROSTER_BULK_LOAD_TTL", "P30DT12H")
    assert Settings().bulk_load_ttl == timedelta(days=30, hours=12)
    for text in ("0", "-P1D", "P999999D"):
        environment.setenv("ROSTER_BULK_LOAD_TTL", text)
        refused()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_setting_is_refused_unless_its_help_says_what_empty_means(
    name: str, environment: pytest.MonkeyPatch
) -> None:
    """It is neither taken for its default nor for the current folder."""
    environment.setenv(f"ROSTER_{name.upper()}", " \n")
    if "empty for none" in str(Settings.model_fields[name].description):
        assert getattr(Settings(), name) == ""
    else:
        assert "is empty; give it a value, or leave it unset" in str(refused())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgres://ada:p%40ss@db:5433/roster", "postgresql+asyncpg://ada:p%40ss@db:5433/roster"),
        ("postgresql://ada@db/roster", "postgresql+asyncpg://ada@db/roster"),
        ("postgresql+asyncpg://db/roster?ssl=require", "postgresql+asyncpg://db/roster?ssl=require"),
        ("sqlite:////var/lib/roster.db", "sqlite+aiosqlite:////var/lib/roster.db"),
    ],
)
def test_a_url_gets_the_driver_that_we_use(url: str, expected: str) -> None:
    """Everything else in it stays, the password too."""
    assert Settings(database_url=url).database_url == expected


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ada:secret@db/roster", "is not a URL"),
        ("postgresql://ada:secret/roster", "is not a URL"),
        ("postgresql://ada:secret@db:port/roster", "is not a URL"),
        ("mysql://ada:secret@db/roster", "has the scheme mysql; postgresql and sqlite are supported"),
        ("postgresql+psycopg://ada:secret@db/roster", "has the scheme postgresql+psycopg"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_a_wrong_url_is_explained_without_its_password(url: str, sentence: str) -> None:
    """Neither in the sentence nor in what pydantic adds to it."""
    error = refused(database_url=url)

    assert sentence in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0:50051",
        "[::]:50051",
        "roster.example.org:50051",
        ":50051",
        "10.0.0.1:1",
        "127.evil.example.org:1",
        "localhost.example.org:1",
        "[::1.example.org]:1",
    ],
)
def test_strangers_are_kept_out_unless_told_otherwise(listen: str) -> None:
    """Beyond this machine the server listens only if `insecure` says so, or with TLS and callers' names."""
    told = str(refused(listen=listen))
    assert "ROSTER_TLS_CERT_FILE and ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE" in told
    assert "ROSTER_INSECURE=true" in told
    assert Settings(listen=listen, insecure=True).listen == listen
    for known in (CERTIFICATES, TOKENS):
        assert Settings(listen=listen, **TLS, **known).listen == listen


@pytest.mark.parametrize("given", ["tls", "tokens", "nothing"])
def test_neither_tls_nor_tokens_are_enough_alone(given: str) -> None:
    """The one lets everybody in, the other shows everybody the tokens."""
    chosen = {"tls": TLS, "tokens": TOKENS, "nothing": {}}[given]

    assert "without TLS and authentication" in str(refused(listen="0.0.0.0:1", **chosen))
    assert Settings(listen="127.0.0.1:1", **chosen).listen == "127.0.0.1:1"


def test_settings_that_go_together_are_told_all_at_once() -> None:
    """Each by its name, with those that are missing."""
    error = refused(
        listen="0.0.0.0:1",
        tls_cert_file="cert.pem",
        tls_client_ca_file="ca.pem",
        jwt_issuer="https://issuer.example.org",
    )
    told = {problem["loc"][0]: problem["msg"] for problem in error.errors()}

    assert list(told) == ["tls_key_file", "jwt_keys_file", "policy_file"]
    assert "ROSTER_TLS_CERT_FILE" in told["tls_key_file"]
    assert "ROSTER_JWT_ISSUER and ROSTER_JWT_AUDIENCE" in told["jwt_keys_file"]
    assert "ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE" in told["policy_file"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tls_key_file": "key.pem"}, "tls_key_file"),
        ({"tls_client_ca_file": "ca.pem", "policy_file": "policy.toml"}, "tls_client_ca_file"),
        ({"jwt_keys_file": "keys.pem", "policy_file": "policy.toml"}, "jwt_keys_file"),
        ({"policy_file": "policy.toml"}, "policy_file"),
    ],
)
def test_half_a_protection_is_refused(settings: dict[str, str], name: str) -> None:
    """Also on this machine: who sets it thinks that it works."""
    assert [problem["loc"][0] for problem in refused(**settings).errors()] == [name]


def test_reflection_is_on_for_this_machine_only() -> None:
    """Unless it is said."""
    beyond = {"listen": "0.0.0.0:1", "insecure": True}
    chosen = [{}, beyond, {**beyond, "reflection": True}, {"reflection": False}]

    assert [Settings(**each).reflection for each in chosen] == [True, False, True, False]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "127.0.0.53:1", "localhost:1", "[::1]:1", "unix:/run/roster"]
)
def test_this_machine_may_always_call(listen: str) -> None:
    """By a loopback address or a Unix socket."""
    assert Settings(listen=listen).listen == listen


@pytest.mark.parametrize(
    "listen",
    ["localhost", "50051", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "unix:", "::1:50051"],
)
def test_an_address_to_listen_on_has_a_port_or_a_path(listen: str) -> None:
    """Of a port that is too large gRPC would take what is left modulo 65536."""
    assert "must be host:port, with a port up to 65535, or unix:/path" in str(refused(listen=listen))


def test_everything_wrong_is_told_at_once() -> None:
    """Whatever rule it is that a setting breaks."""
    error = refused(listen="0.0.0.0:1", database_url="roster", pool_size=0, pool_timeout=0, log_level="LOUD")

    assert [problem["loc"][0] for problem in error.errors()] == [
        "listen",
        "log_level",
        "database_url",
        "pool_size",
        "pool_timeout",
    ]


def test_reports_no_contradiction_with_a_wrong_value() -> None:
    """Whether it would be one can't be known."""
    wrong = refused(tls_cert_file="", tls_key_file="key.pem", drain_pause="soon", grace=1, workers=0)

    assert [problem["loc"][0] for problem in wrong.errors()] == ["tls_cert_file", "drain_pause", "workers"]


def test_default_of_reflection_follows_the_address_that_is_set(environment: pytest.MonkeyPatch) -> None:
    """Whichever source has it."""
    environment.setenv("ROSTER_INSECURE", "true")
    environment.setenv("ROSTER_LISTEN", "0.0.0.0:1")
    assert Settings().reflection is False


def test_a_command_names_the_variables_that_are_wrong(environment: pytest.MonkeyPatch) -> None:
    """One line each, and status 2; no value is repeated."""
    environment.setenv("DATABASE_URL", "mysql://ada:secret@db/roster")
    environment.setenv("ROSTER_LISTEN", "0.0.0.0:1")
    result = CliRunner().invoke(main, ["migrate"])

    assert result.exit_code == 2
    first, second = result.output.splitlines()
    assert "ROSTER_LISTEN: without TLS" in first
    assert "ROSTER_DATABASE_URL: has the scheme mysql" in second
    assert "secret" not in result.output


def test_a_command_says_which_file_can_t_be_read(environment: pytest.MonkeyPatch) -> None:
    """Status 2, and no traceback."""
    environment.setenv("ROSTER_DATABASE_URL_FILE", "missing")
    result = CliRunner().invoke(main, ["migrate"])

    assert result.exit_code == 2
    assert "missing" in result.output


@pytest.mark.parametrize("name", ["metrics_listen", "health_listen"])
def test_what_is_served_beside_the_calls_has_a_port(name: str) -> None:
    """Or is off; there is no Unix socket for it."""
    assert "must be host:port, or empty" in str(refused(**{name: "unix:/run/roster"}))
    assert getattr(Settings(**{name: ""}), name) == ""  # type: ignore[arg-type]
