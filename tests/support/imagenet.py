"""The script docs/examples/imagenet.py as a module."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.support.paths import ROOT

SCRIPT = ROOT / "docs" / "examples" / "imagenet.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imagenet", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
