"""What deploy/ says is true of the service: settings, ports, probes, times, sums.

No container is built or run: the machine need not have an engine.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from service.auth.policy import Policy
from service.health import LIVENESS
from service.services import SERVICE_NAMES
from service.settings import PREFIX, Settings
from tests.support.deployed import (
    CHECKOUT,
    COMPOSE,
    DEPLOY,
    DOCKERFILE,
    ENVIRONMENT,
    IMAGE_ENVIRONMENT,
    KUBERNETES,
    MANIFESTS,
    PODS,
    SERVER,
)

# What PostgreSQL takes by default, less those that it keeps for superusers.
CONNECTIONS = 100 - 3
PROBES = [name for name in SERVER if name.endswith("Probe")]


def settings(monkeypatch: pytest.MonkeyPatch, folder: Path, *environments: Mapping[str, str]) -> Settings:
    """The settings of a container; a secret that has the database's URL is there."""
    (folder / "url").write_text("postgresql://roster_service@database/roster")
    for name, value in [pair for environment in environments for pair in environment.items()]:
        monkeypatch.setenv(name, str(folder / "url") if name == "ROSTER_DATABASE_URL_FILE" else value)
    return Settings()


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def named(text: str) -> set[str]:
    """The settings that a text names."""
    return set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", text))


