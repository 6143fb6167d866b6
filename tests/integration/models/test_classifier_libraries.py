"""Classifiers against their own libraries' pipelines, on a photograph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from models.classifiers.base import Description, Preprocess
from models.classifiers.registry import CLASSIFIERS, DESCRIPTIONS
from models.runtime import Torch
from tests.support import miniatures, onnx_files, own_networks
from tests.support.paths import ROOT

CPU = torch.device("cpu")
TEMPLATE = "a photo of a {}."
LABELS = own_networks.NAMES
PROMPTS = [TEMPLATE.format(label) for label in LABELS]


def photograph(side: int) -> Image.Image:
    """The documentation's ship, at the size of a network's input."""
    return Image.open(ROOT / "docs" / "ship.png").convert("RGB").resize((side, side))


def as_certified(picture: Image.Image) -> Tensor:
    """What the service certifies: the picture's array (1,3,H,W), in [0,1] units."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


def ours(kind: str, folder: Path, picture: Image.Image) -> Tensor:
    load = CLASSIFIERS[kind]
    classifier = load(folder, LABELS, TEMPLATE, CPU, torch.float32, Torch(), None)
    with torch.inference_mode():
        return classifier(as_certified(picture))


@torch.no_grad()
def by_timm(folder: Path, picture: Image.Image) -> Tensor:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    steps = timm.data.create_transform(**config, is_training=False).transforms[2:]
    for step in steps:  # After the resize and the crop, which the service does itself.
        picture = step(picture)
    return model(picture[None])  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def by_open_clip(folder: Path, picture: Image.Image) -> Tensor:
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    words = open_clip.get_tokenizer(name)(PROMPTS)
    image = model.eval().encode_image(preprocess(picture)[None], normalize=True)
    return model.logit_scale.exp() * image @ model.encode_text(words, normalize=True).T


def by_image_pipeline(folder: Path, picture: Image.Image) -> Tensor:
    pipeline: Any = transformers.pipeline("image-classification", model=str(folder), device=CPU)
    scores = {each["label"]: each["score"] for each in pipeline(picture, function_to_apply="none")}
    return torch.tensor([[scores[label] for label in LABELS]])


def by_zero_shot_pipeline(folder: Path, picture: Image.Image) -> Tensor:
    pipeline: Any = transformers.pipeline(
        "zero-shot-image-classification", model=str(folder), device=CPU
    )
    given = pipeline.preprocess(picture, list(LABELS), hypothesis_template=TEMPLATE)
    with torch.no_grad():
        return pipeline._forward(dict(given))["logits"]  # type: ignore[no-any-return]


def by_onnxruntime(folder: Path, picture: Image.Image) -> Tensor:
    described = json.loads((folder / "model.json").read_text())
    scaled = (np.asarray(picture, np.float32) / 255 - described["mean"]) / described["std"]
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    images = scaled.transpose(2, 0, 1)[None].astype(np.float32)
    return torch.from_numpy(session.run(None, {"x": images})[0])


CASES: dict[str, tuple[str, Callable[[Path], Path], Callable[[Path, Image.Image], Tensor]]] = {
    "timm": ("timm", miniatures.save_timm, by_timm),
    "vit": ("transformers", own_networks.save_vit, by_image_pipeline),
    "clip": ("transformers", own_networks.save_clip, by_zero_shot_pipeline),
    "siglip": ("transformers", own_networks.save_siglip, by_zero_shot_pipeline),
    "siglip's image tower": ("transformers", own_networks.save_siglip_tower, by_image_pipeline),
    "onnx": ("onnx", own_networks.save_onnx, by_onnxruntime),
    "open-clip": ("open-clip", miniatures.save_open_clip, by_open_clip),
}


@pytest.mark.parametrize(("kind", "save", "theirs"), CASES.values(), ids=CASES)
def test_logits_are_the_librarys_own(
    kind: str,
    save: Callable[[Path], Path],
    theirs: Callable[[Path, Image.Image], Tensor],
    tmp_path: Path,
) -> None:
    """In float32 a photograph's logits equal those of the library's own pipeline to 1e-4."""
    folder = save(tmp_path)
    side = DESCRIPTIONS[kind](folder).resolution
    assert side in (48, 64)
    picture = photograph(side or 0)
    expected, found = theirs(folder, picture), ours(kind, folder, picture)
    assert expected.std() > 1e-3
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_a_picture_of_another_size_is_resized_as_by_transformers() -> None:
    """A tensor of another size goes through the resize that the image processor would do."""
    x = as_certified(photograph(80))
    resize = v2.Resize((48, 48), v2.InterpolationMode.BILINEAR, antialias=True)
    found = Preprocess(48, [0.0] * 3, [1.0] * 3, torch.empty(0), "bilinear")(x)
    assert torch.allclose(found, resize(x), rtol=0, atol=1e-6)


