"""The files of deploy/, parsed."""

import re
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).parents[2]
DEPLOY = CHECKOUT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def manifests() -> dict[str, dict[str, Any]]:
    """Return all manifests by their kind."""
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    found = [yaml.safe_load((KUBERNETES / name).read_text()) for name in names]
    return {manifest["kind"]: manifest for manifest in found}


MANIFESTS = manifests()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PODS = {kind: MANIFESTS[kind]["spec"]["template"] for kind in ("Deployment", "Job")}
[SERVER] = PODS["Deployment"]["spec"]["containers"]
# The variables of the server's container, and those that the image brings.
ENVIRONMENT = {variable["name"]: variable["value"] for variable in SERVER["env"]}
IMAGE_ENVIRONMENT = dict(re.findall(r"(ROSTER_\w+)=(\S+)", DOCKERFILE))
