"""Checks the files that deploy the service, without an engine or a cluster: `make check-deploy`.

- hadolint checks the Dockerfile, and the published schema checks docker-compose.yml.
- Kubernetes resources are validated against the oldest and the newest supported release: each
  file, and every overlay and component as `kubectl kustomize` renders it.
- promtool checks Prometheus's settings and rules, and runs the rules' tests. Where promtool is not
  installed this part is left out, except in CI.
"""

from __future__ import annotations

import os
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
TOOLS = Path(sys.executable).parent
"""Where the development requirements put hadolint, check-jsonschema and kubectl."""
RELEASES = ("1.29", "1.37")
"""The oldest and the newest Kubernetes that the resources are validated against."""
FOREIGN = ("keda.sh/", "monitoring.coreos.com/")
"""API groups of other operators, without schemas here: only the resource's form is checked."""
KUSTOMIZATION = "kustomization.yaml"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
SECONDS = 60


def main() -> int:
    """Return the exit status: 0 if no problem was found. Prints every problem."""
    schema = ("--builtin-schema", "vendor.compose-spec")
    problems = [
        *_output_of([TOOLS / "hadolint", ROOT / "docker" / "Dockerfile"]),
        *_output_of([TOOLS / "check-jsonschema", *schema, ROOT / "docker-compose.yml"]),
        *check_files(KUBERNETES),
        *check_rendered(),
    ]
    checked = "Dockerfile, compose file, Kubernetes files and overlays"
    if promtool := shutil.which("promtool"):
        problems += check_monitoring(promtool)
        checked += ", alerts and their tests"
    elif os.environ.get("CI") == "true":
        problems.append("CI needs promtool")
    else:
        print("promtool is not installed: alerts and their tests are not checked")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(problems)} problems" if problems else f"no problems: {checked}")
    return 1 if problems else 0


def _output_of(command: Sequence[str | Path]) -> list[str]:
    """Return a tool's output as one problem if the tool fails, else nothing."""
    ended = subprocess.run(  # noqa: S603
        list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return [] if ended.returncode == 0 else [(ended.stdout + ended.stderr).strip()]


def check_monitoring(promtool: str) -> list[str]:
    """Return promtool's problems with Prometheus's settings, the rules and the rules' tests."""
    settings, tests = MONITORING / "prometheus.yml", sorted((MONITORING / "tests").glob("*.yml"))
    return [
        *_output_of([promtool, "check", "config", "--syntax-only", settings]),
        *_output_of([promtool, "check", "rules", MONITORING / "alerts.yml"]),
        *_output_of([promtool, "test", "rules", *tests]),
    ]


def check_files(folder: Path) -> list[str]:
    """Return the problems of a folder's resources, file by file, and of the paths it names.

    Patches are parts of resources and have no schema. Only their form and place are checked.
    """
    problems, resources, patches = [], set[Path](), set[Path]()
    for file in sorted(folder.rglob(KUSTOMIZATION)):
        document = yaml.safe_load(file.read_text())
        for path in _paths(document):
            target = (file.parent / path).resolve()
            if not (target / KUSTOMIZATION if target.is_dir() else target).exists():
                problems.append(f"{file}: {path} is missing")
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
            problems.append(f"{path}: no {KUSTOMIZATION} names it")
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
        for document in documents if path.resolve() in resources else ():
            problems += check_resource(document, str(path))
    return problems


def _paths(kustomization: dict[str, Any]) -> Iterator[str]:
    """Yield every file and folder that a kustomization names, except secrets: git ignores them."""
    yield from kustomization.get("resources", ())
    yield from kustomization.get("components", ())
    yield from (patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch)
    for generator in kustomization.get("configMapGenerator", ()):
        yield from generator.get("envs", ())
        yield from (file.rpartition("=")[2] for file in generator.get("files", ()))


def check_resource(document: dict[str, Any], where: str) -> list[str]:
    """Return the problems of one resource, by the schemas; an unknown field is one."""
    named = f"{where}: {document.get('kind')} {document.get('metadata', {}).get('name')}"
    if str(document.get("apiVersion", "")).startswith(FOREIGN):
        whole = {"apiVersion", "kind", "metadata", "spec"} <= document.keys()
        return [] if whole else [f"{named}: apiVersion, kind, metadata or spec is missing"]
    problems = []
    for release in RELEASES:
        try:
            kubernetes_validate.validate(document, release, strict=True)
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{named}: Kubernetes {release}: {error}")
        except kubernetes_validate.SchemaNotFoundError:
            problems.append(f"{named}: Kubernetes {release} has no such kind")
    return problems


def check_rendered() -> list[str]:
    """Return the problems of the rendered overlays, of the example, and of every component."""
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "kubernetes"
        shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("secrets"))
        try:
            folders = [*map(copy.joinpath, OVERLAYS), with_secrets(copy), with_everything(copy)]
            for folder in folders:
                for document in render(folder):
                    problems += check_resource(document, f"{folder.relative_to(copy)} as rendered")
        except RuntimeError as error:
            problems.append(str(error))
    return problems


def with_secrets(kubernetes: Path) -> Path:
    """Make the secrets of a copy's example, as its first lines say; returns the example."""
    example = kubernetes / "example"
    command = [sys.executable, ROOT / "docker" / "make_secrets.py", example / "secrets"]
    subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)  # noqa: S603
    return example


def with_everything(kubernetes: Path) -> Path:
    """Make a kustomization in a copy that adds every component to the example; returns it.

    Raises RuntimeError if the example does not mention a component.
    """
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


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the resources of a kustomization.

    Raises RuntimeError with kubectl's message if kubectl cannot render it.
    """
    ended = subprocess.run(  # noqa: S603
        [str(TOOLS / "kubectl"), "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip())
    return [document for document in yaml.safe_load_all(ended.stdout) if document]


if __name__ == "__main__":
    sys.exit(main())
