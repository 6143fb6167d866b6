"""Registered names in POST /tasks: names alone reach the disk, never paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.zoo.own import OWN, REGISTRATION, Registration
from tests.support.serving import problem, serving


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory where a classifier of three labels is registered as `mine`."""
    registered = Registration("timm", ("cat", "dog", "ship"), None, 48, 1.0, 1.0, "a {}")
    folder = tmp_path / "data" / "models" / OWN / "mine"
    folder.mkdir(parents=True)
    (folder / REGISTRATION).write_text(json.dumps(registered.document()))
    return tmp_path / "data"


async def test_a_registered_name_is_taken(data: Path) -> None:
    """A classifier's name with its own labels makes a task."""
    labels = ["cat", "dog", "ship"]
    async with serving(data_dir=data) as service:
        made = await service.client.post("/tasks", json={"labels": labels, "classifier": "mine"})
    assert made.status_code == 202, made.text
    assert made.json()["settings"]["classifier"] == "mine"


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"classifier": "mine", "labels": ["cat", "dog"]}, "labels", "has fixed labels"),
        ({"denoiser": "mine"}, "denoiser", "mine has no denoiser"),
        ({"classifier": "own/mine"}, "classifier", 'no classifier set "own/mine"'),
        ({"classifier": "../own/mine"}, "classifier", 'no classifier set "../own/mine"'),
        ({"classifier": "timm:/etc"}, "classifier", 'no classifier set "timm:/etc"'),
        ({"denoiser": "ffdnet:."}, "denoiser", 'no denoiser set "ffdnet:."'),
    ],
)
async def test_what_is_no_such_name_is_refused(
    fields: dict[str, object], field: str, reason: str, data: Path
) -> None:
    """Paths and kinds are no names, and a name must have what the task needs."""
    async with serving(data_dir=data) as service:
        refused = await service.client.post("/tasks", json={"labels": ["cat", "ship"]} | fields)
    (error,) = problem(refused, 422, "invalid-field")["errors"]
    assert error["field"] == field
    assert reason in error["detail"]


async def test_a_damaged_registration_is_named(data: Path) -> None:
    """A registration that cannot be read refuses its name with the file."""
    (data / "models" / OWN / "mine" / REGISTRATION).write_text("{}")
    async with serving(data_dir=data) as service:
        fields = {"labels": ["cat", "dog", "ship"], "classifier": "mine"}
        refused = await service.client.post("/tasks", json=fields)
    assert "registration.json: cannot be read" in problem(refused, 422, "invalid-field")["detail"]
