"""Connection strings of PostgreSQL, compared with libpq's own reading of them."""

import os
import re
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from service.db import conninfo
from service.settings import Settings
from tests.support import libpq
from tests.support.authority import Authority

CHECKOUT = Path(__file__).parents[2]

# As the consoles of these providers show them, with other names and passwords.
PROVIDERS = {
    "Neon": "postgresql://ada:npg_X1@ep-cool-pooler.eu-central-1.aws.neon.tech/neondb"
    "?sslmode=require&channel_binding=require",
    "Neon's endpoint": "postgresql://ada:npg_X1@pg.neon.tech/neondb?options=endpoint%3Dep-cool-1",
    "Supabase": "postgresql://postgres.abcd:pw@aws-0-eu-west-1.pooler.supabase.com:6543/postgres",
    "Supabase, IPv6": "postgresql://postgres:pw@[2a05:d014::1]:5432/postgres",
    "Heroku": "postgres://u7q:p3c@ec2-3-1.eu-west-1.compute.amazonaws.com:5432/d9f",
    "Cloud SQL": "postgresql://ada:pw@/roster?host=/cloudsql/project:europe-west1:main",
    "RDS": "postgresql://ada:pw@main.abc.rds.amazonaws.com/roster?sslmode=verify-full&sslrootcert=system",
    "Render": "postgresql://ada:pw@dpg-abc-a.frankfurt-postgres.render.com/roster",
    "Azure": "postgresql://ada%40main:pw@main.postgres.database.azure.com:5432/roster?sslmode=require",
    "Azure's keywords": "host=main.postgres.database.azure.com port=5432 dbname=roster user=ada "
    "password='p w' sslmode=require",
    "Patroni": "postgresql://ada:pw@a:5432,b:5433,c/roster?target_session_attrs=read-write&connect_timeout=3",
    "Debian's socket": "postgresql://ada@%2Fvar%2Frun%2Fpostgresql/roster",
    "libpq's JDBC spelling": "postgresql://ada@db/roster?ssl=true",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Clear the variables of libpq and of Roster, and change to an empty folder."""
    for name in os.environ:
        if re.match("PG|ROSTER_|DATABASE_URL$", name):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def read(text: str) -> dict[str, str]:
    """Return the parameters of a connection string, with those of the environment."""
    return conninfo.read(text, os.environ)


@pytest.mark.parametrize("url", PROVIDERS.values(), ids=PROVIDERS)
def test_urls_of_providers_mean_what_they_mean_to_libpq(url: str) -> None:
    """Also after they have become a setting."""
    expected = libpq.parse(url)
    actual = read(Settings(database_url=url).database_url)
    if expected.get("channel_binding") == "require":
        expected |= {"sslmode": "verify-full", "sslrootcert": "system"}

    assert actual == expected


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg", "pg8000"])
def test_driver_of_a_url_does_not_matter(driver: str) -> None:
    """SQLAlchemy's URLs name one."""
    assert conninfo.parse(f"postgresql+{driver}://u@h/d") == libpq.parse("postgresql://u@h/d")


# Parts of connection strings, and what separates them.
PIECES = [
    "u",
    "pass",
    ":",
    "@",
    "h1",
    ",",
    "[::1]",
    "5432",
    "/",
    "db",
    "?",
    "&",
    "=",
    "%20",
    "%",
    "#",
    "'",
    "\\",
    " ",
]
PIECES += [
    "host",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "-cgeqo=off",
    "é",
    "%2F",
]


def both(text: str) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """Return what Roster and libpq read; None for a text that is refused."""
    try:
        ours = conninfo.parse(text)
    except ValueError:
        ours = None
    try:
        theirs = libpq.parse(text)
    except ValueError:
        theirs = None
    without_empty = theirs and {name: value for name, value in theirs.items() if value}
    return ours, without_empty


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_url_never_means_something_else_than_to_libpq(rest: str) -> None:
    """Roster may refuse more, for the sake of a better error, or allow `=` in a value."""
    ours, theirs = both(f"postgresql://{rest}")
    if ours is not None and theirs is not None:
        if not theirs.get("port", "").strip(","):  # libpq keeps the commas of hosts without ports
            theirs.pop("port", None)
        assert ours == theirs


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_keywords_mean_what_they_mean_to_libpq(rest: str) -> None:
    """Quotes and backslashes included."""
    ours, theirs = both(f"host=x {rest}")

    assert ours == theirs


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
def test_percent_encoded_password_is_unchanged(password: str) -> None:
    """Whatever it contains."""
    url = f"postgresql://ada:{quote(password, safe='')}@db/roster"

    assert conninfo.parse(conninfo.normalise(url))["password"] == password


@given(st.text(st.characters(min_codepoint=32, codec="utf-8"), min_size=1))
def test_keywords_become_a_url_with_the_same_meaning(password: str) -> None:
    """The setting is always a URL."""
    quoted = re.sub(r"(['\\])", r"\\\1", password)
    text = f"host=/tmp port=1 user=ada dbname=x password='{quoted}'"

    assert conninfo.parse(conninfo.normalise(text)) == libpq.parse(text)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:s3@cret@db/roster",
        "postgresql://ada:s3/cret@db/roster",
        "postgresql://ada:12/cret@db/roster",
        "postgresql://ada:s3cret%@db/roster",
        "postgresql://ada:%zzs3cret@db/roster",
        "postgresql://ada:s3/cr?et@db/roster",
        "postgresql://ada:s3cret/roster",
        "postgresql://ada:s3cret@db:port/roster",
        "postgresql://ada:s3cret@db:99999/roster",
        "postgresql://ada:s3cret@db:0/roster",
        "postgresql://ada:s3cret@[::1/roster",
        "postgresql://ada:s3cret@d..b/roster",
        "mysql://ada:s3cret@db/roster",
        "jdbc:postgresql://db/roster?user=ada&password=s3cret",
        "psql 'postgresql://ada:s3cret@db/roster'",
        "ada:s3cret@db/roster",
        "host=db password='s3cret",
        "host=a,b port=1,2,3 password=s3cret",
        "s3cret",
    ],
)
def test_error_for_a_wrong_url_repeats_no_part_of_it(url: str) -> None:
    """It says how to write it, in one sentence."""
    with pytest.raises(ValueError, match=r"write|leave out|supported|port|host") as caught:
        Settings(database_url=url)

    for piece in ("s3cret", "cret", "s3", "12/", "99999", "ada"):
        assert piece not in str(caught.value)


