"""Dashboard, alerts and their page: every query asks for what a real server tells."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import promql_parser
import pytest
import yaml

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from service.settings import Settings
from tests.support.errors import refusal
from tests.support.scrape import Scrape

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs/operating.md").read_text()
BY_PROMETHEUS = {"job", "instance"}  # the labels that it adds itself
RULES = yaml.safe_load((CHECKOUT / "deploy/alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = [
    panel
    for panel in json.loads((CHECKOUT / "deploy/dashboard.json").read_text())["panels"]
    if panel["type"] != "row"
]
LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")

Told = dict[str, set[frozenset[tuple[str, str]]]]


@pytest.fixture
async def told(sqlite_url: str) -> AsyncIterator[Told]:
    """What a server tells after some calls: the names of its samples, with the labels of each."""
    server = Server(Settings(database_url=sqlite_url, listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        users = UserServiceStub(channel)
        await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
        await refusal(users.GetUser(GetUserRequest(id=99)))
        rows = [User(email="alan@example.org")]
        messages = [BulkCreateUsersRequest(users=rows), BulkCreateUsersRequest(users=rows, offset=9)]
        async for _ in users.BulkCreateUsers(iter(messages)):
            pass
    told: Told = {"up": {frozenset()}}  # which Prometheus adds
    for name, labels in (await Scrape.of(server.metrics_address)).samples:
        told.setdefault(name, set()).add(labels)
    yield told
    await server.stop(grace=0)


def parsed(query: str) -> promql_parser.Expr:
    return promql_parser.parse(query.replace("$__rate_interval", "5m"))


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """The metrics that a query asks for, each with the labels that it wants."""
    found: list[Any] = []

    def visit(expression: Any) -> bool:
        found.append(getattr(expression, "vector_selector", expression))
        return True

    promql_parser.walk(parsed(query), visit)
    return (each for each in found if isinstance(each, promql_parser.VectorSelector))


def labels_of(query: str) -> set[str]:
    """The labels by which a query groups."""
    found: set[str] = set()

    def visit(expression: Any) -> bool:
        if isinstance(expression, promql_parser.AggregateExpr) and expression.modifier:
            found.update(expression.modifier.labels)
        return True

    promql_parser.walk(parsed(query), visit)
    return found


def unknown(query: str, shown: str, told: Told) -> list[str]:
    """What a query, or the text that is shown with it, names and no server tells."""
    missing, known = [], set(BY_PROMETHEUS)
    for selector in selectors(query):
        series = told.get(selector.name or "", set())
        names = {name for labels in series for name, _ in labels} | BY_PROMETHEUS
        known |= names
        missing += [str(selector.name)] * (not series)
        missing += [matcher.name for matcher in selector.matchers.matchers if matcher.name not in names]
        exact = {
            (matcher.name, matcher.value)
            for matcher in selector.matchers.matchers
            if matcher.op == promql_parser.MatchOp.Equal and matcher.name not in BY_PROMETHEUS
        }
        missing += [f"{selector.name}{exact}"] * (not any(exact <= labels for labels in series))
    return missing + sorted((labels_of(query) | set(LEGEND.findall(shown))) - known)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
async def test_a_panel_shows_what_a_server_tells(panel: dict[str, Any], told: Told) -> None:
    """Metrics, labels and legends are there in a scrape."""
    assert panel["targets"]
    for target in panel["targets"]:
        assert unknown(target["expr"], target["legendFormat"], told) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
async def test_an_alert_asks_for_what_a_server_tells(rule: dict[str, Any], told: Told) -> None:
    """And says so in words that have values."""
    assert unknown(rule["expr"], rule["annotations"]["summary"], told) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    """A section of the page for operators, which its annotation names."""
    assert f"\n### {rule['alert']}\n" in PAGE
    assert rule["annotations"]["runbook"] == f"docs/operating.md#{rule['alert'].lower()}"


async def test_the_page_lists_every_metric(told: Told) -> None:
    """Those of the service, by the names of their families."""
    listed = set(re.findall(r"^\| `((?:grpc|roster)_\w+)`", PAGE, re.MULTILINE))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in told}
    assert listed == {name for name in families if name.startswith(("grpc_", "roster_"))}


@pytest.mark.parametrize(
    "query", ["no_such_total", "up{no_such_label='x'}", "sum by (no_such) (up)", "up{grpc_type='none'}"]
)
async def test_a_query_for_what_is_not_there_is_found(query: str, told: Told) -> None:
    """The check itself can fail."""
    assert unknown(query, "", told) != []
