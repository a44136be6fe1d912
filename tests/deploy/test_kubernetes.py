"""deploy/kubernetes: every manifest fits Kubernetes' schemas, and what a pod may do is what `restricted` allows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from .conftest import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
CUSTOM = ("monitoring.coreos.com/v1",)
"""Kinds that an operator brings along: their schemas are not Kubernetes'."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the pod template of each workload."""
    return {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests if m["kind"] in WORKLOADS}


WORKLOADS = ("StatefulSet", "Deployment")
BASES = [*documents(KUBERNETES / "base/server/server.yaml"), *documents(KUBERNETES / "base/client/client.yaml")]


def rendered(overlay: str) -> list[dict[str, Any]]:
    """Returns an overlay as it would be applied."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, and nothing else here renders a kustomization")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(scope="module")
def example() -> list[dict[str, Any]]:
    """The example overlay, as it would be applied."""
    return rendered("example")


@pytest.fixture(scope="module")
def several() -> list[dict[str, Any]]:
    """The overlay of three daemons, as it would be applied."""
    return rendered("several")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_a_manifest_fits_the_schemas(path: Path) -> None:
    newest = kubernetes_validate.latest_version()
    checked = [
        kubernetes_validate.validate(document, newest, strict=True)
        for document in documents(path)
        if document["apiVersion"] not in CUSTOM
    ]
    assert checked or path.parent.parent.name == "components"


@pytest.mark.parametrize("path", sorted(KUBERNETES.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_a_kustomization_names_what_is_there(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    named = [*said.get("resources", ()), *said.get("components", ())]
    for generator in said.get("configMapGenerator", ()):
        named += [file.rpartition("=")[2] for file in generator.get("files", ())]
    named += [patch["path"] for patch in said.get("patches", ()) if "path" in patch]
    assert named and [each for each in named if not (path.parent / each).exists()] == []


@pytest.mark.parametrize("pod", pods(BASES).values(), ids=pods(BASES))
def test_a_pod_is_restricted(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch", "keys must stay their owner's alone"
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["containers"], *pod["initContainers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
    (main,) = pod["containers"]
    assert {"readinessProbe", "livenessProbe"} <= set(main)


def test_a_pod_mounts_only_volumes_that_it_has() -> None:
    for manifest in BASES:
        if manifest["kind"] in WORKLOADS:
            pod = manifest["spec"]["template"]["spec"]
            claims = [claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", [])]
            there = {volume["name"] for volume in pod["volumes"]} | set(claims)
            for container in [*pod["containers"], *pod["initContainers"]]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= there


def test_nobody_calls_a_client_and_a_server_calls_nobody() -> None:
    (client,) = documents(KUBERNETES / "base/client/network-policy.yaml")
    (server,) = documents(KUBERNETES / "base/server/network-policy.yaml")
    assert client["spec"]["ingress"] == [] and server["spec"]["egress"] == []
    for policy in (client, server):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    ports = {port["port"] for rule in client["spec"]["egress"] for port in rule["ports"]}
    assert ports == {7070, 7071, 53}


def test_the_example_fits_the_schemas(example: list[dict[str, Any]]) -> None:
    newest = kubernetes_validate.latest_version()
    for document in example:
        assert kubernetes_validate.validate(document, newest, strict=True)
        assert document["metadata"].get("namespace", "fedpeft") == "fedpeft"


def test_the_example_has_two_sites_with_nothing_in_common(example: list[dict[str, Any]]) -> None:
    sites = {m["metadata"]["name"]: m for m in example if m["kind"] == "Deployment"}
    assert sorted(sites) == ["fedpeft-client-site-a", "fedpeft-client-site-b"]
    owned = []
    for site in sites.values():
        volumes = {volume["name"]: volume for volume in site["spec"]["template"]["spec"]["volumes"]}
        state, data = (volumes[name]["persistentVolumeClaim"]["claimName"] for name in ("state", "data"))
        owned.append({state, data, volumes["token"]["secret"]["secretName"]})
        selected = site["spec"]["selector"]["matchLabels"].items()
        assert selected <= site["spec"]["template"]["metadata"]["labels"].items()
    assert not owned[0] & owned[1]
    selectors = [tuple(sorted(site["spec"]["selector"]["matchLabels"].items())) for site in sites.values()]
    assert len(set(selectors)) == 2


def test_the_example_s_services_and_policies_find_the_pods(example: list[dict[str, Any]]) -> None:
    labels = [m["spec"]["template"]["metadata"]["labels"].items() for m in example if m["kind"] in WORKLOADS]
    selectors = [m["spec"]["selector"] for m in example if m["kind"] == "Service"]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in example if m["kind"] == "NetworkPolicy"]
    assert len(selectors) == 4
    for selector in selectors:
        assert selector and sum(selector.items() <= pod for pod in labels) == 1


def test_three_daemons_fit_the_schemas_and_stay_restricted(several: list[dict[str, Any]]) -> None:
    newest = kubernetes_validate.latest_version()
    for document in several:
        assert kubernetes_validate.validate(document, newest, strict=True)
    (pod,) = pods(several).values()
    test_a_pod_is_restricted(pod)


def test_three_daemons_have_a_volume_each_and_database_bucket_and_authority_together(
    several: list[dict[str, Any]],
) -> None:
    kinds = {document["kind"]: document for document in several}
    daemons, budget = kinds["StatefulSet"]["spec"], kinds["PodDisruptionBudget"]["spec"]
    assert daemons["replicas"] == 3 and budget["maxUnavailable"] == 1
    labels = daemons["template"]["metadata"]["labels"].items()
    assert budget["selector"]["matchLabels"].items() <= labels
    assert [claim["metadata"]["name"] for claim in daemons["volumeClaimTemplates"]] == ["data"]
    pod = daemons["template"]["spec"]
    (server,), (certificates,) = pod["containers"], pod["initContainers"]
    assert server["envFrom"] == [{"secretRef": {"name": "fedpeft-server-storage"}}]
    assert {"name": "identity", "mountPath": "/identity", "readOnly": True} in certificates["volumeMounts"]
    assert "cp --no-clobber" in certificates["args"][0]
    ports = {port["port"] for rule in kinds["NetworkPolicy"]["spec"]["egress"] for port in rule["ports"]}
    assert ports == {53, 443, 5432}