def test_folders_say_their_size_and_labels(tmp_path: Path) -> None:
    """Labels are read from a folder that has them; words fit a zero-shot head as they are."""
    for name, (kind, save, _) in CASES.items():
        found = DESCRIPTIONS[kind](save(tmp_path / name))
        words = name in ("clip", "siglip", "open-clip")
        side = 64 if name == "open-clip" else 48
        assert found == Description(side, None if words else LABELS, words), name


def test_numbered_labels_are_no_labels(tmp_path: Path) -> None:
    """transformers names classes LABEL_0, ... where nobody has named them."""
    folder = own_networks.save_vit(tmp_path, ("LABEL_0", "LABEL_1"))
    assert DESCRIPTIONS["transformers"](folder).labels is None


def test_a_processor_that_does_more_is_refused(tmp_path: Path) -> None:
    """Preprocessing that a resize, a mean and a deviation do not describe is refused by name."""
    folder = own_networks.save_vit(tmp_path)
    processor = transformers.EfficientNetImageProcessor(size={"height": 48, "width": 48})
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"EfficientNetImageProcessor.* does more than resize"):
        CLASSIFIERS["transformers"](folder, LABELS, TEMPLATE, CPU, torch.float32, Torch(), None)


def test_a_long_prompt_is_refused(tmp_path: Path) -> None:
    """A prompt that the text tower would cut is refused, with its length and the limit."""
    folder = own_networks.save_clip(tmp_path)
    words = ("cat", "x" * 50)
    with pytest.raises(ValueError, match=r"has 6\d tokens; the limit is 40"):
        CLASSIFIERS["transformers"](folder, words, TEMPLATE, CPU, torch.float32, Torch(), None)


def test_an_onnx_file_for_single_images_is_run_row_by_row(tmp_path: Path) -> None:
    """A file exported for a batch of one gives the same logits as one for any batch."""
    x = torch.rand(3, 3, 48, 48)
    logits = [
        CLASSIFIERS["onnx"](
            own_networks.save_onnx(tmp_path / str(batch), batch),
            LABELS, TEMPLATE, CPU, torch.float32, Torch(), None,
        )(x)
        for batch in (None, 1)
    ]  # fmt: skip
    assert torch.allclose(*logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 0}, "size is 0; it must be 1 to 4096 pixels"),
        ({"mean": [0.5]}, r"mean is \[0.5\]; it must be 3 numbers"),
        ({"std": [1, 1, 0]}, r"std is \[1, 1, 0\]; it must be 3 numbers"),
        (
            {"interpolation": "nearest"},
            "interpolation is 'nearest'; it must be bicubic or bilinear",
        ),
        ({"labels": "cat"}, "labels is 'cat'; it must be a list of strings"),
        ({"scale": 255}, r"unknown fields \['scale'\]"),
        ({"size": 32}, r"must take float32 images \(B,3,32,32\)"),
    ],
)
def test_a_wrong_onnx_description_names_the_field(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The JSON beside an ONNX file is refused with field, value and limit."""
    folder = own_networks.save_onnx(tmp_path)
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match=reason):
        CLASSIFIERS["onnx"](folder, LABELS, TEMPLATE, CPU, torch.float32, Torch(), None)


def test_a_cut_onnx_file_is_refused(tmp_path: Path) -> None:
    """A file that was cut short is refused by its path."""
    folder = own_networks.save_onnx(tmp_path)
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.onnx: onnxruntime cannot load it"):
        CLASSIFIERS["onnx"](folder, LABELS, TEMPLATE, CPU, torch.float32, Torch(), None)


def test_written_onnx_equals_torch(tmp_path: Path) -> None:
    """The tests' own ONNX file computes what the torch network does that it was written from."""
    network = onnx_files.network(3)
    onnx_files.save(tmp_path / "model.onnx", network, 48)
    x = torch.rand(2, 3, 48, 48)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        expected = network(x)
    assert torch.allclose(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
