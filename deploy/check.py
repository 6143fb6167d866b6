"""Checks what deploys the service, without an engine or a cluster: `make check-deploy`.

The Dockerfile by hadolint, docker-compose.yml by its published schema, and the Kubernetes resources
by those of the oldest and the newest release that they are meant for: each file by itself, and,
where kubectl or kustomize is at hand, every overlay and component as it is rendered.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
MONITORING = ROOT / "deploy" / "monitoring"
RELEASES = ("1.29", "1.37")
"""The oldest and the newest Kubernetes that the resources are checked against."""
FOREIGN = ("keda.sh/", "monitoring.coreos.com/")
"""Groups whose schemas are their own operators'; of their resources only the form is checked."""
KUSTOMIZATION = "kustomization.yaml"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
SECONDS = 60


def main() -> int:
    """Say what is checked and what is wrong; returns the exit status."""
    tools = Path(sys.executable).parent
    troubles = [
        *_told_by([tools / "hadolint", ROOT / "docker" / "Dockerfile"]),
        *_told_by(
            [
                *(tools / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"),
                ROOT / "docker-compose.yml",
            ]
        ),
        *check_files(KUBERNETES),
    ]
    checked = "hadolint, compose schema, Kubernetes files"
    if (renderer := find_renderer()) is None:
        print("neither kubectl nor kustomize is here: overlays are not rendered")
    else:
        troubles += check_rendered(renderer)
        checked += f", overlays rendered by {Path(renderer[0]).name}"
    if (promtool := shutil.which("promtool")) is None:
        print("promtool is not here: the alerts and their tests are left out")
    else:
        troubles += check_monitoring(promtool)
        checked += ", alerts and their tests"
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    print(f"{len(troubles)} troubles" if troubles else f"all is well: {checked}")
    return 1 if troubles else 0


def _told_by(command: Sequence[str | Path]) -> list[str]:
    """What a tool has to say where it is not content."""
    ended = subprocess.run(  # noqa: S603
        list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return [] if ended.returncode == 0 else [(ended.stdout + ended.stderr).strip()]


def check_monitoring(promtool: str) -> list[str]:
    """What promtool has to say of Prometheus's settings and rules, and of the rules' tests."""
    settings, tests = MONITORING / "prometheus.yml", sorted((MONITORING / "tests").glob("*.yml"))
    return [
        *_told_by([promtool, "check", "config", "--syntax-only", settings]),
        *_told_by([promtool, "check", "rules", MONITORING / "alerts.yml"]),
        *_told_by([promtool, "test", "rules", *tests]),
    ]


def check_files(folder: Path) -> list[str]:
    """What is wrong with the resources of a folder, each file by itself, and with its paths.

    Patches are parts of resources and have no schema: only their form and their place are checked.
    """
    troubles, resources, patches = [], set[Path](), set[Path]()
    for file in sorted(folder.rglob(KUSTOMIZATION)):
        document = yaml.safe_load(file.read_text())
        for path in _paths(document):
            target = (file.parent / path).resolve()
            if not (target / KUSTOMIZATION if target.is_dir() else target).exists():
                troubles.append(f"{file}: {path} is not there")
        resources |= {(file.parent / path).resolve() for path in document.get("resources", ())}
        patches |= {
            (file.parent / patch["path"]).resolve()
            for patch in document.get("patches", ())
            if "path" in patch
        }
    for path in sorted(folder.rglob("*.yaml")):
        if path.name == KUSTOMIZATION:
            continue
        if path.resolve() not in resources | patches:
            troubles.append(f"{path}: no {KUSTOMIZATION} names it")
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
        for document in documents if path.resolve() in resources else ():
            troubles += check_resource(document, str(path))
    return troubles


def _paths(kustomization: dict[str, Any]) -> Iterator[str]:
    """Every file and folder that a kustomization names, but those of secrets, which nobody has."""
    yield from kustomization.get("resources", ())
    yield from kustomization.get("components", ())
    yield from (patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch)
    for generator in kustomization.get("configMapGenerator", ()):
        yield from generator.get("envs", ())
        yield from (file.rpartition("=")[2] for file in generator.get("files", ()))


def check_resource(document: dict[str, Any], where: str) -> list[str]:
    """What the schemas have against a resource; unknown fields count."""
    named = f"{where}: {document.get('kind')} {document.get('metadata', {}).get('name')}"
    if str(document.get("apiVersion", "")).startswith(FOREIGN):
        whole = {"apiVersion", "kind", "metadata", "spec"} <= document.keys()
        return [] if whole else [f"{named}: lacks a field that every resource has"]
    troubles = []
    for release in RELEASES:
        try:
            kubernetes_validate.validate(document, release, strict=True)
        except kubernetes_validate.ValidationError as error:
            troubles.append(f"{named}: Kubernetes {release}: {error}")
        except kubernetes_validate.SchemaNotFoundError:
            troubles.append(f"{named}: Kubernetes {release} knows no such kind")
    return troubles


def find_renderer() -> list[str] | None:
    """The command that renders a kustomization, or None where there is none."""
    if kustomize := shutil.which("kustomize"):
        return [kustomize, "build"]
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    return None


def check_rendered(renderer: Sequence[str]) -> list[str]:
    """What is wrong with the overlays, the example with secrets of its own, and every component."""
    troubles = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "kubernetes"
        shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
        try:
            folders = [*map(copy.joinpath, OVERLAYS), with_secrets(copy), with_everything(copy)]
            for folder in folders:
                for document in render(renderer, folder):
                    troubles += check_resource(document, f"{folder.relative_to(copy)} as rendered")
        except RuntimeError as error:
            troubles.append(str(error))
    return troubles


def with_secrets(kubernetes: Path) -> Path:
    """The example of a copy, its secrets made as its first lines say."""
    example = kubernetes / "example"
    command = [sys.executable, ROOT / "docker" / "make_secrets.py", example / "secrets"]
    subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)  # noqa: S603
    return example


def with_everything(kubernetes: Path) -> Path:
    """A kustomization of a copy that adds every component to the example's."""
    example, every = kubernetes / "example", kubernetes / "every"
    shutil.copytree(example, every)
    text = (every / KUSTOMIZATION).read_text()
    (every / KUSTOMIZATION).write_text(
        re.sub(r"(?m)^  # - \.\./components/", "  - ../components/", text)
    )
    named = yaml.safe_load((every / KUSTOMIZATION).read_text())["components"]
    if missing := {path.name for path in (kubernetes / "components").iterdir()} - {
        Path(component).name for component in named
    }:
        raise RuntimeError(f"example/{KUSTOMIZATION} does not mention {', '.join(missing)}")
    return every


def render(renderer: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The resources of a kustomization; raises RuntimeError with what the renderer says."""
    ended = subprocess.run(  # noqa: S603
        [*renderer, str(folder)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip())
    return [document for document in yaml.safe_load_all(ended.stdout) if document]


if __name__ == "__main__":
    sys.exit(main())
