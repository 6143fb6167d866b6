"""The Kubernetes resources, as they stand in their files, and what checks them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check import (
    KUBERNETES,
    OVERLAYS,
    check_files,
    check_rendered,
    check_resource,
    render,
    with_everything,
    with_secrets,
)
from tests.support.deployment import variables
from tests.support.paths import ROOT

PODS = ("vouchsafe-api", "vouchsafe-worker", "vouchsafe-adaptation", "vouchsafe-redis")
SECRETS_DIR = "/etc/vouchsafe/secrets"


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], dict[str, Any]]:
    """Every resource of the base and the components, by kind and name."""
    found = {}
    for folder in ("base", "components"):
        for file in (KUBERNETES / folder).rglob("*.yaml"):
            for document in yaml.safe_load_all(file.read_text()):
                if document and "metadata" in document and file.name != "network.yaml":
                    found[document["kind"], document["metadata"]["name"]] = document
    for document in yaml.safe_load_all((KUBERNETES / "base" / "network.yaml").read_text()):
        found[document["kind"], document["metadata"]["name"]] = document
    return found


@pytest.fixture(scope="module")
def pods(resources: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each Deployment and StatefulSet makes its pods of, by its name."""
    makers = {
        name: document["spec"]["template"]
        for (kind, name), document in resources.items()
        if kind in ("Deployment", "StatefulSet")
    }
    assert makers.keys() == set(PODS)
    return makers


def mounted(pod: dict[str, Any]) -> dict[str, tuple[dict[str, Any], bool]]:
    """By path: the volume that is mounted there, and whether it may only be read."""
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    volumes.setdefault("data", {})  # A StatefulSet's own.
    return {
        mount["mountPath"]: (volumes[mount["name"]], mount.get("readOnly", False))
        for mount in container["volumeMounts"]
    }


def test_files_pass_the_schemas() -> None:
    """Each resource is one of Kubernetes, and what a kustomization names is there."""
    assert check_files(KUBERNETES) == []


def test_everything_renders_and_passes() -> None:
    """So do the overlays, the example with its secrets, and all components together."""
    assert check_rendered() == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"spec": {"acessModes": ["ReadWriteMany"]}}, "acessModes"),
        ({"kind": "PersistentVolumeClam"}, "has no such kind"),
        ({"spec": {"accessModes": "ReadWriteMany"}}, "ReadWriteMany"),
    ],
)
def test_check_finds_mistakes(changed: dict[str, Any], told: str) -> None:
    """A misspelt field, an unknown kind and a value of another type are told."""
    claim = yaml.safe_load((KUBERNETES / "base" / "storage.yaml").read_text())
    assert check_resource(claim, "here") == []
    assert any(told in problem for problem in check_resource(claim | changed, "here"))


def test_check_finds_what_is_missing(tmp_path: Path) -> None:
    """A path that leads nowhere and a file that nobody names are told."""
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
    (copy / "overlays" / "gpu" / "rollout.yaml").rename(copy / "overlays" / "gpu" / "other.yaml")
    (copy / "base" / "config" / "api.env").unlink()
    problems = "\n".join(check_files(copy))
    assert "rollout.yaml is missing" in problems
    assert "config/api.env is missing" in problems
    assert "other.yaml: no kustomization.yaml names it" in problems


