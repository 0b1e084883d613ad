"""The policy: every RPC has its role, and unclear files are refused."""

from importlib import import_module
from pathlib import Path

import pytest

from service.auth.caller import Caller
from service.auth.policy import HEALTH, REFLECTION, ROLES, RPCS, Policy

CONTRACT = Path(__file__).parents[2] / "protos/roster/v1"


def methods() -> set[str]:
    """Return every RPC of the contract by its path."""
    files = [import_module(f"roster.v1.{path.stem}_pb2").DESCRIPTOR for path in CONTRACT.glob("*.proto")]
    services = [service for file in files for service in file.services_by_name.values()]
    return {
        f"/{method.containing_service.full_name}/{method.name}"
        for each in services
        for method in each.methods
    }


def caller(policy: str, identity: str) -> Caller:
    return Policy.read(policy.encode()).caller(identity)


def test_every_rpc_has_a_role() -> None:
    """Otherwise nobody could call it, not even an admin; no role lists a removed RPC."""
    assert methods() == RPCS


def test_admin_may_do_everything() -> None:
    """Including what needs a role besides the RPC."""
    admin = caller('[identities]\n"jwt:root" = ["admin"]', "jwt:root")

    assert admin.rpcs == RPCS | REFLECTION
    assert all(map(admin.has, ROLES))


def test_roles_overlap_in_named_loads_only() -> None:
    """So each role says by itself what it allows; `admin` excepted. Loads are those of both bulk roles."""
    others = [rpc for name, rpcs in ROLES.items() if name != "admin" for rpc in rpcs]
    loads = [rpc for rpc in RPCS if rpc.startswith("/roster.v1.BulkService/")]

    assert sorted(others) == sorted([*RPCS, *loads])


def test_unknown_identity_may_do_nothing() -> None:
    """Nor may an identity without a role."""
    policy = '[identities]\n"jwt:ada" = []'

    assert [caller(policy, identity).rpcs for identity in ("jwt:ada", "jwt:bob", "ada")] == [frozenset()] * 3
    assert not (RPCS | REFLECTION) & HEALTH


@pytest.mark.parametrize(
    ("identity", "role"),
    [
        ("spiffe://example.org/prod/billing", "reader"),
        ("spiffe://example.org/prod/eu/billing", "writer"),
        ("spiffe://example.org/prod/eu/loads", "loader"),
        ("spiffe://example.org/prod/eu", "reader"),
        ("spiffe://example.org/prod/", "reader"),
        ("spiffe://example.org/prod", None),
        ("spiffe://example.org/production/billing", None),
        ("spiffe://example.org.evil/prod/billing", None),
        ("jwt:spiffe://example.org/prod/billing", None),
        ("dns:spiffe://example.org/prod/billing", None),
        ("spiffe://example.org/prod/*", "reader"),
    ],
)
def test_most_specific_name_counts(identity: str, role: str | None) -> None:
    """A name that ends in `/*` matches all names below it, of one kind of identity."""
    policy = """
        [identities]
        "spiffe://example.org/prod/*" = ["reader"]
        "spiffe://example.org/prod/eu/*" = ["writer"]
        "spiffe://example.org/prod/eu/loads" = ["loader"]
    """

    assert list(caller(policy, identity).roles) == ([role] if role else [])


def test_rights_of_several_roles_add_up() -> None:
    """The file can define roles as lists of RPCs."""
    policy = """
        [identities]
        "jwt:ada" = ["verifier", "support"]
        [roles]
        support = ["roster.v1.UserService/GetUser"]
    """
    ada = caller(policy, "jwt:ada")

    assert ada.rpcs - REFLECTION == {
        "/roster.v1.UserService/GetUser",
        "/roster.v1.UserService/VerifyPassword",
    }


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ('[identities]\n"ada" = ["reader"]', "ada is not an identity"),
        ('[identities]\n"jwt:" = ["reader"]', "jwt: is not an identity"),
        ('[identities]\n"dns:Loads.example.org" = ["reader"]', "is not an identity"),
        ('[identities]\n"spiffe://*" = ["reader"]', "is not an identity"),
        ('[identities]\n"spiffe://example.org/a*" = ["reader"]', "is not an identity"),
        ('[identities]\n"spiffe://example.org/*/a" = ["reader"]', "is not an identity"),
        ('[identities]\n"jwt:ada" = ["raeder"]', "jwt:ada has unknown roles: raeder"),
        ('[identities]\n"jwt:ada" = "reader"', "valid list"),
        ('[identity]\n"jwt:ada" = ["reader"]', "identity"),
        ('[identities]\n[roles]\nreader = ["roster.v1.UserService/DeleteUser"]', "reader is built in"),
        ('[identities]\n[roles]\nmine = ["roster.v1.UserService/*"]', "mine names unknown RPCs"),
        ('[identities]\n[roles]\nmine = ["/roster.v1.UserService/GetUser"]', "mine names unknown RPCs"),
        ("identities", "Expected"),
    ],
)
def test_ambiguous_policy_is_refused(policy: str, sentence: str) -> None:
    """It could mean less, or more, than its author thinks."""
    with pytest.raises(ValueError, match=sentence):
        Policy.read(policy.encode())
