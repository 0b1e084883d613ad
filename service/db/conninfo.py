"""Connection strings of PostgreSQL, as libpq accepts them.

A connection string is a URL or a list of `keyword=value`. `read` returns its parameters under the names of
libpq, and raises ValueError for one that can't be honoured. Errors and warnings never contain values of the
user, the password or the host. The functions are given the environment, which only `service.settings` reads.
https://www.postgresql.org/docs/current/libpq-connect.html
"""

import re
import ssl
from collections.abc import Iterator, Mapping
from configparser import ConfigParser, Error as ConfigError
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import quote, unquote, urlencode

EXAMPLE = "postgresql://user:password@host:5432/name"
SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
# URLs of SQLAlchemy name a driver too, which makes no difference to the database.
SCHEMES = {
    "postgres",
    "postgresql",
    *(f"postgresql+{driver}" for driver in ("asyncpg", "psycopg", "psycopg2", "psycopg_async", "pg8000")),
}
# What follows the user and the password: hosts, name of the database, parameters.
PLACE = re.compile(r"(?P<hosts>[^/?]*)(?:/(?P<dbname>[^?]*))?(?:\?(?P<query>.*))?", re.DOTALL)
HOST = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*)(?::(?P<port>.*))?", re.DOTALL)
KEYWORD = re.compile(
    r"\s*(?P<name>[^=\s]+)\s*=\s*(?:'(?P<quoted>(?:[^'\\]|\\.)*)'|(?P<plain>(?:\\.|\S)*))", re.DOTALL
)
# An unknown parameter counts as a misspelt one if it is this similar; otherwise it may be part of a password.
SIMILARITY = 0.8
BAD_PERCENT = re.compile("%(?![0-9a-f]{2})|%00", re.IGNORECASE)
# A setting in `options`, as the command line of the server has them.
OPTION = re.compile(r"(?:-c\s*|--)(?P<name>[\w.-]+)=(?P<value>.*)", re.DOTALL)
NO_URL = f"is not a URL; write {EXAMPLE}, or sqlite:///file"
WHITE_SPACE = " \t\n\v\f\r"  # of C
MAX_PORT = 65535
DEFAULT_PORT = 5432

ENCODE = (
    "contains a character that has to be percent-encoded in the user or the password: write @ as %40, "
    "/ as %2F, : as %3A, ? as %3F, # as %23, % as %25 and a space as %20"
)

# The parameters that are honoured. asyncpg reads those for TLS from a URL.
TLS = frozenset(
    [
        "sslmode",
        "sslnegotiation",
        "sslcert",
        "sslkey",
        "sslpassword",
        "sslrootcert",
        "sslcrl",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
    ]
)
KEEPALIVES = frozenset(
    ["keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"]
)
CACHES = ("prepared_statement_cache_size", "statement_cache_size")
HONOURED = (
    TLS
    | KEEPALIVES
    | frozenset(
        [
            "host",
            "hostaddr",
            "port",
            "dbname",
            "user",
            "password",
            "passfile",
            "connect_timeout",
            "options",
            "application_name",
            "fallback_application_name",
            "target_session_attrs",
            "load_balance_hosts",
            "channel_binding",
            "krbsrvname",
            "gsslib",
            "service",
            "servicefile",
        ]
    )
    # Of other clients: Prisma's name of the search path, and the caches of SQLAlchemy and asyncpg.
    | frozenset(["schema", *CACHES])
)


@dataclass(frozen=True)
class Unsupported:
    """A parameter that can't be honoured: the values that mean nothing else, and a sentence about others."""

    harmless: frozenset[str]
    reason: str

    def __init__(self, harmless: str, reason: str) -> None:
        object.__setattr__(self, "harmless", frozenset(harmless.split()))
        object.__setattr__(self, "reason", reason)


