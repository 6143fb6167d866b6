"""The images, docker-compose.yml and their settings, as far as no engine is needed for it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zipfile import ZipFile

import pytest
import yaml

from benchmarks.server import free_port
from service.config import Settings
from tests.support.deployment import SECRETS, make_secrets, variables
from tests.support.paths import ROOT
from tests.support.wheels import build_wheel

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
API, WORKERS = "api", ("worker-cpu", "adaptation-cpu", "worker-gpu", "adaptation-gpu")
DEPLOYING = ("docker", "deploy", "docker-compose.yml", ".dockerignore", "docs/operations.md")


def deploying() -> Iterator[tuple[Path, str]]:
    """Every text file that deploys the service, or tells how to."""
    for name in DEPLOYING:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            ignored = {"__pycache__", "secrets"} & set(file.relative_to(ROOT).parts)
            if file.is_file() and not ignored:
                yield file, file.read_text()


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The compose file's services, with all that they take over from elsewhere in it."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    told: dict[str, Any] = document["services"]
    return told


@pytest.fixture(scope="module")
def stages() -> dict[str, tuple[str, list[str]]]:
    """The Dockerfile's stages: from what each is made, and its instructions, one a line."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    found: dict[str, tuple[str, list[str]]] = {}
    lines: list[str] = []
    for line in joined.splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            lines = []
            found[match[2]] = match[1], lines
        elif line and line[0] != "#":
            lines.append(line)
    return found


def inherited(stages: dict[str, tuple[str, list[str]]], stage: str) -> list[str]:
    """All instructions that make a stage, its ancestors' first."""
    if stage not in stages:
        return []
    return [*inherited(stages, stages[stage][0]), *stages[stage][1]]


def test_every_variable_is_a_setting() -> None:
    """What an environment file, a manifest or the runbook names is read by somebody."""
    known = {f"VOUCHSAFE_{name.upper()}" for name in Settings.model_fields}
    for file, text in deploying():
        named = set(re.findall(r"VOUCHSAFE_[A-Z0-9_]+", text))
        assert named <= known, file


