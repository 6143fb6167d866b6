"""Kinds of networks: the project's own, those of packages, and what names them in the numerics."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from models import kinds
from models.bundle import Base, Bundle
from models.classifiers.registry import classifier_loader
from models.classifiers.timm import load_timm
from models.rows import Numerics

MACHINE = Numerics("a CPU", "float32", 16, 1, "torch", "2.15")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds `theirs`, and a `timm` that it may not add."""
    described = tmp_path / "theirs-1.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    lines = "theirs = theirs:load\ntimm = theirs:load\n"
    (described / "entry_points.txt").write_text(f"[{kinds.CLASSIFIER_GROUP}]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)


def bundle(classifier: str) -> Bundle:
    return Bundle(
        id="a",
        labels=("cat", "dog"),
        template="{}",
        prompt="",
        k=1.0,
        resolution=32,
        largest_sigma=1.0,
        denoiser=Base("none"),
        classifier=Base(classifier),
        licence="",
        files={},
    )


def test_a_package_adds_a_kind_and_replaces_none(package: None) -> None:
    """Its kind is known without its code; the project's own kind of that name stays."""
    assert "theirs" in kinds.classifier_kinds()
    assert kinds.classifier_kinds().count("timm") == 1
    assert "theirs" not in kinds.denoiser_kinds()
    assert classifier_loader("timm") is load_timm
    assert kinds.libraries("none", "timm") == ()


def test_an_unknown_kind_has_no_loader() -> None:
    """The kind is the error's key."""
    with pytest.raises(KeyError, match="theirs"):
        classifier_loader("theirs")


def test_numerics_name_what_computes_beside_torch(package: None) -> None:
    """A package and onnxruntime are named with their versions; torch alone adds nothing."""
    onnxruntime = f"torch, onnxruntime {metadata.version('onnxruntime')}"
    assert bundle("timm").numerics(MACHINE) == MACHINE
    assert bundle("theirs").numerics(MACHINE).runtime == "torch, theirs 1.2"
    assert bundle("onnx").numerics(MACHINE).runtime == onnxruntime