# Other values than the harmless ones are refused: ignoring them would connect to another server, in another
# way, or with less protection than was asked for.
REFUSED = {
    "client_encoding": Unsupported("utf8 utf-8 unicode auto", "Roster uses UTF8; remove it"),
    "gssdelegation": Unsupported("0", "the driver delegates no Kerberos credentials; remove it"),
    "gssencmode": Unsupported("disable prefer", "the driver has no GSSAPI encryption; use sslmode"),
    "max_protocol_version": Unsupported("3.0 3.2 latest", "the driver uses protocol 3.0; remove it"),
    "min_protocol_version": Unsupported("3.0", "the driver uses protocol 3.0; remove it"),
    "oauth_client_id": Unsupported("", "the driver has no OAuth; use a password or a certificate"),
    "oauth_client_secret": Unsupported("", "the driver has no OAuth; use a password or a certificate"),
    "oauth_issuer": Unsupported("", "the driver has no OAuth; use a password or a certificate"),
    "oauth_scope": Unsupported("", "the driver has no OAuth; use a password or a certificate"),
    "replication": Unsupported("false off no 0", "Roster needs an ordinary connection; remove it"),
    "require_auth": Unsupported("", "the driver can't choose the authentication; restrict it in pg_hba.conf"),
    "requirepeer": Unsupported("", "the driver can't check the owner of a socket; remove it"),
    "scram_client_key": Unsupported("", "the driver has no SCRAM keys; use password"),
    "scram_server_key": Unsupported("", "the driver has no SCRAM keys; use password"),
    "sslaccept": Unsupported("accept_invalid_certs", "it is a parameter of Prisma; use sslmode=verify-full"),
    "sslcertmode": Unsupported(
        "allow", "the driver sends a certificate if the server asks for one; remove it"
    ),
    "sslcrldir": Unsupported("", "the driver reads one file; use sslcrl"),
}
# These are ignored, with a warning unless the value is harmless.
IGNORED = {
    "connection_limit": Unsupported(
        "", "ROSTER_POOL_SIZE and ROSTER_MAX_OVERFLOW set the number of connections"
    ),
    "pgbouncer": Unsupported(
        "false",
        "it is a parameter of Prisma; ROSTER_DATABASE_POOLER=transaction is for a pooler in that mode",
    ),
    "pool_max_conns": Unsupported(
        "", "ROSTER_POOL_SIZE and ROSTER_MAX_OVERFLOW set the number of connections"
    ),
    "pool_timeout": Unsupported("", "ROSTER_POOL_TIMEOUT sets how long a call waits for a connection"),
    "sslcompression": Unsupported("0", "TLS compression is obsolete"),
    "sslkeylogfile": Unsupported("", "the variable SSLKEYLOGFILE names that file"),
    "sslsni": Unsupported("1", "the driver always sends the name of the host"),
    "supa": Unsupported("", "it means nothing to PostgreSQL"),
    "uselibpqcompat": Unsupported("", "sslmode already means what it means to libpq"),
}
KNOWN = HONOURED | REFUSED.keys() | IGNORED.keys() | {"ssl", "requiressl"}

SWITCH = ("0", "1")
TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
VALUES = {
    "channel_binding": ("disable", "prefer", "require"),
    "gsslib": ("gssapi", "sspi"),
    "keepalives": SWITCH,
    "load_balance_hosts": ("disable", "random"),
    "ssl_max_protocol_version": TLS_VERSIONS,
    "ssl_min_protocol_version": TLS_VERSIONS,
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
}
NUMBERS = (KEEPALIVES - {"keepalives"}) | {
    "connect_timeout",
    *CACHES,
}
# Of the server settings, those that the startup message contains: poolers and proxies accept these.
AT_START = ("application_name", "options")
STRICT_MODES = ("require", "verify-ca", "verify-full")
SYSTEM = "system"  # as sslrootcert: the certificates that the system trusts

