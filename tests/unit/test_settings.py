"""Settings: their sources, their rules, and the errors for wrong ones."""

import logging
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

import service
from service.cli import main
from service.cli.loads import loads
from service.cli.token import issue
from service.settings import Settings
from service.variables import FOR_CLIENTS, FOR_TOKENS

SERVICE = Path(service.__file__).parent
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
    """Clear all settings from the environment, and change to a folder without `.env`."""
    for name in os.environ:
        if name.startswith("ROSTER_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def refused(**values: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Settings(**values)  # type: ignore[arg-type]
    return caught.value


def test_defaults_are_safe() -> None:
    """Only this machine can call, and the database needs no server."""
    settings = Settings()

    assert settings.listen == "127.0.0.1:50051"
    assert settings.database_url == "sqlite+aiosqlite:///roster.db"
    assert settings.is_embedded


def test_reads_environment_variables(environment: pytest.MonkeyPatch) -> None:
    """The variable is the name of the setting in capitals with the prefix."""
    for name, value in {"LISTEN": "[::1]:7000", "POOL_TIMEOUT": "0.5", "REFLECTION": "false"}.items():
        environment.setenv(f"ROSTER_{name}", value)
    settings = Settings()

    assert (settings.listen, settings.pool_timeout, settings.reflection) == ("[::1]:7000", 0.5, False)


def test_own_database_variable_precedes_database_url(environment: pytest.MonkeyPatch) -> None:
    """Platforms set DATABASE_URL."""
    environment.setenv("DATABASE_URL", "sqlite:///platform.db")
    assert Settings().database_url == "sqlite+aiosqlite:///platform.db"
    environment.setenv("ROSTER_DATABASE_URL", "sqlite:///own.db")
    assert Settings().database_url == "sqlite+aiosqlite:///own.db"


def test_sources_have_an_order(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arguments precede the environment, then secret files, then `.env`."""
    (tmp_path / ".env").write_text("ROSTER_DATABASE_URL=sqlite:///dotenv.db\nROSTER_POOL_SIZE=1\n")
    assert (Settings().database_url, Settings().pool_size) == ("sqlite+aiosqlite:///dotenv.db", 1)

    (tmp_path / "secret").write_text("sqlite:///secret.db\n")
    environment.setenv("ROSTER_DATABASE_URL_FILE", str(tmp_path / "secret"))
    assert (Settings().database_url, Settings().pool_size) == ("sqlite+aiosqlite:///secret.db", 1)

    environment.setenv("ROSTER_DATABASE_URL", "sqlite:///environment.db")
    assert Settings().database_url == "sqlite+aiosqlite:///environment.db"
    assert Settings(database_url="sqlite:///argument.db").database_url == "sqlite+aiosqlite:///argument.db"


def test_any_setting_can_come_from_a_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """White space around the value is removed; `.env` may name the file."""
    (tmp_path / "size").write_text("  7\n\n")
    (tmp_path / ".env").write_text(f"ROSTER_MAX_OVERFLOW_FILE={tmp_path}/size\n")
    environment.setenv("ROSTER_POOL_SIZE_FILE", str(tmp_path / "size"))

    assert (Settings().pool_size, Settings().max_overflow) == (7, 7)


def test_grace_must_exceed_drain_pause() -> None:
    """Otherwise all calls would be cut off at the end of the pause."""
    assert Settings(drain_pause=5, grace=8).grace == 8
    with pytest.raises(ValidationError, match="at least 3 s more than ROSTER_DRAIN_PAUSE"):
        Settings(drain_pause=5, grace=7)


IN_SECONDS = [name for name, field in Settings.model_fields.items() if "seconds" in str(field.description)]


@pytest.mark.parametrize("name", IN_SECONDS)
def test_settings_in_seconds_accept_the_same_formats(name: str, environment: pytest.MonkeyPatch) -> None:
    """A whole or fractional number, with white space around it; nothing else."""
    variable = f"ROSTER_{name.upper()}"
    environment.setenv("ROSTER_GRACE", "1000000")  # a pause is a part of it
    for text, seconds in {"604800": 604800, "90.5": 90.5, " 90\n": 90, "9e1": 90}.items():
        environment.setenv(variable, text)
        value = getattr(Settings(), name)
        assert (value.total_seconds() if isinstance(value, timedelta) else value) == seconds
    for text in ("30s", "-1", "inf", "nan", "1e9", "1e99", "half a minute"):
        environment.setenv(variable, text)
        if name not in ("bulk_load_ttl", "changes_ttl") or text != "1e9":  # its maximum is a century
            refused()


def test_ttl_of_loads_accepts_iso_8601(environment: pytest.MonkeyPatch) -> None:
    """It must be positive, and at most a century."""
    environment.setenv("ROSTER_BULK_LOAD_TTL", "P30DT12H")
    assert Settings().bulk_load_ttl == timedelta(days=30, hours=12)
    for text in ("0", "-P1D", "P999999D"):
        environment.setenv("ROSTER_BULK_LOAD_TTL", text)
        refused()


EMPTY = ["", " \n", '""', "''", "\r\n"]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_empty_variable_is_unset_unless_documented(
    name: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Platforms set what is not set as empty, in the environment and in `.env`."""
    default = getattr(Settings(), name)
    expected = "" if "empty for none" in str(Settings.model_fields[name].description) else default
    for text in EMPTY:
        environment.setenv(f"ROSTER_{name.upper()}", text)
        assert getattr(Settings(), name) == expected
    environment.delenv(f"ROSTER_{name.upper()}")
    (tmp_path / ".env").write_text(f"ROSTER_{name.upper()}=\n")
    assert getattr(Settings(), name) == expected


def test_empty_variable_does_not_hide_another_source(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the platform's variable, nor a secret file, nor `.env`."""
    (tmp_path / ".env").write_text("ROSTER_POOL_SIZE=7\n")
    (tmp_path / "secret").write_text("8\n")
    environment.setenv("ROSTER_DATABASE_URL", "")
    environment.setenv("DATABASE_URL", "sqlite:///platform.db")
    environment.setenv("ROSTER_POOL_SIZE", "")
    environment.setenv("ROSTER_MAX_OVERFLOW", " ")
    environment.setenv("ROSTER_MAX_OVERFLOW_FILE", f"{tmp_path}/secret\n")
    environment.setenv("ROSTER_GRACE_FILE", "")
    settings = Settings()

    assert settings.database_url == "sqlite+aiosqlite:///platform.db"
    assert (settings.pool_size, settings.max_overflow, settings.grace) == (7, 8, 30)


@pytest.mark.parametrize("name", ["database_url", "tls_cert_file", "jwt_audience", "pool_size"])
def test_empty_secret_file_is_refused(name: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody mounted it for a value; the default would be another database."""
    (tmp_path / "empty").write_text("\n")
    environment.setenv(f"ROSTER_{name.upper()}_FILE", str(tmp_path / "empty"))

    assert "is empty; give it a value, or leave it unset" in str(refused())


@pytest.mark.parametrize("form", ["{}", "{}\n", " {}\r\n", '"{}"', "'{}'", '"{}"\n', '" {} "'])
def test_white_space_and_quotes_around_a_value_do_not_count(
    form: str, environment: pytest.MonkeyPatch
) -> None:
    """Secrets end with a newline, and `docker run --env-file` keeps quotes."""
    values = {
        "jwt_audience": ("roster", "roster"),
        "jwt_issuer": ("https://issuer.example.org", "https://issuer.example.org"),
        "jwt_keys_file": ("/etc/keys.pem", Path("/etc/keys.pem")),
        "policy_file": ("policy.toml", Path("policy.toml")),
        "database_url": ("postgresql://ada:p@db/x", "postgresql+asyncpg://ada:p@db/x"),
        "listen": ("127.0.0.1:7000", "127.0.0.1:7000"),
        "pool_size": ("7", 7),
        "slow_call": ("1.5", 1.5),
        "reflection": ("off", False),
        "log_format": ("JSON", "json"),
    }
    for name, (text, _) in values.items():
        environment.setenv(f"ROSTER_{name.upper()}", form.format(text))
    settings = Settings()

    for name, (_, expected) in values.items():
        assert getattr(settings, name) == expected


def test_single_quote_is_a_value(environment: pytest.MonkeyPatch) -> None:
    """Only a pair around the whole value is removed."""
    for text in ('"', "'roster", 'ros"ter"', "'roster\""):
        environment.setenv("ROSTER_JWT_AUDIENCE", text)
        environment.setenv("ROSTER_JWT_ISSUER", "x")
        environment.setenv("ROSTER_JWT_KEYS_FILE", "x")
        environment.setenv("ROSTER_POLICY_FILE", "x")
        assert Settings().jwt_audience == text


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", "INFO"),
        ("Info\n", "INFO"),
        ("warn", "WARNING"),
        ("WARN", "WARNING"),
        ("warning", "WARNING"),
        ("error", "ERROR"),
        ("fatal", "CRITICAL"),
        ("critical", "CRITICAL"),
        ("trace", "DEBUG"),
        ('"debug"', "DEBUG"),
    ],
)
def test_log_level_has_the_usual_spellings(text: str, level: str, environment: pytest.MonkeyPatch) -> None:
    """Python's logging knows the result."""
    environment.setenv("ROSTER_LOG_LEVEL", text)

    assert Settings().log_level == level
    assert isinstance(logging.getLevelName(level), int)


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "Yes", "on", "y", "t", " true\n", '"true"'])
def test_switch_has_the_usual_spellings(text: str, environment: pytest.MonkeyPatch) -> None:
    """Their opposites, too."""
    opposite = {
        "true": "false",
        "TRUE": "FALSE",
        "1": "0",
        "yes": "no",
        "Yes": "No",
        "on": "off",
        "y": "n",
        "t": "f",
    }
    bare = text.strip(' \n"')
    environment.setenv("ROSTER_INSECURE", text)
    environment.setenv("ROSTER_POOL_PRE_PING", text.replace(bare, opposite[bare]))

    assert (Settings().insecure, Settings().pool_pre_ping) == (True, False)


@pytest.mark.parametrize("name", [".env", "secret"])
def test_file_may_begin_with_a_byte_order_mark(
    name: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As some editors save it; another encoding is refused in a sentence."""
    text = "ROSTER_POOL_SIZE=7\n" if name == ".env" else "7\n"
    if name == "secret":
        environment.setenv("ROSTER_POOL_SIZE_FILE", "secret")
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert Settings().pool_size == 7

    (tmp_path / name).write_text(text, encoding="utf-16")
    ended = CliRunner().invoke(main, ["migrate"])
    assert ended.exit_code == 2
    assert "is not UTF-8; save it as UTF-8" in ended.output


@pytest.mark.parametrize("host", ["", "*"])
def test_empty_host_is_all_interfaces(host: str) -> None:
    """With the rules for addresses that others can reach, and without reflection."""
    address = f"{host}:7000"
    assert "means all interfaces" in str(refused(listen=address))
    settings = Settings(listen=address, insecure=True, metrics_listen=address, health_listen=address)

    assert settings.listen in ("[::]:7000", "0.0.0.0:7000")
    assert settings.metrics_listen == settings.health_listen == settings.listen
    assert settings.reflection is False


def test_database_url_can_be_required() -> None:
    """As in the container image; SQLite can still be asked for."""
    assert "is not set; set it to postgresql://user@host/name" in str(refused(database_required=True))
    assert Settings(database_required=True, database_url="sqlite:///x.db").is_embedded
    assert not Settings(database_required=True, database_url="postgresql://db/x").is_embedded


@pytest.mark.parametrize("command", [loads, issue], ids=["loads", "issue"])
def test_client_variables_are_cleaned(command: click.Command, environment: pytest.MonkeyPatch) -> None:
    """A newline at the end of a token would make every call fail. The environment itself is not changed."""
    options = [option for option in command.params if option.envvar]
    for option in options:
        environment.setenv(str(option.envvar), ' "1"\r\n')
    context = click.Context(command)

    assert options
    assert {option.value_from_envvar(context) for option in options} == {"1"}
    assert {os.environ[str(option.envvar)] for option in options} == {' "1"\r\n'}


@pytest.mark.parametrize("value", ["", " ", '""', "\n"])
def test_empty_client_variable_counts_as_unset(value: str, environment: pytest.MonkeyPatch) -> None:
    """As for settings."""
    environment.setenv("ROSTER_ADDRESS", value)
    (address,) = [option for option in loads.params if option.envvar == "ROSTER_ADDRESS"]

    assert address.value_from_envvar(click.Context(loads)) is None


def test_every_client_variable_has_an_option() -> None:
    """`.env` fills in the same ones."""
    options = {option.envvar: option.name for option in (*loads.params, *issue.params) if option.envvar}
    assert options == FOR_CLIENTS | FOR_TOKENS


def test_only_the_settings_read_the_environment() -> None:
    """Except for the variables that the command sets for gRPC before it is imported."""
    readers = [
        str(path.relative_to(SERVICE))
        for path in SERVICE.rglob("*.py")
        if re.search(r"\bos\.(environ|getenv)|import .*\b(environ|getenv)\b", path.read_text())
    ]
    assert sorted(readers) == ["cli/__init__.py", "settings.py", "variables.py"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgres://ada:p%40ss@db:5433/roster", "postgresql+asyncpg://ada:p%40ss@db:5433/roster"),
        ("postgresql://ada@db/roster", "postgresql+asyncpg://ada@db/roster"),
        ("postgresql+asyncpg://db/roster?ssl=require", "postgresql+asyncpg://db/roster?ssl=require"),
        ("sqlite:////var/lib/roster.db", "sqlite+aiosqlite:////var/lib/roster.db"),
    ],
)
def test_database_url_gets_our_driver(url: str, expected: str) -> None:
    """The rest of the URL, including the password, is unchanged."""
    assert Settings(database_url=url).database_url == expected


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ada:secret@db/roster", "is not a URL"),
        ("postgresql://ada:secret/roster", "has a host that is not host, host:port"),
        ("postgresql://ada:secret@db:port/roster", "has a host that is not host, host:port"),
        ("mysql://ada:secret@db/roster", "has the scheme mysql; postgresql and sqlite are supported"),
        ("postgresql+mysqldb://ada:secret@db/roster", "has the scheme postgresql+mysqldb"),
        ("sqlite+pysqlcipher://ada:secret@/x.db", "has the scheme sqlite+pysqlcipher"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_error_for_a_wrong_url_hides_its_password(url: str, sentence: str) -> None:
    """The whole error is checked, including the parts that pydantic adds."""
    error = refused(database_url=url)

    assert sentence in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0:50051",
        "[::]:50051",
        "roster.example.org:50051",
        "10.0.0.1:1",
        "127.evil.example.org:1",
        "localhost.example.org:1",
        "[::1.example.org]:1",
    ],
)
def test_public_address_needs_authentication_or_insecure(listen: str) -> None:
    """Authentication is TLS with client certificates or tokens."""
    error = str(refused(listen=listen))
    assert "ROSTER_TLS_CERT_FILE and ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE" in error
    assert "ROSTER_INSECURE=true" in error
    assert Settings(listen=listen, insecure=True).listen == listen
    for known in (CERTIFICATES, TOKENS):
        assert Settings(listen=listen, **TLS, **known).listen == listen


@pytest.mark.parametrize("given", ["tls", "tokens", "nothing"])
def test_neither_tls_nor_tokens_suffice_alone(given: str) -> None:
    """TLS alone admits every caller; tokens alone are sent in the clear."""
    chosen = {"tls": TLS, "tokens": TOKENS, "nothing": {}}[given]

    assert "means all interfaces" in str(refused(listen="0.0.0.0:1", **chosen))
    assert Settings(listen="127.0.0.1:1", **chosen).listen == "127.0.0.1:1"


def test_reports_all_incomplete_groups_of_settings() -> None:
    """Each error names the settings that are missing."""
    error = refused(
        listen="0.0.0.0:1",
        tls_cert_file="cert.pem",
        tls_client_ca_file="ca.pem",
        jwt_issuer="https://issuer.example.org",
    )
    messages = {problem["loc"][0]: problem["msg"] for problem in error.errors()}

    assert list(messages) == ["tls_key_file", "jwt_keys_file", "policy_file"]
    assert "ROSTER_TLS_CERT_FILE" in messages["tls_key_file"]
    assert "ROSTER_JWT_ISSUER and ROSTER_JWT_AUDIENCE" in messages["jwt_keys_file"]
    assert "ROSTER_TLS_CLIENT_CA_FILE or ROSTER_JWT_KEYS_FILE" in messages["policy_file"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tls_key_file": "key.pem"}, "tls_key_file"),
        ({"tls_client_ca_file": "ca.pem", "policy_file": "policy.toml"}, "tls_client_ca_file"),
        ({"jwt_keys_file": "keys.pem", "policy_file": "policy.toml"}, "jwt_keys_file"),
        ({"policy_file": "policy.toml"}, "policy_file"),
    ],
)
def test_incomplete_protection_is_refused(settings: dict[str, str], name: str) -> None:
    """Also on a local address: the operator would believe that it works."""
    assert [problem["loc"][0] for problem in refused(**settings).errors()] == [name]


def test_reflection_defaults_to_local_addresses() -> None:
    """An explicit setting overrides the default."""
    beyond = {"listen": "0.0.0.0:1", "insecure": True}
    chosen = [{}, beyond, {**beyond, "reflection": True}, {"reflection": False}]

    assert [Settings(**each).reflection for each in chosen] == [True, False, True, False]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "127.0.0.53:1", "localhost:1", "[::1]:1", "unix:/run/roster"]
)
def test_local_address_needs_no_authentication(listen: str) -> None:
    """Loopback addresses and Unix sockets are local."""
    assert Settings(listen=listen).listen == listen


@pytest.mark.parametrize(
    "listen",
    ["localhost", "50051", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "unix:", "::1:50051"],
)
def test_listen_address_needs_a_port_or_a_path(listen: str) -> None:
    """The gRPC library would take a larger port modulo 65536."""
    assert "must be host:port, with a port up to 65535, or unix:/path" in str(refused(listen=listen))


def test_reports_all_wrong_settings_at_once() -> None:
    """Wrong values and contradictions are reported in the order of the settings."""
    error = refused(listen="0.0.0.0:1", database_url="roster", pool_size=0, pool_timeout=0, log_level="LOUD")

    assert [problem["loc"][0] for problem in error.errors()] == [
        "listen",
        "log_level",
        "database_url",
        "pool_size",
        "pool_timeout",
    ]


@pytest.mark.parametrize(
    ("database_url", "replica_url"),
    [
        ("sqlite:///roster.db", "postgresql://host/roster"),
        ("postgresql://host/roster", "sqlite:///roster.db"),
    ],
)
def test_replicas_are_for_postgresql(database_url: str, replica_url: str) -> None:
    """Both URLs name servers of one PostgreSQL cluster."""
    error = refused(database_url=database_url, replica_url=replica_url)
    assert [problem["loc"] for problem in error.errors()] == [("replica_url",)]
    assert Settings(replica_url="postgres://a,b/roster", database_url="postgres://c/roster").replica_url == (
        "postgresql+asyncpg://a,b/roster"
    )


def test_reports_no_contradiction_with_a_wrong_value() -> None:
    """The right value might not contradict the other settings."""
    wrong = refused(tls_cert_file="", tls_key_file="key.pem", drain_pause="soon", grace=1, workers=0)

    assert [problem["loc"][0] for problem in wrong.errors()] == ["tls_cert_file", "drain_pause", "workers"]


def test_default_of_reflection_follows_the_configured_address(environment: pytest.MonkeyPatch) -> None:
    """The address may come from any source."""
    environment.setenv("ROSTER_INSECURE", "true")
    environment.setenv("ROSTER_LISTEN", "0.0.0.0:1")
    assert Settings().reflection is False


def test_command_names_wrong_variables(environment: pytest.MonkeyPatch) -> None:
    """It prints a line for each without its value, and exits with status 2."""
    environment.setenv("DATABASE_URL", "mysql://ada:secret@db/roster")
    environment.setenv("ROSTER_LISTEN", "0.0.0.0:1")
    result = CliRunner().invoke(main, ["migrate"])

    assert result.exit_code == 2
    first, second = result.output.splitlines()
    assert "ROSTER_LISTEN: `0.0.0.0:1` means all interfaces: use 127.0.0.1:1, or " in first
    assert "ROSTER_DATABASE_URL has the scheme mysql" in second
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DATABASE_URL", "postgrseql://db/roster", "has the scheme postgrseql; "),
        ("DATABASE_URL", "db.example.org", "is not a URL"),
        ("DATABASE_URL", "jdbc:postgresql://db/roster", "is a URL of JDBC; "),
        ("DATABASE_URL", "postgresql://db/roster?sslmode=maybe", "has a wrong value of sslmode; "),
        ("DATABASE_URL", "postgresql://a%zz@db/roster", "contains a % that begins no "),
        ("DATABASE_URL", "postgresql:///roster?host=@foo", "names an abstract socket"),
        ("MIGRATION_URL", "sqlite:///:memory:", "names no file; "),
        ("WORKERS", "2", "must be 1 with SQLite, "),
        ("GRACE", "0", "should be greater than 0"),
        ("POOL_SIZE", "many", "should be a valid integer, "),
        ("LOG_LEVEL", "loud", "should be 'DEBUG', "),
        ("INSECURE", "perhaps", "should be a valid boolean, "),
        ("BULK_LOAD_TTL", "soon", "should be a valid timedelta, "),
        ("TLS_CLIENT_CA_FILE", "ca.pem", "needs ROSTER_TLS_CERT_FILE and "),
    ],
)
def test_error_is_a_sentence_about_the_setting(
    name: str, value: str, sentence: str, environment: pytest.MonkeyPatch
) -> None:
    """There is no colon between a subject and its verb."""
    environment.setenv(f"ROSTER_{name}", value)
    result = CliRunner().invoke(main, ["migrate"])

    assert result.exit_code == 2
    assert f"ROSTER_{name} {sentence}" in result.output


@pytest.mark.parametrize(
    ("listen", "start"),
    [
        (":50071", "`:50071` means all interfaces: use 127.0.0.1:50071, or "),
        ("*:50071", "`*:50071` means all interfaces: use 127.0.0.1:50071, or "),
        (" 0.0.0.0:50071", "`0.0.0.0:50071` means all interfaces: use 127.0.0.1:50071, or "),
        ("[::]:50071", "`[::]:50071` means all interfaces: use 127.0.0.1:50071, or "),
        ("10.1.2.3:7", "`10.1.2.3:7` is not only for this machine: use 127.0.0.1:7, or "),
        ("db.example.org:7", "`db.example.org:7` is not only for this machine: use 127.0.0.1:7, or "),
    ],
)
def test_exposed_address_comes_first_in_its_error(
    listen: str, start: str, environment: pytest.MonkeyPatch
) -> None:
    """As it was written, and then the address that was probably meant."""
    environment.setenv("ROSTER_LISTEN", listen)
    result = CliRunner().invoke(main, ["migrate"])

    assert f"ROSTER_LISTEN: {start}" in result.output


def test_command_names_an_unreadable_file(environment: pytest.MonkeyPatch) -> None:
    """It exits with status 2 and prints no traceback."""
    environment.setenv("ROSTER_DATABASE_URL_FILE", "missing")
    result = CliRunner().invoke(main, ["migrate"])

    assert result.exit_code == 2
    assert "missing" in result.output


@pytest.mark.parametrize("name", ["metrics_listen", "health_listen"])
def test_metrics_and_health_addresses_need_a_port(name: str) -> None:
    """They may be empty, but not a Unix socket."""
    assert "must be host:port, or empty" in str(refused(**{name: "unix:/run/roster"}))
    assert getattr(Settings(**{name: ""}), name) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("options=-cwork_mem%3D5MB&schema=app", "sets search_path, work_mem for the session, which a pooler"),
        ("statement_cache_size=100", "sets statement_cache_size, but a pooler in transaction mode keeps no"),
    ],
)
def test_pooler_in_transaction_mode_keeps_no_session(parameters: str, sentence: str) -> None:
    """Settings that need a session are refused with advice; in other modes they are accepted."""
    url = f"postgresql://ada@db/roster?{parameters}"
    assert sentence in str(refused(database_url=url, database_pooler="transaction"))
    for mode in ("none", "session"):
        assert Settings(database_url=url, database_pooler=mode).pools_transactions is False
    harmless = "postgresql://ada@db/roster?statement_cache_size=0&options=endpoint%3Dep-cool-1"
    assert Settings(database_url=harmless, database_pooler="Transaction").pools_transactions is True


def test_sqlite_has_no_pooler() -> None:
    """In any mode."""
    assert "must be none with SQLite" in str(refused(database_pooler="session"))
