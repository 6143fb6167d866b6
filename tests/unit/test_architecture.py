"""The import rules of design.md, as they hold when the code runs."""

from __future__ import annotations

import subprocess
import sys

TORCH_FREE = (
    "service.client",
    "models.certificates.rules",
    "models.certificates.anytime",
    "models.certificates.cascade",
    "models.certificates.norms",
    "models.certificates.evidence",
    "models.rows",
    "models.files",
    "models.kinds",
    "models.bundle",
    "models.memory",
    "models.zoo.captions",
    "models.zoo.registry",
    "models.adaptation.limits",
    "models.adaptation.plan",
    "models.evaluation.datasets.registry",
    "service.predictions.images.reader",
    "service.jobs",
    "service.predictions.schemas",
    "service.engine.memory",
    "service.engine.redis.engine",
    "service.worker.batching",
    "service.worker.loop",
    "service.worker.model",
    "service.worker.model_cache",
    "service.api.batches",
    "service.api.tasks",
    "service.tasks.supervisor",
    "service.tasks.lock",
    "service.cli.models",
    "service.cli.adapt",
    "service.cli.worker",
    "service.cli.verify",
    "service.predictions.verification",
    "service.api.app",
    "service.processes.api",
    "service.cli.main",
    "tests.support.fakes",
)
"""From the ground up, so that the first that loads torch is the one that imports it."""

TORCH_ALONE = ("models.smoothing", "models.training", "service.processes.embedded")
"""These need torch; what only a kind of network needs is imported as it is loaded."""

CODE = """
import importlib, sys
modules, forbidden = (part.split(",") for part in sys.argv[1:])
for module in modules:
    importlib.import_module(module)
    if loaded := [name for name in forbidden if name in sys.modules]:
        sys.exit(f"{module} loads {', '.join(loaded)}")
"""


def imported(modules: tuple[str, ...], forbidden: tuple[str, ...]) -> str:
    """What a fresh interpreter says that imports the modules one after another; empty if well."""
    command = [sys.executable, "-c", CODE, ",".join(modules), ",".join(forbidden)]
    return subprocess.run(command, check=False, capture_output=True, text=True).stderr  # noqa: S603


def test_the_api_side_and_the_workers_loop_load_without_torch() -> None:
    """Importing them never loads torch."""
    assert imported(TORCH_FREE, ("torch",)) == ""


def test_network_libraries_are_imported_by_their_loaders() -> None:
    """What serves networks imports torch, and no library before a network needs it."""
    libraries = ("diffusers", "transformers", "open_clip", "timm", "torchvision")
    assert imported(TORCH_ALONE, (*libraries, "openvino", "onnxruntime")) == ""


def test_the_command_line_and_the_client_start_without_numerical_libraries() -> None:
    """They would take most of the half second in which `vouchsafe --help` answers."""
    assert imported(("service.cli.main", "service.client"), ("numpy", "scipy", "torch")) == ""
