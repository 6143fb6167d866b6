"""Bundles that tests publish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from models.bundle import DEFAULT_TASK


def put(tasks: Path, name: str, **changes: Any) -> Path:
    """A bundle of this name whose manifest differs in some fields."""
    folder = tasks / name
    shutil.copytree(DEFAULT_TASK, folder)
    described = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(described | {"id": name} | changes))
    return folder
