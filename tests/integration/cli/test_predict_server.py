"""`vouchsafe predict --server`: a running server answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from tests.support.listening import listening
from tests.support.serving import PNG, Service

runner = CliRunner()


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures and a file that is none."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in (("a.png", PNG), ("b.png", PNG), ("c.png", b"none")):
        (folder / name).write_bytes(content)
    return folder


def test_a_server_answers_in_order(pictures: Path, tmp_path: Path) -> None:
    """Answers, certificates and the server's own problem come as from this machine."""
    key = tmp_path / "key"
    key.write_text("key-of-ann\n")
    service = Service(data_dir=tmp_path / "served", api_keys="ann:key-of-ann")
    with listening(service) as running:
        options = ["--server", running.url, "--key-file", str(key), "--n", "200", "--json"]
        written = ["--certificate", str(tmp_path / "certificates")]
        done = runner.invoke(app, ["predict", str(pictures), *options, *written])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.png", "c.png"]
    assert [line.get("label") for line in lines] == ["cat", "cat", None]
    assert lines[2]["problem"]["type"] == "urn:vouchsafe:problem:unsupported-media-type"
    assert len(list((tmp_path / "certificates").iterdir())) == 2


def test_a_refused_key_and_a_silent_server_are_named(pictures: Path, tmp_path: Path) -> None:
    """Each image says why it has no answer; a malformed URL ends the command."""
    service = Service(data_dir=tmp_path / "served", api_keys="ann:key-of-ann")
    with listening(service) as running:
        refused = runner.invoke(app, ["predict", str(pictures), "--server", running.url])
    assert refused.exit_code == 1
    assert "Send a key" in refused.stderr
    malformed = runner.invoke(app, ["predict", str(pictures), "--server", "localhost"])
    assert malformed.exit_code == 2
    assert "must begin with http://" in malformed.stderr


def test_torch_is_not_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server computes, so a machine without torch can ask."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with listening(Service(data_dir=tmp_path / "served")) as running:
        picture = str(pictures / "a.png")
        done = runner.invoke(app, ["predict", picture, "--server", running.url, "--n", "200"])
    assert done.exit_code == 0, done.stderr
    assert "cat" in done.stdout
