"""Dashboard, alerts and their page: every query uses only metrics that a real server reports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import promql_parser
import pytest
import yaml

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest, CreateUserRequest, GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.changes import Watch
from tests.support.errors import refusal
from tests.support.scrape import Scrape
from tests.support.server import FREE_PORT, serve

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs/operating.md").read_text()
BY_PROMETHEUS = {"job", "instance"}  # the labels that Prometheus adds
RULES = yaml.safe_load((CHECKOUT / "deploy/alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = [
    panel
    for panel in json.loads((CHECKOUT / "deploy/dashboard.json").read_text())["panels"]
    if panel["type"] != "row"
]
LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")

Samples = dict[str, set[frozenset[tuple[str, str]]]]


@pytest.fixture
async def samples(sqlite_url: str) -> Samples:
    """The names of the samples that a server reports after some calls, with the labels of each."""
    async with (
        serve(sqlite_url, metrics_listen=FREE_PORT) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        users = UserServiceStub(channel)
        await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org")))
        await refusal(users.GetUser(GetUserRequest(id=99)))
        rows = [User(email="alan@example.org")]
        messages = [BulkCreateUsersRequest(users=rows), BulkCreateUsersRequest(users=rows, offset=9)]
        async for _ in users.BulkCreateUsers(iter(messages)):
            pass
        await Watch(channel).read()
        scrape = await Scrape.of(server.metrics_address)
    samples: Samples = {"up": {frozenset()}}  # Prometheus itself adds "up"
    for name, labels in scrape.samples:
        samples.setdefault(name, set()).add(labels)
    return samples


def parsed(query: str) -> promql_parser.Expr:
    return promql_parser.parse(query.replace("$__rate_interval", "5m"))


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """Return the metrics that a query selects, each with its label matchers."""
    found: list[Any] = []

    def visit(expression: Any) -> bool:
        found.append(getattr(expression, "vector_selector", expression))
        return True

    promql_parser.walk(parsed(query), visit)
    return (each for each in found if isinstance(each, promql_parser.VectorSelector))


def labels_of(query: str) -> set[str]:
    """Return the labels by which a query groups."""
    found: set[str] = set()

    def visit(expression: Any) -> bool:
        if isinstance(expression, promql_parser.AggregateExpr) and expression.modifier:
            found.update(expression.modifier.labels)
        return True

    promql_parser.walk(parsed(query), visit)
    return found


def unknown(query: str, shown: str, samples: Samples) -> list[str]:
    """Return the names in a query, or in the text shown with it, that no server reports."""
    missing, known = [], set(BY_PROMETHEUS)
    for selector in selectors(query):
        series = samples.get(selector.name or "", set())
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
async def test_panel_uses_only_reported_metrics(panel: dict[str, Any], samples: Samples) -> None:
    """A scrape has its metrics, labels and legends."""
    assert panel["targets"]
    for target in panel["targets"]:
        assert unknown(target["expr"], target["legendFormat"], samples) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
async def test_alert_uses_only_reported_metrics(rule: dict[str, Any], samples: Samples) -> None:
    """Its summary uses only labels that have values."""
    assert unknown(rule["expr"], rule["annotations"]["summary"], samples) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    """Its annotation names a section of the page for operators."""
    assert f"\n### {rule['alert']}\n" in PAGE
    assert rule["annotations"]["runbook"] == f"docs/operating.md#{rule['alert'].lower()}"


async def test_the_page_lists_every_metric(samples: Samples) -> None:
    """Metrics of the service are compared by the names of their families."""
    listed = set(re.findall(r"^\| `((?:grpc|roster)_\w+)`", PAGE, re.MULTILINE))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in samples}
    assert listed == {name for name in families if name.startswith(("grpc_", "roster_"))}


@pytest.mark.parametrize(
    "query", ["no_such_total", "up{no_such_label='x'}", "sum by (no_such) (up)", "up{grpc_type='none'}"]
)
async def test_check_finds_unknown_metrics_and_labels(query: str, samples: Samples) -> None:
    """The check itself can fail."""
    assert unknown(query, "", samples) != []
