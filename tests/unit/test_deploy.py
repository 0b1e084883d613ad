"""deploy/ agrees with the service: settings, ports, probes, times, sums.

No container is built or run: an engine is not needed.
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
from service.settings import Settings
from service.variables import PREFIX
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
    """Return the settings of a container; a secret has the URL of the database."""
    (folder / "url").write_text("postgresql://roster_service@database/roster")
    for name, value in [pair for environment in environments for pair in environment.items()]:
        monkeypatch.setenv(name, str(folder / "url") if name == "ROSTER_DATABASE_URL_FILE" else value)
    return Settings()


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def settings_in(text: str) -> set[str]:
    """Return the settings that a text names."""
    return set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", text))


def files() -> Iterator[Path]:
    return (path for path in DEPLOY.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", sorted(files()), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_file_names_existing_settings(path: Path) -> None:
    """Directly, or as a file with the value."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert settings_in(path.read_text()) <= known | {f"{name}_FILE" for name in known}


def test_server_accepts_settings_of_the_deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It listens on all addresses, because it has TLS and authenticates callers."""
    chosen = settings(monkeypatch, tmp_path, IMAGE_ENVIRONMENT, ENVIRONMENT)
    assert (chosen.insecure, chosen.listen) == (False, "0.0.0.0:50051")


def test_migration_accepts_settings_of_its_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Although it has no certificate."""
    [container] = PODS["Job"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert settings(monkeypatch, tmp_path, IMAGE_ENVIRONMENT, environment).database_url.startswith(
        "postgresql"
    )


def test_policy_is_valid() -> None:
    """Every role in it exists."""
    Policy.read((KUBERNETES / "policy.toml").read_bytes())


@pytest.mark.parametrize("probe", PROBES)
def test_probe_uses_the_health_port(probe: str) -> None:
    """It needs no TLS, and asks for a service that exists."""
    assert SERVER[probe]["grpc"]["port"] == port(ENVIRONMENT["ROSTER_HEALTH_LISTEN"])
    assert SERVER[probe]["grpc"].get("service", "") in {"", LIVENESS, *SERVICE_NAMES}


def test_liveness_does_not_depend_on_the_database() -> None:
    """Startup and liveness check the process, readiness the database."""
    asked = {probe: SERVER[probe]["grpc"].get("service", "") for probe in PROBES}
    assert asked == {"startupProbe": LIVENESS, "livenessProbe": LIVENESS, "readinessProbe": ""}


def test_ports_are_those_of_the_server() -> None:
    """In the pod, the image, the service, the network policy and the monitor."""
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


def test_selectors_match_servers_only() -> None:
    """In the deployment, the service and the budget; the network policy also matches migrations."""
    servers = MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"]
    assert servers == MANIFESTS["Service"]["spec"]["selector"]
    assert servers == MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert servers.items() <= PODS["Deployment"]["metadata"]["labels"].items()
    assert not servers.items() <= PODS["Job"]["metadata"]["labels"].items()
    policed = MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(policed <= pod["metadata"]["labels"].items() for pod in PODS.values())
    monitored = MANIFESTS["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
    assert monitored <= MANIFESTS["Service"]["metadata"]["labels"].items()


def test_alerts_use_the_name_of_the_service() -> None:
    """The operator makes it the job."""
    assert f'job="{MANIFESTS["Service"]["metadata"]["name"]}"' in (DEPLOY / "alerts.yaml").read_text()


def test_pod_has_time_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More than pause and grace; compose too."""
    chosen = settings(monkeypatch, tmp_path, ENVIRONMENT)
    allowed = PODS["Deployment"]["spec"]["terminationGracePeriodSeconds"]
    assert allowed >= chosen.grace + chosen.drain_pause + 5
    composed = COMPOSE["services"]["roster"]
    assert int(composed["stop_grace_period"].removesuffix("s")) > int(composed["environment"]["ROSTER_GRACE"])


def test_pod_has_time_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As long as it may wait for its database."""
    probe = SERVER["startupProbe"]
    wait = settings(monkeypatch, tmp_path, ENVIRONMENT).database_wait
    assert probe["periodSeconds"] * probe["failureThreshold"] > wait


def test_database_has_connections_for_all_pods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also during a rolling restart, which starts one more."""
    chosen = settings(monkeypatch, tmp_path, ENVIRONMENT)
    deployment = MANIFESTS["Deployment"]["spec"]
    pods = deployment["replicas"] + deployment["strategy"]["rollingUpdate"]["maxSurge"]
    pool = chosen.pool_size + chosen.max_overflow + chosen.bulk_connections
    assert pods * chosen.workers * pool <= CONNECTIONS


def test_sums_of_the_page_on_scaling_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the defaults, and with the deployment."""
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


def test_disruption_budget_keeps_servers() -> None:
    """Nodes are drained one pod at a time."""
    budget = MANIFESTS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert 0 < budget < MANIFESTS["Deployment"]["spec"]["replicas"]


def test_containers_are_not_root_and_read_only() -> None:
    """The user is a number, which Kubernetes can check, as in the image."""
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


def test_image_copies_existing_files() -> None:
    """Each path in the build context exists, and includes all copied files."""
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text()
    allowed = set(re.findall(r"^!(.*)$", ignore, re.MULTILINE))
    assert [path for path in allowed if not (CHECKOUT / path).exists()] == []
    copied = re.findall(r"^COPY (?!--)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert {path for path in copied if path != "."} <= allowed
    packed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert {Path(path).parts[0] for path in [*packed["packages"], *packed["force-include"]]} <= allowed


def test_lock_has_every_dependency() -> None:
    """The image installs only locked packages."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["tracing"]} - {"roster-client>=0.1"}
    pins = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)
    locked = dict(pins.findall((CHECKOUT / "deploy/requirements.lock").read_text()))
    assert {Requirement(line).name for line in needed} - locked.keys() == set()
    assert dict(pins.findall((CHECKOUT / "requirements.lock").read_text())).items() <= locked.items()


def test_both_stages_have_the_same_python() -> None:
    """The second stage runs the virtual environment of the first."""
    assert len(set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))) == 1


def test_compose_mounts_existing_paths() -> None:
    """Docker would create a folder at a missing path."""
    mounts = [mount.split(":")[0] for mount in COMPOSE["services"]["database"]["volumes"]]
    assert [path for path in mounts if path.startswith(".") and not (DEPLOY / path).is_file()] == []
