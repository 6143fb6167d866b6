"""README.md and the pages of the client: their snippets run as they are, one after another."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.tasks.supervisor import Supervisor
from tests.support.adapting import FAKE, FAST, make_store
from tests.support.documents import README, TUTORIAL
from tests.support.listening import listening
from tests.support.paths import ROOT
from tests.support.serving import Service

ADDRESS = "http://127.0.0.1:8000"
FLAGS = re.DOTALL | re.MULTILINE


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a service with an adaptation that takes no time."""
    pages = [README, TUTORIAL, ROOT / "docs" / "python.md"]
    found = [re.findall(r"^```python\n(.*?)^```", page.read_text(), FLAGS) for page in pages]
    assert [len(snippets) for snippets in found] == [1, 6, 9]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).eval()
    images = np.zeros((2, 3, 8, 8), np.uint8)
    names: dict[str, Any] = {"module": module, "images": images, "print": lambda *_: None}
    service = Service(
        more=[Supervisor(make_store(tmp_path / "data"), FAKE, FAST).run],
        data_dir=tmp_path / "data",
        backlog_rows=100_000,
    )
    picture = "data:image/png;base64,"
    sample = {"noisy": picture, "denoised": picture, "label": 2}
    service.voter.result = json.dumps({"seen": picture, "samples": [sample] * 6}).encode()
    with listening(service) as running:
        for snippet in chain.from_iterable(found):
            made = snippet.replace(ADDRESS, running.url)
            made = made.replace('name="pets")', 'name="pets", template="plain {}", shots=1)')
            made = made.replace(', task="pets")', ")")  # The fake voter serves the default task.
            exec(compile(made, "docs/python.md", "exec"), names)  # noqa: S102 - our own page
    assert names["answer"]["label"] == "cat"
    assert (tmp_path / "answers.csv").read_text().count("\n") > 2
    assert (tmp_path / "certificate.json").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["document"]["certificates"]
    assert [sample["label"] for sample in names["shown"]["samples"]] == ["cat"] * 6
    assert {check["name"] for check in names["found"]["checks"]} > {"signature", "image"}
    assert names["labels"].shape == (2,)