# Variables of libpq that asyncpg does not read, or only for some connections.
ENVIRONMENT = {
    "host": "PGHOST",
    "port": "PGPORT",
    "options": "PGOPTIONS",
    "application_name": "PGAPPNAME",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "channel_binding": "PGCHANNELBINDING",
    "gssencmode": "PGGSSENCMODE",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
    "servicefile": "PGSERVICEFILE",
    "service": "PGSERVICE",
    "sslcertmode": "PGSSLCERTMODE",
    "sslcrldir": "PGSSLCRLDIR",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}


def normalise(text: str) -> str:
    """Return a connection string as a URL with the driver asyncpg; raises ValueError for a wrong one."""
    match = SCHEME.fullmatch(text)
    if match and match["scheme"].lower() in SCHEMES:
        return f"postgresql+asyncpg://{match['rest']}"
    parameters = parse(text)
    user, password = (quote(parameters.pop(name, ""), safe="") for name in ("user", "password"))
    database = quote(parameters.pop("dbname", ""), safe="")
    credentials = f"{user}{password and ':'}{password}@" if user or password else ""
    return f"postgresql+asyncpg://{credentials}/{database}?{urlencode(parameters, quote_via=quote)}".rstrip(
        "?"
    )


def read(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a connection string, with those of its service and of the environment.

    Raises ValueError for a parameter that is unknown, or that can't be honoured.
    """
    parameters = _with_defaults(parse(text), environment)
    _translate_ssl(parameters)
    for name, value in parameters.items():
        _require_known(name, "remove it from the service")
        _check(name, value)
    addresses(parameters)
    _check_tls(parameters)
    server_settings(parameters)
    return parameters


def parse(text: str) -> dict[str, str]:
    """Return the parameters that a connection string contains; raises ValueError for a malformed one.

    As libpq does, an empty value counts as none, and the last one of a name counts.
    """
    text = text.strip()
    if re.match(r"jdbc:", text, re.IGNORECASE):
        raise ValueError(
            f"is a URL of JDBC; leave out jdbc:, and write the user and the password as in {EXAMPLE}"
        )
    if re.match(r"psql\s", text):
        raise ValueError(f"is a command; leave out psql and the quotes, as in {EXAMPLE}")
    match = SCHEME.fullmatch(text)
    if match is None:
        parameters = _parse_keywords(text)
        for name in parameters:
            _require_known(name, "remove it, or put a value that contains spaces in single quotes")
    elif match["scheme"].lower() in SCHEMES:
        parameters = _parse_url(match["rest"])
    else:
        raise ValueError(
            f"has the scheme {match['scheme']}; postgresql and sqlite are supported, as in {EXAMPLE}"
        )
    return {name: value for name, value in parameters.items() if value}


def addresses(parameters: Mapping[str, str]) -> list[tuple[str | None, int | None]]:
    """Return the hosts and their ports; None leaves the choice to asyncpg.

    Raises ValueError for wrong ones.
    """
    if "hostaddr" in parameters and "host" in parameters and parameters.get("sslmode") == "verify-full":
        raise ValueError("has host and hostaddr; the driver can't verify the one and connect to the other")
    hosts = parameters.get("hostaddr", parameters.get("host", "")).split(",")
    ports = parameters.get("port", "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ValueError(f"has {len(ports)} ports for {len(hosts)} hosts; give one for each, or one for all")
    for host in hosts:
        _check_host(host)
    if hosts == [""]:
        return [(None, _port(ports[0]) if ports[0] else None)]
    return [(host or "localhost", _port(port)) for host, port in zip(hosts, ports, strict=True)]


def each_host(parameters: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each host, as an error shows it, and the parameters for this host alone."""
    others = {name: value for name, value in parameters.items() if name not in ("host", "hostaddr", "port")}
    for host, port in addresses(parameters):
        place = {"host": host or "", "port": str(port or "")}
        yield host_name(host, port), {**others, **{name: value for name, value in place.items() if value}}


def host_name(host: str | None, port: int | None) -> str:
    """Return a host as an error names it, with its port or socket."""
    port = port or DEFAULT_PORT
    if host is None:
        return f"this machine, port {port}"
    if host.startswith("/"):
        return f"{host}/.s.PGSQL.{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_settings(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of the session, of `options`, `schema` and the application name.

    `options` that are no settings stay as they are, for a proxy such as Neon's. Raises ValueError for
    malformed ones.
    """
    settings: dict[str, str] = {}
    if schema := parameters.get("schema"):
        escaped = schema.replace('"', '""')
        settings["search_path"] = f'"{escaped}"'
    others = []
    words = _words(parameters.get("options", ""))
    for word in words:
        argument = word
        if word == "-c":
            argument = f"-c{next(words, '')}"
        setting = OPTION.fullmatch(argument)
        if setting:
            settings[setting["name"].replace("-", "_").lower()] = setting["value"]
        elif argument.startswith("-c"):
            raise ValueError("has -c without name=value in options; write options=-c%20name=value")
        else:
            others.append(re.sub(r"([\\\s])", r"\\\1", argument))
    if others:
        settings["options"] = " ".join(others)
    for name in ("fallback_application_name", "application_name"):
        if name in parameters:
            settings["application_name"] = parameters[name]
    return settings


def startup_settings(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the startup message can contain, also through a pooler."""
    found = server_settings(parameters)
    return {name: found[name] for name in AT_START if name in found}


def session_settings(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that need a session: those of `options` and `schema`."""
    found = server_settings(parameters)
    return {name: value for name, value in found.items() if name not in AT_START}


def warnings(parameters: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each parameter that is ignored, or honoured in another way."""
    for name, value in parameters.items():
        unsupported = IGNORED.get(name)
        if unsupported and value.lower() not in unsupported.harmless:
            yield f"the parameter {name} of the database URL is ignored: {unsupported.reason}"
    if parameters.get("channel_binding") == "require":
        yield (
            "the driver has no channel binding, which the database URL requires; the server's certificate "
            "and name are verified instead"
        )


def describe(text: str, environment: Mapping[str, str]) -> str:
    """Return the user, hosts and database of a connection string, without the password."""
    parameters = read(text, environment)
    user = quote(parameters.get("user", environment.get("PGUSER", "")), safe="")
    database = quote(parameters.get("dbname", environment.get("PGDATABASE", "")), safe="")
    places = addresses(parameters)
    sockets = [host for host, _ in places if host and host.startswith("/")]
    hosts = ",".join(_bracketed(host, port) for host, port in places if host and host not in sockets)
    query = f"?host={','.join(sockets)}" if sockets else ""
    return f"postgresql://{user}{user and '@'}{hosts}/{database}{query}"


def _bracketed(host: str, port: int | None) -> str:
    bracketed = f"[{host}]" if ":" in host else host
    return bracketed if port in (None, DEFAULT_PORT) else f"{bracketed}:{port}"


def _parse_url(rest: str) -> dict[str, str]:
    credentials = re.match(r"[^@/]*@", rest)
    parameters = {}
    if credentials:
        user, _, password = credentials[0][:-1].partition(":")
        parameters = {"user": _decode(user), "password": _decode(password)}
        rest = rest[credentials.end() :]
    place = PLACE.fullmatch(rest)
    if place is None or "@" in f"{place['hosts']}{place['dbname'] or ''}":
        raise ValueError(ENCODE)
    hosts, ports = [], []
    for each in place["hosts"].split(","):
        match = HOST.fullmatch(each)
        if match is None or (match["port"] and not match["port"].isdigit()):
            raise ValueError(f"has a host that is not host, host:port or [address]:port; write {EXAMPLE}")
        hosts.append(_decode(match["host"].strip("[]")))
        ports.append(match["port"] or "")
    parameters |= {"host": ",".join(hosts), "dbname": _decode(place["dbname"] or "")}
    if any(ports):
        parameters["port"] = ",".join(ports)
    return parameters | _parse_query(place["query"] or "")


def _parse_query(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, separator, value = pair.partition("=")
        if "@" in query and not (separator and name in KNOWN):
            raise ValueError(ENCODE)  # the user or the password contains the question mark
        if not separator:
            raise ValueError("has a parameter without a value; write ?name=value&name=value")
        name, value = _decode(name), _decode(value)
        _require_known(name, "remove it, or write & in a value as %26")
        if name == "host" and ":" in value and not value.startswith(("/", "[")) and value.count(":") == 1:
            # As SQLAlchemy writes several hosts: ?host=a:1&host=b:2.
            value, _, port = value.partition(":")
            parameters["port"] = _append(parameters, "port", port)
            value = _append(parameters, "host", value)
        parameters[name] = value
    return parameters


def _append(parameters: Mapping[str, str], name: str, value: str) -> str:
    return f"{parameters[name]},{value}" if parameters.get(name) else value


def _parse_keywords(text: str) -> dict[str, str]:
    parameters, position = {}, 0
    text = text.rstrip()
    while position < len(text):
        match = KEYWORD.match(text, position)
        if match is None:
            raise ValueError(NO_URL)
        if (match["plain"] or "").startswith("'"):
            raise ValueError("has a quote that is not closed; write a quote in a value as \\'")
        value = match["plain"] if match["quoted"] is None else match["quoted"]
        parameters[match["name"]] = re.sub(r"\\(.)|\\$", r"\1", value, flags=re.DOTALL)
        position = match.end()
    if not parameters:
        raise ValueError(NO_URL)
    return parameters


def _decode(text: str) -> str:
    if BAD_PERCENT.search(text):
        raise ValueError("contains a % that begins no percent-encoded character; write % as %25")
    return unquote(text.strip(WHITE_SPACE))


def _check_host(host: str) -> None:
    if host.startswith("@"):
        raise ValueError("names an abstract socket, which the driver can't use; use one in a directory")
    if "@" in host and not host.startswith("/"):
        raise ValueError(ENCODE)
    try:
        host.encode() if host.startswith("/") else host.encode("idna")
    except UnicodeError:
        raise ValueError("names a host that can't exist; its parts have 1 to 63 characters") from None


def _port(text: str) -> int:
    if not text:
        return DEFAULT_PORT
    # int() accepts more than digits.
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) <= MAX_PORT:
        raise ValueError(f"has a port that is not a number from 1 to {MAX_PORT}")
    return int(text)


def _words(options: str) -> Iterator[str]:
    """Yield the words of `options` as the server splits them: at white space that no backslash escapes."""
    for word in re.findall(r"(?:\\.|[^\\\s])+", options, re.DOTALL):
        yield re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL)


def _with_defaults(given: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Add the parameters of the service, and then those of the environment."""
    defaults = {
        name: environment[variable] for name, variable in ENVIRONMENT.items() if environment.get(variable)
    }
    if "host" in given or "hostaddr" in given:
        defaults.pop("host", None)
    parameters = {**defaults, **given}
    service = parameters.pop("service", None)
    file = parameters.pop("servicefile", None)
    if service:
        folder = environment.get("PGSYSCONFDIR", "/etc/postgresql-common")
        parameters = {**defaults, **_read_service(service, file, folder), **given}
        parameters.pop("service", None)
    return {name: value for name, value in parameters.items() if value and name != "servicefile"}


def _read_service(service: str, file: str | None, folder: str) -> dict[str, str]:
    """Return the parameters of a service, as libpq finds them; raises ValueError if there is none."""
    own = Path(file or Path("~/.pg_service.conf").expanduser())
    common = Path(folder, "pg_service.conf")
    for path in (own, common):
        services = ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#", strict=False)
        services.optionxform = str  # type: ignore[assignment, method-assign]
        with suppress(OSError, UnicodeDecodeError, ConfigError):
            services.read_string(path.read_text())
        if services.has_section(service):
            return dict(services[service])
    raise ValueError(f"names a service that neither {own} nor {common} defines")


def _translate_ssl(parameters: dict[str, str]) -> None:
    """Replace `ssl`, as asyncpg and JDBC spell `sslmode`, and what older clients call `requiressl`."""
    ssl_mode = parameters.pop("ssl", None)
    if ssl_mode is not None:
        meant = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
        parameters.setdefault("sslmode", meant.get(ssl_mode.lower(), ssl_mode))
    if parameters.pop("requiressl", "0") == "1":
        parameters.setdefault("sslmode", "require")
    uses_system = parameters.get("sslrootcert") == SYSTEM
    binds_channel = parameters.get("channel_binding") == "require"
    if binds_channel and "sslrootcert" not in parameters:
        # The driver has no channel binding. Both prevent an attack from the middle.
        parameters |= {"sslmode": "verify-full", "sslrootcert": SYSTEM}
    elif binds_channel or (uses_system and "sslmode" not in parameters):
        parameters["sslmode"] = "verify-full"


def _require_known(name: str, advice: str) -> None:
    """Raise ValueError for a parameter that is unknown; the error repeats only a misspelt name.

    Anything else may be part of a password that contains the separator of parameters.
    """
    if name in KNOWN:
        return
    close = get_close_matches(name.lower(), sorted(KNOWN), 1, SIMILARITY)
    if not close:
        raise ValueError(f"has an unknown parameter; {advice}")
    raise ValueError(f"has the unknown parameter {name}; did you mean {close[0]}?")


def _check(name: str, value: str) -> None:
    """Raise ValueError for a parameter that can't be honoured."""
    if name in REFUSED and value.lower() not in REFUSED[name].harmless:
        raise ValueError(f"has the parameter {name}, which can't be honoured: {REFUSED[name].reason}")
    if name in VALUES and value not in VALUES[name]:
        raise ValueError(f"has a wrong value of {name}; it is one of {', '.join(VALUES[name])}")
    if name in NUMBERS and not re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value):
        raise ValueError(f"has a wrong value of {name}; it is a whole number")


def _check_tls(parameters: Mapping[str, str]) -> None:
    """Raise ValueError for parameters of TLS that contradict each other, or name files that can't be used."""
    mode = parameters.get("sslmode", "prefer")
    if parameters.get("sslrootcert") == SYSTEM and mode != "verify-full":
        raise ValueError("has sslrootcert=system, which needs sslmode=verify-full")
    if parameters.get("sslrootcert") == SYSTEM and "sslcrl" in parameters:
        raise ValueError("has sslrootcert=system and sslcrl, which don't work together; name a file")
    if parameters.get("sslnegotiation") == "direct" and mode not in STRICT_MODES:
        raise ValueError("has sslnegotiation=direct, which needs sslmode=require, verify-ca or verify-full")
    if mode == "disable":
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in ("sslrootcert", "sslcrl"):
        if mode in STRICT_MODES and parameters.get(name, SYSTEM) != SYSTEM:
            try:
                context.load_verify_locations(parameters[name])
            except OSError as error:
                raise ValueError(
                    f"names the {name} {parameters[name]}, which can't be used: {_why(error)}"
                ) from None
    load_client_certificate(context, parameters)


def load_client_certificate(context: ssl.SSLContext, parameters: Mapping[str, str]) -> None:
    """Load `sslcert` and `sslkey`; raises ValueError if they can't be used."""
    if cert := parameters.get("sslcert"):
        try:
            password = parameters.get("sslpassword", "")
            context.load_cert_chain(cert, parameters.get("sslkey"), password=lambda: password)
        except OSError as error:
            raise ValueError(f"names an sslcert or sslkey that can't be used: {_why(error)}") from None


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return "it is not PEM" if "PEM" in str(reason) or "NO_CERTIFICATE" in str(reason) else str(reason)
