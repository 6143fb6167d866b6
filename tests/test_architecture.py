"""The import rules of design.md, as they hold when the code runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

TORCH_FREE = (
    "models.certificates",
    "models.bundle",
    "models.zoo.captions",
    "models.zoo.registry",
    "models.adaptation.plan",
    "service.predictions.images.reader",
    "service.worker.batching",
    "service.jobs",
    "service.predictions.schemas",
    "service.engine.memory",
    "service.engine.redis.engine",
    "service.api.tasks",
    "service.tasks.supervisor",
    "service.tasks.lock",
    "service.cli.models",
    "service.cli.adapt",
    "service.cli.worker",
    "service.api.app",
    "service.processes.api",
    "service.cli.main",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_loads_without_torch(module: str) -> None:
    """Importing the API side never loads torch, in a fresh interpreter."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
