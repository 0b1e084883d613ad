"""deploy/ passes linters, and matches the schemas of its formats."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.deployed import DEPLOY, DOCKERFILE, KUBERNETES, MANIFESTS, PODS

YAML_RULES = (
    "{extends: default, rules: {document-start: disable, line-length: {max: 120}, "
    "braces: {max-spaces-inside: 1}}}"
)
# The oldest of those that are still looked after.
KUBERNETES_VERSION = "1.33"
OPERATORS = {"ServiceMonitor"}  # of which Kubernetes itself has no schema


def lint(tool: str, *arguments: str | Path) -> str:
    """Return the findings of a tool of the virtual environment, "" if there are none."""
    command = [Path(sys.executable).with_name(tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def test_dockerfile_passes_hadolint() -> None:
    """With all rules, including those for shell commands."""
    assert lint("hadolint", DEPLOY / "Dockerfile") == ""


def test_hadolint_finds_errors(tmp_path: Path) -> None:
    """The check itself can fail."""
    broken = tmp_path / "Dockerfile"
    broken.write_text(re.sub(r"(FROM python):\S+", r"\1", DOCKERFILE))
    assert "DL3006" in lint("hadolint", broken)


def test_yaml_passes_yamllint() -> None:
    """Duplicate keys, ambiguous values, indentation."""
    assert lint("yamllint", "--strict", "--config-data", YAML_RULES, DEPLOY) == ""


def test_compose_file_matches_its_schema() -> None:
    """The schema of the Compose specification."""
    assert lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml") == ""


@pytest.fixture
def kubernetes() -> Any:
    """The schemas of Kubernetes; the import takes a second, in each process that collects the tests."""
    import kubernetes_validate  # type: ignore[import-untyped]

    return kubernetes_validate


@pytest.mark.parametrize("kind", sorted(MANIFESTS.keys() - OPERATORS))
def test_manifest_matches_the_schema_of_kubernetes(kubernetes: Any, kind: str) -> None:
    """Unknown fields are errors."""
    kubernetes.validate(MANIFESTS[kind], KUBERNETES_VERSION, strict=True)


def test_misspelt_field_does_not_match(kubernetes: Any) -> None:
    """The check itself can fail."""
    broken = MANIFESTS["PodDisruptionBudget"] | {"spec": {"maxUnavailible": 1}}
    with pytest.raises(kubernetes.ValidationError, match="maxUnavailible"):
        kubernetes.validate(broken, KUBERNETES_VERSION, strict=True)


def test_every_manifest_is_applied() -> None:
    """The kustomization lists every file of the folder."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert sorted(path.name for path in KUBERNETES.glob("*.yaml")) == sorted([*listed, "kustomization.yaml"])


def test_kustomize_builds_all_manifests() -> None:
    """In one namespace, with the image that is named once."""
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is missing, so nobody has tried the kustomization")
    made = subprocess.check_output([kubectl, "kustomize", KUBERNETES], text=True)
    found = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(made)}
    assert found.keys() == MANIFESTS.keys() | {"ConfigMap"}
    namespaces = {found[kind]["metadata"].get("namespace") for kind in found.keys() - {"Namespace"}}
    assert namespaces == {MANIFESTS["Namespace"]["metadata"]["name"]}
    images = [
        pod["spec"]["containers"][0]["image"] for pod in (found[kind]["spec"]["template"] for kind in PODS)
    ]
    assert images == ["registry.example.org/roster:0.1.0"] * 2