@pytest.mark.parametrize("password", ["s#cret", "s?cret", "s:cret", "s=cret", "s&cret", "s+cret", "s[cret"])
def test_password_that_libpq_accepts_unencoded_is_accepted(password: str) -> None:
    """Only @, / and % have to be encoded there."""
    url = f"postgresql://ada:{password}@db/roster"

    assert read(url)["password"] == password == libpq.parse(url)["password"]


@pytest.mark.parametrize("character", ["@", "/", "%"])
def test_error_says_how_to_encode_a_character(character: str) -> None:
    """The user copies it from the sentence."""
    with pytest.raises(ValueError, match=f"{character} as {quote(character, safe='')}"):
        read(f"postgresql://ada:a{character}b@db/roster")


def test_every_parameter_of_libpq_has_a_rule() -> None:
    """It is honoured, ignored with a warning, or refused by name, and the page says which."""
    rules = [conninfo.HONOURED, conninfo.REFUSED.keys(), conninfo.IGNORED.keys(), {"requiressl"}]
    page = (CHECKOUT / "docs/operating.md").read_text()

    for name in libpq.keywords():
        assert sum(name in rule for rule in rules) == 1, name
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("name", conninfo.REFUSED)
def test_parameter_that_can_t_be_honoured_is_refused_by_name(name: str) -> None:
    """Unless its value asks for nothing."""
    with pytest.raises(ValueError, match=rf"has the parameter {name}, which can't be honoured: .*[a-z]"):
        read(f"postgresql://ada@db/roster?{name}=anything")
    for harmless in conninfo.REFUSED[name].harmless:
        assert not [*conninfo.warnings(read(f"postgresql://ada@db/roster?{name}={harmless}"))]