def test_pods_are_restricted(
    pods: dict[str, dict[str, Any]], resources: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Every pod keeps to the profile `restricted`, which the namespace enforces, and more."""
    labels = resources["Namespace", "vouchsafe"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods.items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            probes = {"startupProbe", "readinessProbe", "livenessProbe"}
            assert probes <= container.keys(), name


def test_noise_secret_is_the_apis_alone(pods: dict[str, dict[str, Any]]) -> None:
    """Workers mount the URL of Redis and no other secret."""
    for name in ("vouchsafe-api", "vouchsafe-worker", "vouchsafe-adaptation"):
        volume, read_only = mounted(pods[name])[SECRETS_DIR]
        assert read_only
        assert volume["projected"]["defaultMode"] == 0o440
        secrets = [source["secret"]["name"] for source in volume["projected"]["sources"]]
        also = ["vouchsafe-api"] if name == "vouchsafe-api" else []
        assert secrets == ["vouchsafe-redis", *also], name
    example = yaml.safe_load((KUBERNETES / "example" / "kustomization.yaml").read_text())
    files = {made["name"]: made["files"] for made in example["secretGenerator"]}
    assert files["vouchsafe-redis"] == ["secrets/vouchsafe_redis_url"]
    assert files["vouchsafe-api"] == [
        "secrets/noise.secret",
        "secrets/signing.key",
        "secrets/api_keys",
    ]


def test_tasks_and_jobs_are_one_volume(
    pods: dict[str, dict[str, Any]], resources: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """A bundle is published by a rename, within one mount; who only serves may not write there."""
    claim = resources["PersistentVolumeClaim", "vouchsafe-data"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    data = variables(KUBERNETES / "base/config/common.env")["VOUCHSAFE_DATA_DIR"]
    for name in ("vouchsafe-api", "vouchsafe-worker", "vouchsafe-adaptation"):
        within = {path: of for path, of in mounted(pods[name]).items() if path.startswith(data)}
        assert within.keys() == {data}, name
        volume, read_only = within[data]
        assert volume["persistentVolumeClaim"] == {"claimName": "vouchsafe-data"}
        assert read_only is (name == "vouchsafe-worker"), name


def test_settings_are_those_of_the_compose_file() -> None:
    """Both ways to deploy set the same, but for where secrets are mounted."""
    for file in sorted((ROOT / "docker" / "env").iterdir()):
        ours = variables(KUBERNETES / "base" / "config" / file.name)
        told = variables(file).items()
        assert ours == {name: text.replace("/run/secrets", SECRETS_DIR) for name, text in told}
    redis_conf = (KUBERNETES / "components" / "redis" / "redis.conf").read_text()
    assert redis_conf == (ROOT / "docker" / "redis.conf").read_text()


def test_processes_have_time_to_drain(pods: dict[str, dict[str, Any]]) -> None:
    """Nothing is killed within a minute, and the API goes on until nobody is sent to it."""
    for name, pod in pods.items():
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 60, name
    (api,) = pods["vouchsafe-api"]["spec"]["containers"]
    assert api["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "10"]


def test_nothing_may_talk_unless_it_is_named(
    pods: dict[str, dict[str, Any]], resources: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """All traffic is denied by default, and each port that a policy opens is some pod's."""
    deny = resources["NetworkPolicy", "default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    listening = {
        port["containerPort"]
        for pod in pods.values()
        for container in pod["spec"]["containers"]
        for port in container["ports"]
    }
    opened = {
        port["port"]
        for (kind, _), policy in resources.items()
        if kind == "NetworkPolicy"
        for rule in policy["spec"].get("ingress", ())
        for port in rule["ports"]
    }
    assert opened == listening


def test_selectors_find_their_pods(
    pods: dict[str, dict[str, Any]], resources: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Every Service and disruption budget selects the pods of one Deployment or StatefulSet."""
    for (kind, name), document in resources.items():
        if kind not in ("Service", "PodDisruptionBudget"):
            continue
        selector = document["spec"]["selector"]
        wanted = selector.get("matchLabels", selector).items()
        found = [n for n, pod in pods.items() if wanted <= pod["metadata"]["labels"].items()]
        assert found == [name], (kind, name)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_give_workers_what_they_compute_on(overlay: str) -> None:
    """Both kinds of workers get the overlay's image and resources, and KEDA its say in replicas."""
    documents = render(KUBERNETES / overlay)
    deployments = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Deployment"}
    image, gpus = {"cpu": ("worker-cpu", None), "gpu": ("worker-cuda", 1)}[Path(overlay).name]
    for name in ("vouchsafe-worker", "vouchsafe-adaptation"):
        (container,) = deployments[name]["template"]["spec"]["containers"]
        assert container["image"].startswith(f"vouchsafe-{image}:")
        limits = container["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == gpus
        assert {"cpu", "memory"} <= limits.keys()
    assert deployments["vouchsafe-worker"]["replicas"] == 2


def test_keda_alone_says_how_many_workers(tmp_path: Path) -> None:
    """With its component the Deployment names no number, which would undo KEDA's at each apply."""
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
    every = with_everything(copy)
    kustomization = yaml.safe_load((every / "kustomization.yaml").read_text())
    del kustomization["secretGenerator"]
    (every / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    documents = {(d["kind"], d["metadata"]["name"]): d for d in render(every)}
    assert "replicas" not in documents["Deployment", "vouchsafe-worker"]["spec"]
    scaled = documents["ScaledObject", "vouchsafe-worker"]["spec"]
    assert scaled["scaleTargetRef"] == {"name": "vouchsafe-worker"}
    to_redis = documents["NetworkPolicy", "to-redis"]["spec"]["egress"]
    assert [rule["to"] for rule in to_redis] == [
        [{"podSelector": {"matchLabels": {"app.kubernetes.io/component": "redis"}}}]
    ]


def test_what_is_referred_to_is_there(tmp_path: Path) -> None:
    """With all components every Secret, map, claim and account that is named is made as well."""
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
    with_secrets(copy)
    documents = render(with_everything(copy))
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    referred = {found for document in documents for found in references(document)}
    assert {kind for kind, _ in referred} == {
        *("Secret", "ConfigMap", "PersistentVolumeClaim", "ServiceAccount", "Deployment")
    }
    assert referred <= made


def references(node: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of all that a resource names."""
    kinds = {
        "secret": "Secret",
        "credentials": "Secret",
        "configMap": "ConfigMap",
        "configMapRef": "ConfigMap",
        "scaleTargetRef": "Deployment",
    }
    names = {"claimName": "PersistentVolumeClaim", "serviceAccountName": "ServiceAccount"}
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    if not isinstance(node, dict):
        return
    for field, value in node.items():
        if field in kinds and isinstance(value, dict):
            yield kinds[field], value.get("name") or value["secretName"]
        elif field in names:
            yield names[field], value
        yield from references(value)