def files() -> Iterator[Path]:
    return (path for path in DEPLOY.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", sorted(files()), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_a_file_names_settings_that_there_are(path: Path) -> None:
    """Each as it is, or as the file that has its value."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert named(path.read_text()) <= known | {f"{name}_FILE" for name in known}


def test_the_server_takes_the_settings_of_the_deployment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of them together: it listens for everybody since it has TLS and knows its callers."""
    chosen = settings(monkeypatch, tmp_path, IMAGE_ENVIRONMENT, ENVIRONMENT)
    assert (chosen.insecure, chosen.listen) == (False, "0.0.0.0:50051")


def test_the_migration_takes_the_settings_of_its_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though it has no certificate."""
    [container] = PODS["Job"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert settings(monkeypatch, tmp_path, IMAGE_ENVIRONMENT, environment).database_url.startswith(
        "postgresql"
    )


def test_the_policy_can_be_read() -> None:
    """Every role in it is one."""
    Policy.read((KUBERNETES / "policy.toml").read_bytes())


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_asks_where_health_answers(probe: str) -> None:
    """On the port without TLS, for a name that is known there."""
    assert SERVER[probe]["grpc"]["port"] == port(ENVIRONMENT["ROSTER_HEALTH_LISTEN"])
    assert SERVER[probe]["grpc"].get("service", "") in {"", LIVENESS, *SERVICE_NAMES}


def test_a_probe_restarts_none_whose_database_is_away() -> None:
    """Startup and liveness ask whether the process lives, readiness whether the database answers."""
    asked = {probe: SERVER[probe]["grpc"].get("service", "") for probe in PROBES}
    assert asked == {"startupProbe": LIVENESS, "livenessProbe": LIVENESS, "readinessProbe": ""}


def test_ports_are_those_where_the_server_listens() -> None:
    """In the pod, the image, the service, the network's policy and the monitor."""
    listens = {
        "grpc": port(ENVIRONMENT["ROSTER_LISTEN"]),
        "health": port(ENVIRONMENT["ROSTER_HEALTH_LISTEN"]),
        "metrics": port(ENVIRONMENT["ROSTER_METRICS_LISTEN"]),
    }
    assert {each["name"]: each["containerPort"] for each in SERVER["ports"]} == listens
    assert re.findall(r"^EXPOSE (.*)", DOCKERFILE, re.MULTILINE) == [" ".join(map(str, listens.values()))]
    offered = {each["targetPort"]: each["port"] for each in MANIFESTS["Service"]["spec"]["ports"]}
    assert offered == {name: listens[name] for name in ("grpc", "metrics")}
    ingress = MANIFESTS["NetworkPolicy"]["spec"]["ingress"]
    assert [each["port"] for rule in ingress for each in rule["ports"]] == list(offered.values())
    assert [each["port"] for each in MANIFESTS["ServiceMonitor"]["spec"]["endpoints"]] == ["metrics"]


def test_selectors_find_the_servers_and_no_migration() -> None:
    """Those of the deployment, the service and the budget; the network's policy is for both."""
    servers = MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"]
    assert servers == MANIFESTS["Service"]["spec"]["selector"]
    assert servers == MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert servers.items() <= PODS["Deployment"]["metadata"]["labels"].items()
    assert not servers.items() <= PODS["Job"]["metadata"]["labels"].items()
    policed = MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(policed <= pod["metadata"]["labels"].items() for pod in PODS.values())
    monitored = MANIFESTS["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert monitored <= MANIFESTS["Service"]["metadata"]["labels"].items()


def test_alerts_know_the_servers_by_the_name_of_their_service() -> None:
    """Which is what the operator makes the job."""
    assert f'job="{MANIFESTS["Service"]["metadata"]["name"]}"' in (DEPLOY / "alerts.yaml").read_text()


def test_a_pod_has_time_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More than the pause and the grace together; compose the same."""
    chosen = settings(monkeypatch, tmp_path, ENVIRONMENT)
    allowed = PODS["Deployment"]["spec"]["terminationGracePeriodSeconds"]
    assert allowed >= chosen.grace + chosen.drain_pause + 5
    composed = COMPOSE["services"]["roster"]
    assert int(composed["stop_grace_period"].removesuffix("s")) > int(composed["environment"]["ROSTER_GRACE"])


def test_a_pod_has_time_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As long as it may wait for its database."""
    probe = SERVER["startupProbe"]
    wait = settings(monkeypatch, tmp_path, ENVIRONMENT).database_wait
    assert probe["periodSeconds"] * probe["failureThreshold"] > wait


def test_the_database_has_connections_for_all_pods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also while one more is started by a rolling restart."""
    chosen = settings(monkeypatch, tmp_path, ENVIRONMENT)
    deployment = MANIFESTS["Deployment"]["spec"]
    pods = deployment["replicas"] + deployment["strategy"]["rollingUpdate"]["maxSurge"]
    pool = chosen.pool_size + chosen.max_overflow + chosen.bulk_connections
    assert pods * chosen.workers * pool <= CONNECTIONS


def test_the_page_on_scaling_adds_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its sums are those of the defaults, and of the deployment."""
    page = (CHECKOUT / "docs/scaling.md").read_text()
    names = ("pool_size", "max_overflow", "bulk_connections")
    defaults = [Settings.model_fields[name].default for name in names]
    terms = [f"{PREFIX}{name.upper()} ({value})" for name, value in zip(names, defaults, strict=True)]
    assert f"{' + '.join(terms)} = {sum(defaults)}\n" in page
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert [int(most) for *_, most in rows] == [
        (int(replicas) + 1) * int(workers) * sum(defaults) for replicas, workers, _ in rows
    ]
    chosen = settings(monkeypatch, tmp_path, ENVIRONMENT)
    terms = [str(getattr(chosen, name)) for name in names]
    assert (
        f"set {' + '.join(terms)} for each of three pods, so at most {4 * sum(map(int, terms))}"
        in " ".join(page.split())
    )


def test_a_disruption_leaves_servers() -> None:
    """Nodes are emptied one pod at a time."""
    budget = MANIFESTS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert 0 < budget < MANIFESTS["Deployment"]["spec"]["replicas"]


def test_nothing_runs_as_root_or_writes_to_its_root() -> None:
    """By a number, which Kubernetes can look at, and the same in the image."""
    *_, (user, group) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    for pod in PODS.values():
        context = pod["spec"]["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (
            True,
            int(user),
            int(group),
        )
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    assert [COMPOSE["services"][name]["read_only"] for name in ("migrate", "roster")] == [True, True]


def test_the_image_is_made_of_what_there_is() -> None:
    """Each path that is let into the context exists, and what is copied is among them."""
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text()
    allowed = set(re.findall(r"^!(.*)$", ignore, re.MULTILINE))
    assert [path for path in allowed if not (CHECKOUT / path).exists()] == []
    copied = re.findall(r"^COPY (?!--)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert {path for path in copied if path != "."} <= allowed
    packed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert {Path(path).parts[0] for path in [*packed["packages"], *packed["force-include"]]} <= allowed


def test_the_lock_has_every_dependency() -> None:
    """The image installs what is locked and looks for nothing more."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["tracing"]]
    pins = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)
    locked = dict(pins.findall((CHECKOUT / "deploy/requirements.lock").read_text()))
    assert {Requirement(line).name for line in needed} - locked.keys() == set()
    assert dict(pins.findall((CHECKOUT / "requirements.lock").read_text())).items() <= locked.items()


def test_both_stages_have_the_same_python() -> None:
    """The virtual environment of the one runs in the other."""
    assert len(set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))) == 1


def test_compose_mounts_what_there_is() -> None:
    """Docker would make a folder of a path that is missing."""
    mounts = [mount.split(":")[0] for mount in COMPOSE["services"]["database"]["volumes"]]
    assert [path for path in mounts if path.startswith(".") and not (DEPLOY / path).is_file()] == []