@pytest.mark.parametrize("name", conninfo.IGNORED)
def test_parameter_that_is_ignored_is_named_in_a_warning(name: str) -> None:
    """Prisma's, for example."""
    (warning,) = conninfo.warnings(read(f"postgresql://ada@db/roster?{name}=true"))

    assert f"the parameter {name} of the database URL is ignored" in warning


@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        ("aplication_name=x", "has the unknown parameter aplication_name; did you mean application_name?"),
        ("SSLMODE=require", "has the unknown parameter SSLMODE; did you mean sslmode?"),
        ("hunter=2", "has an unknown parameter; remove it, or write & in a value as %26"),
        ("sslmode=verify_full", "has a wrong value of sslmode; it is one of disable, allow"),
        ("connect_timeout=5s", "has a wrong value of connect_timeout; it is a whole number"),
        ("target_session_attrs=master", "has a wrong value of target_session_attrs"),
        ("sslmode=require&sslrootcert=system", "has sslrootcert=system, which needs sslmode=verify-full"),
        ("sslnegotiation=direct", "has sslnegotiation=direct, which needs sslmode=require"),
        (
            "sslmode=verify-full&sslrootcert=rds-ca.pem",
            "names the sslrootcert rds-ca.pem, which can't be used: No such",
        ),
        (
            "sslmode=verify-ca&sslrootcert=notes.pem",
            "names the sslrootcert notes.pem, which can't be used: it is not PEM",
        ),
        ("sslcert=a.pem&sslkey=b.pem", "names an sslcert or sslkey that can't be used: No such file"),
        ("options=-c", "has -c without name=value in options"),
        ("service=nowhere", "names a service that neither"),
        ("user", "has a parameter without a value"),
    ],
)
def test_wrong_parameter_is_named(parameter: str, sentence: str, tmp_path: Path) -> None:
    """With what would be right."""
    (tmp_path / "notes.pem").write_text("Dear diary")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(f"postgresql://ada@db/roster?{parameter}")


UNENCODED = "contains a character that has to be percent-encoded in the user or the password"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("postgresql://ro:12/pw?hunter=two@host/app", UNENCODED),
        ("postgresql://ro:12/pw?hunter@host/app", UNENCODED),
        ("postgresql://ro:12/pw?sslmode=require&hunter=two@host/app", UNENCODED),
        ("postgresql://ro:12/pw?usr=hunter@host/app", UNENCODED),
        ("postgresql://ro:12/pw?host=hunter@host/app", UNENCODED),
        ("postgresql://ada:p@pw?hunter=two@host/app", UNENCODED),
        ("postgresql://ada@host/app?password=my&hunter=two", "write & in a value as %26"),
        ("postgresql://ada@host/app?password=my&hunter", "has a parameter without a value"),
        ("password=my hunter=x host=db", "put a value that contains spaces in single quotes"),
        ("host=db password=my s3cret=hunter", "put a value that contains spaces in single quotes"),
        ("password=my hunter", "is not a URL"),
    ],
)
def test_no_error_repeats_a_part_of_a_password(text: str, sentence: str) -> None:
    """Neither as the name of a parameter nor as its value; the error says how to write such a password."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read(text)

    assert not re.search("hunter|two|s3cret", str(caught.value))


def test_at_sign_in_the_value_of_a_known_parameter_is_accepted() -> None:
    """As libpq accepts it, for example in the users of Azure."""
    url = "postgresql://db/roster?user=ada@main&application_name=a@b"

    assert read(url) == libpq.parse(url)


def test_certificate_files_are_accepted(tmp_path: Path) -> None:
    """Relative to the working directory, as for libpq."""
    authority = Authority()
    authority.issue("localhost").write(tmp_path)
    authority.write(tmp_path).rename("rds-ca.pem")
    query = "sslmode=verify-full&sslrootcert=rds-ca.pem&sslcert=cert.pem&sslkey=key.pem"

    assert read(f"postgresql://ada@db/roster?{query}")["sslrootcert"] == "rds-ca.pem"


@pytest.mark.parametrize(
    ("parameters", "settings"),
    [
        ("options=-csearch_path%3Da,b", {"search_path": "a,b"}),
        ("options=-c%20geqo%3Doff%20--work-mem%3D7MB", {"geqo": "off", "work_mem": "7MB"}),
        (r"options=-c%20application_name%3Da\%20b", {"application_name": "a b"}),
        ("options=endpoint%3Dep-cool-1", {"options": "endpoint=ep-cool-1"}),
        ("options=project%3Dx%20-c%20geqo%3Doff%20-F", {"geqo": "off", "options": "project=x -F"}),
        ("schema=my-app", {"search_path": '"my-app"'}),
        ("application_name=x&fallback_application_name=y", {"application_name": "x"}),
        ("fallback_application_name=y", {"application_name": "y"}),
    ],
)
def test_options_are_settings_of_the_session(parameters: str, settings: dict[str, str]) -> None:
    """An option that is not a setting is passed on, as to Neon's proxy."""
    assert conninfo.server_settings(read(f"postgresql://ada@db/roster?{parameters}")) == settings