def test_no_secret_is_in_the_repository() -> None:
    """No file that deploys holds a password, a key or anything that looks like one."""
    looks = re.compile(
        r"rediss?://[^:@/\s]*:(?!PASSWORD@)[^@{}\s]{8,}@|-----BEGIN|\b[0-9a-f]{32,}\b"
        r"|(?i:password|token|secret|api_key)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{16,}"
    )
    for file, text in deploying():
        assert not looks.search(text), file
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/docker/secrets/", "/deploy/kubernetes/*/secrets/"} <= set(ignored)
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert allowed[1] == "*"
    assert not [line for line in allowed if line[:1] == "!" and "secret" in line]


@pytest.mark.parametrize("process", ["api", "worker", "adaptation"])
def test_environment_files_are_settings(
    process: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the secrets beside them each file makes the settings of its process."""
    assert make_secrets(tmp_path).returncode == 0
    told = variables(ROOT / "docker/env/common.env") | variables(ROOT / f"docker/env/{process}.env")
    for name, value in told.items():
        monkeypatch.setenv(name, value.replace("/run/secrets", str(tmp_path)))
    settings = Settings()
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value().endswith("@redis:6379/0")
    assert bool(settings.callers()) is (process == "api")
    assert settings.run_adaptation_jobs is (process != "worker")
    assert settings.models_folder == Path("/var/lib/vouchsafe/models")
    assert settings.noise_secret_file == tmp_path / "noise.secret"


# Images


@pytest.mark.parametrize("target", ["api", "worker-cpu", "worker-cuda"])
def test_images_run_as_nobody_in_particular(
    stages: dict[str, tuple[str, list[str]]], target: str
) -> None:
    """Every image ends as a user by number, starts without a shell, and says how it is."""
    lines = inherited(stages, target)
    last = {line.split()[0]: line for line in lines}
    assert last["USER"] == "USER 10001:10001"
    after_user = lines[lines.index(last["USER"]) :]
    assert not [line for line in after_user if line.startswith(("RUN", "COPY", "ADD"))]
    for name in ("ENTRYPOINT", "CMD"):
        assert json.loads(last[name].removeprefix(name))
    probe = re.sub(r"^HEALTHCHECK .*?CMD ", "", last["HEALTHCHECK"])
    assert json.loads(probe)[:2] == ["python", "/opt/probe.py"]
    assert "/livez" in probe
    label = last["LABEL"]
    assert all(f"image.{name}=" in label for name in ("title", "licenses", "version", "revision"))


def test_bases_are_pinned() -> None:
    """No image is taken by a name that says nothing of its release."""
    compose = (ROOT / "docker-compose.yml").read_text()
    taken = re.findall(r"^FROM (\S+:\S+)", DOCKERFILE, re.MULTILINE)
    taken += re.findall(r"image: (\S+)", compose)
    assert taken
    for image in taken:
        assert re.search(r":(v?\d+\.\d+\.\d+|\$\{VERSION:-\d+\.\d+\.\d+\})(-[a-z-]+)?$", image), (
            image
        )


def test_images_are_of_this_version() -> None:
    """The Dockerfile, the compose file and the manifests name the project's own version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"ARG VERSION=(\S+)", DOCKERFILE)
    named += re.findall(r"\$\{VERSION:-([^}]+)\}", (ROOT / "docker-compose.yml").read_text())
    for file in (ROOT / "deploy" / "kubernetes").rglob("*.yaml"):
        named += re.findall(r"(?:newTag|kubernetes\.io/version): (\S+)", file.read_text())
    assert set(named) == {project["version"]}


def test_api_image_has_no_torch(stages: dict[str, tuple[str, list[str]]]) -> None:
    """The API's image installs its own lock file, and nothing of the networks is in that."""
    lines = stages["api-dependencies"][1]
    installed = [line for line in lines if "install" in line]
    pip = "RUN pip --python /opt/vouchsafe/bin/python"
    assert installed == [f"{pip} install --requirement requirements-api.lock"]
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-api.lock").read_text(), re.MULTILINE)
    assert "fastapi" in locked
    torchlike = {"torch", "torchvision", "diffusers", "transformers", "timm", "openvino", "triton"}
    assert not torchlike & set(locked)
    assert "worker" not in " ".join(inherited(stages, "api"))


@pytest.mark.parametrize("target", ["api", "worker-cpu", "worker-cuda"])
def test_images_have_no_pip(stages: dict[str, tuple[str, list[str]]], target: str) -> None:
    """The base's pip is removed, and what is copied in was made without one."""
    lines = inherited(stages, target)
    (removed,) = [line for line in lines if "pip " in line]
    assert "pip uninstall --yes" in removed
    assert "rm -rf /usr/local/lib/python3.11/ensurepip" in removed
    made = [line for _, own in stages.values() for line in own if "-m venv" in line]
    assert made == ["RUN python -m venv --without-pip /opt/vouchsafe"]


def test_workers_share_their_dependencies(stages: dict[str, tuple[str, list[str]]]) -> None:
    """Both worker images copy the same environment, and the API's copies another."""
    copied = {
        target: [line for line in stages[target][1] if line.startswith("COPY")]
        for target in ("api", "worker-cpu", "worker-cuda")
    }
    assert copied["worker-cpu"] == copied["worker-cuda"]
    assert copied["api"][1:] == copied["worker-cpu"][1:]
    assert copied["api"][0] != copied["worker-cpu"][0]


def test_what_images_copy_is_not_ignored(stages: dict[str, tuple[str, list[str]]]) -> None:
    """Each file that the Dockerfile copies from the repository is there, and let in."""
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        source
        for _, lines in stages.values()
        for line in lines
        if line.startswith("COPY ") and "--from=" not in line
        for source in line.split()[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_wheel_holds_everything(tmp_path: Path) -> None:
    """What images install is the whole project: weights, scripts and the page too."""
    held = set(ZipFile(build_wheel(tmp_path)).namelist())
    here = {
        str(path.relative_to(ROOT))
        for name in ("models", "service")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."
    }
    assert here <= held


def test_health_check_tells_how_it_is() -> None:
    """It exits with 0 for a 200, and with 1 for any other answer, or none."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    def probe(port: int, path: str) -> int:
        command = [sys.executable, str(ROOT / "docker" / "probe.py"), str(port), path]
        return subprocess.run(command, capture_output=True, check=False).returncode  # noqa: S603

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        answering = Thread(target=server.serve_forever)
        answering.start()
        try:
            assert probe(server.server_port, "/livez") == 0
            assert probe(server.server_port, "/readyz") == 1
        finally:
            server.shutdown()
            answering.join()
    assert probe(free_port(), "/livez") == 1


# Compose


def test_services_are_confined(services: dict[str, Any]) -> None:
    """No container writes to its image, has a capability or may get one, or runs as root."""
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name == "secrets":  # It gives files away, which root alone can.
            assert service["network_mode"] == "none"
            continue
        assert not service.get("cap_add"), name
        assert service.get("build") or int(service["user"].split(":")[0]) > 0, name
        if name == "fetch":
            continue
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name


def test_only_the_api_is_reached_from_outside(services: dict[str, Any]) -> None:
    """Redis and workers are on a network without a way out; ports are this machine's own."""
    networks = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["networks"]
    assert networks["queue"] == {"internal": True}
    for name in ("redis", *WORKERS):
        assert list(services[name]["networks"]) == ["queue"], name
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith(("127.0.0.1:", "${BIND_ADDRESS:-127.0.0.1}:")), name


def test_workers_have_no_noise_secret(services: dict[str, Any]) -> None:
    """The API alone mounts it, and those who only serve may not write to the tasks."""
    for name, service in services.items():
        for secret in ("noise.secret", "signing.key"):
            assert (secret in service.get("secrets", ())) is (name == API), name
    for name in WORKERS:
        assert services[name]["secrets"] == ["vouchsafe_redis_url"]
        (volume,) = services[name]["volumes"]
        assert volume.get("read_only", False) is name.startswith("worker")


def test_tasks_and_jobs_are_one_mount(services: dict[str, Any]) -> None:
    """A bundle is published by a rename, which no two mounts allow."""
    data = variables(ROOT / "docker/env/common.env")["VOUCHSAFE_DATA_DIR"]
    for name in (API, *WORKERS, "fetch"):
        mounts = {volume["target"]: volume["source"] for volume in services[name]["volumes"]}
        within = {target: source for target, source in mounts.items() if target.startswith(data)}
        assert within == {data: "data"}, name


def test_processes_have_time_to_drain(services: dict[str, Any]) -> None:
    """A worker may need 35 s, so nothing is killed within a minute."""
    for name in (API, "redis", *WORKERS):
        assert services[name]["stop_grace_period"] == "60s", name


def test_secrets_of_the_compose_file_are_those_made(services: dict[str, Any]) -> None:
    """Each is a file of the folder that make_secrets.py fills, and nobody asks for another."""
    declared = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["secrets"]
    assert declared == {name: {"file": f"./docker/secrets/{name}"} for name in SECRETS}
    asked = {name for service in services.values() for name in service.get("secrets", ())}
    assert asked == SECRETS
