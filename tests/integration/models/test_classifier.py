"""Classifiers against their own libraries, and their shared contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from models.classifiers.open_clip import load_open_clip
from models.classifiers.registry import CLASSIFIERS
from models.classifiers.timm import load_timm
from models.runtime import Torch
from tests.support import miniatures, own_networks

CPU = torch.device("cpu")
TEMPLATE = "a photo of a {}."


def test_open_clip_equals_zero_shot_by_hand(tmp_path: Path) -> None:
    """Logits are open_clip's cosine similarities times its scale, after its preprocessing."""
    folder = miniatures.save_open_clip(tmp_path)
    x = torch.rand(3, 3, 32, 32)
    ours = load_open_clip(folder, miniatures.LABELS, TEMPLATE, CPU, torch.float32, Torch())(x)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    described = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    mean, std = (torch.tensor(described[name])[:, None, None] for name in ("mean", "std"))
    words = open_clip.get_tokenizer(f"local-dir:{folder}")(
        [TEMPLATE.format(label) for label in miniatures.LABELS]
    )
    with torch.no_grad():
        resized = F.interpolate(x, size=(64, 64), mode="bicubic", antialias=True)
        image = model.encode_image((resized - mean) / std, normalize=True)
        text = model.encode_text(words, normalize=True)
    assert torch.allclose(ours, model.logit_scale.exp() * image @ text.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["onnx", "timm", "transformers"])
def test_labels_must_be_as_many_as_classes(kind: str, tmp_path: Path) -> None:
    """A head with classes of its own is not served with fewer labels."""
    folder = miniatures.CLASSIFIER_FOLDERS[kind](tmp_path)
    with pytest.raises(ValueError, match="the network has 3 classes, and there are 2 labels"):
        CLASSIFIERS[kind](folder, ("cat", "dog"), TEMPLATE, CPU, torch.float32, Torch())


def test_timm_uses_its_own_normalisation(tmp_path: Path) -> None:
    """Logits are the timm network's on its own resolution, mean and deviation."""
    classifier = load_timm(
        miniatures.save_timm(tmp_path), miniatures.LABELS, TEMPLATE, CPU, torch.float32, Torch()
    )
    x = torch.rand(2, 3, 48, 48)
    scaled = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    with torch.no_grad():
        assert torch.allclose(classifier(x), classifier._model(scaled), atol=1e-5)


HEADS = {
    **{kind: (kind, save) for kind, save in miniatures.CLASSIFIER_FOLDERS.items()},
    "transformers-clip": ("transformers", own_networks.save_clip),
    "transformers-siglip": ("transformers", own_networks.save_siglip),
}


@pytest.mark.parametrize(("kind", "save"), HEADS.values(), ids=HEADS)
def test_classifier_contract(kind: str, save: Callable[[Path], Path], tmp_path: Path) -> None:
    """Every classifier gives float32 logits a row that depend on that row alone."""
    folder = save(tmp_path)
    classifier = CLASSIFIERS[kind](folder, miniatures.LABELS, TEMPLATE, CPU, torch.float32, Torch())
    x = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        together, alone = classifier(x), classifier(x[:1])
    assert classifier.labels == miniatures.LABELS
    assert together.shape == (4, 3)
    assert together.dtype == torch.float32
    assert torch.allclose(together[:1], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1])