def test_service_file_and_environment_fill_in_what_is_missing(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In libpq's order: the URL, the service, the environment."""
    (tmp_path / "services").write_text(
        "# ours\n[main]\nhost=from-service\nuser=service%1\napplication_name=s\n"
    )
    environment.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    environment.setenv("PGSERVICE", "main")
    environment.setenv("PGAPPNAME", "environment")
    environment.setenv("PGCONNECT_TIMEOUT", "7")
    environment.setenv("PGHOST", "from-environment")
    parameters = read("postgresql:///roster?user=ada")

    assert parameters == {
        "host": "from-service",
        "user": "ada",
        "dbname": "roster",
        "application_name": "s",
        "connect_timeout": "7",
    }


def test_protection_asked_for_in_the_environment_is_not_ignored(environment: pytest.MonkeyPatch) -> None:
    """The driver does not look at these variables."""
    environment.setenv("PGREQUIREAUTH", "scram-sha-256")
    with pytest.raises(ValueError, match="has the parameter require_auth, which can't be honoured"):
        read("postgresql://ada@db/roster")


def test_channel_binding_is_replaced_by_verification() -> None:
    """Without either, an attacker in the middle could read the connection that Neon's URL protects."""
    parameters = read(PROVIDERS["Neon"])
    (warning,) = conninfo.warnings(parameters)

    assert (parameters["sslmode"], parameters["sslrootcert"]) == ("verify-full", "system")
    assert "certificate and name are verified instead" in warning
    assert not [*conninfo.warnings(read("postgresql://h/d?channel_binding=prefer"))]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgres://ada:s3cret@db:5433/roster?sslmode=require", "postgresql://ada@db:5433/roster"),
        ("postgresql://ada:s3cret@a,b:6432/roster", "postgresql://ada@a,b:6432/roster"),
        ("postgresql://ada@[::1]:5432/roster?password=s3cret", "postgresql://ada@[::1]/roster"),
        ("postgresql://ada@/roster?host=/cloudsql/p:r:i", "postgresql://ada@/roster?host=/cloudsql/p:r:i"),
        ("host=db user=a@b password=s3cret", "postgresql://a%40b@db/"),
        ("postgresql://", "postgresql:///"),
    ],
)
def test_describes_a_database_without_its_password(url: str, place: str) -> None:
    """For the log and the doctor."""
    assert conninfo.describe(url, os.environ) == place


def test_hosts_as_sqlalchemy_writes_them_are_accepted() -> None:
    """Its URLs have one parameter for each host."""
    parameters = read("postgresql+asyncpg://ada@/roster?host=a:1&host=b:2")

    assert conninfo.addresses(parameters) == [("a", 1), ("b", 2)]
