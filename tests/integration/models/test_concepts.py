"""Similarities to concepts against the libraries' own, and the picture of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel

from models.bundle import DEFAULT_TASK, Base, Bundle, read_bundle
from models.classifiers.transformers import text_features, tokenized
from models.denoisers.base import NoDenoiser
from models.evaluation.concepts import ConceptHead, Reading, ranked
from models.evaluation.pictures.concepts import difference, draw_concepts
from models.noise import discrete_gaussian
from tests.support import miniatures, own_networks

CONCEPTS = ("hoof", "sail", "barn")
KEY = b"concepts of a test, 32 bytes ..."
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)


def task(kind: str, folder: Path) -> Bundle:
    """A task whose head is the network in this folder."""
    head = Base.of(kind, str(folder), ["*"])
    return replace(read_bundle(DEFAULT_TASK), classifier=head, template="a {}.", files={})


def head(kind: str, folder: Path, prompts: dict[str, str]) -> ConceptHead:
    return ConceptHead(task(kind, folder), CONCEPTS, prompts, folder.parent)


def test_concepts_are_those_of_open_clip_by_hand(tmp_path: Path) -> None:
    """Cosines are open_clip's, of the words in the template; shares are its softmax, in order."""
    folder = miniatures.save_open_clip(tmp_path / "clip")
    found = head("open-clip", folder, {"barn": "house"}).undefended(PIXELS)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    described = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    mean, std = (torch.tensor(described[name])[:, None, None] for name in ("mean", "std"))
    words = open_clip.get_tokenizer(f"local-dir:{folder}")(["a hoof.", "a sail.", "a house."])
    x = torch.tensor(PIXELS)[None] / 255
    with torch.no_grad():
        resized = F.interpolate(x, size=(64, 64), mode="bicubic", antialias=True)
        image = model.encode_image((resized - mean) / std, normalize=True)
        cosines = (image @ model.encode_text(words, normalize=True).T)[0]
        shares = (model.logit_scale.exp() * cosines).softmax(0)
    assert np.allclose(found.cosines, cosines, atol=1e-5)
    assert np.allclose(found.shares, shares, atol=1e-4)
    assert ranked(found.shares, 3) == cosines.argsort(descending=True).tolist()


@pytest.mark.parametrize("save", [own_networks.save_clip, own_networks.save_siglip])
def test_cosines_have_neither_scale_nor_bias(save: Callable[[Path], Path], tmp_path: Path) -> None:
    """They are those of the text features of transformers with the image's features."""
    folder = save(tmp_path / "clip")
    ours = head("transformers", folder, {})
    model: Any = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        text = text_features(model, tokenized(folder, [f"a {word}." for word in CONCEPTS]))
        x = torch.tensor(PIXELS)[None] / 255
        features = ours._classifier._network(ours._classifier._preprocess(x))  # type: ignore[attr-defined]
        cosines = (F.normalize(features, dim=-1) @ text.T)[0]
    assert np.allclose(ours.undefended(PIXELS).cosines, cosines, atol=1e-5)
    assert ours.scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_defended_concepts_are_means_over_rows(tmp_path: Path) -> None:
    """Each row of the key counts once, in whatever batches; another key has other rows."""
    ours = head("open-clip", miniatures.save_open_clip(tmp_path / "clip"), {})
    found = ours.defended(PIXELS, NoDenoiser(), 0.25, 11, KEY)
    x = torch.tensor(PIXELS) / 255
    noise = discrete_gaussian(KEY, 0, 11, PIXELS.shape, 0.25, x.device) / 255
    with torch.no_grad():
        logits = torch.cat([ours._classifier((x + row)[None].float()) for row in noise]).double()
    assert np.allclose(found.shares, logits.softmax(1).mean(0), atol=1e-5)
    assert np.allclose(found.cosines, logits.mean(0) / ours.scale, atol=1e-5)
    other = ours.defended(PIXELS, NoDenoiser(), 0.25, 11, KEY[::-1])
    assert not np.array_equal(found.shares, other.shares)


def test_a_prompt_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    """The message has the prompt, its tokens and the most that the text tower reads."""
    folder = miniatures.save_open_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"'a x+\.' has 205 tokens; at most \d+$"):
        head("open-clip", folder, {"barn": "x" * 201})


def test_the_largest_shares_come_first() -> None:
    """Equal ones are in the order of the list."""
    assert ranked(np.array([0.2, 0.5, 0.2, 0.1]), 3) == [1, 0, 2]


def test_a_difference_is_enlarged_as_far_as_it_fits() -> None:
    """Gray is no change. No change at all and the largest one are drawn, too."""
    original = np.full((3, 1, 1), 100, np.uint8)
    attacked = original + np.array([[[0]], [[2]], [[5]]], np.uint8)
    picture, gain = difference(original, attacked)
    assert gain == 25
    assert picture.ravel().tolist() == [127, 177, 252]
    assert difference(original, original)[0].ravel().tolist() == [127] * 3
    black, white = np.zeros((3, 1, 1), np.uint8), np.full((3, 1, 1), 255, np.uint8)
    assert difference(white, black)[0].ravel().tolist() == [0] * 3
    assert difference(black, white)[0].ravel().tolist() == [255] * 3


def drawn(folder: Path) -> list[Path]:
    """A picture of random images and shares, with a concept that is no formula."""
    shares = np.random.default_rng(1).dirichlet(np.ones(3), 4)
    readings = [Reading(row, row) for row in shares]
    by_image = [dict(zip(("original", "attacked"), pair, strict=True))
                for pair in (readings[:2], readings[2:])]  # fmt: skip
    return draw_concepts(
        {"original": PIXELS, "attacked": PIXELS // 2},
        dict(zip(("undefended", "defended"), by_image, strict=True)),
        ("a $ sign", "two $x^$", "barn"),
        {"undefended": [0, 1, 2], "defended": [2, 0]},
        folder / "concepts",
    )


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    """PNG and SVG, byte for byte, with every word as it is given."""
    png, svg = drawn(tmp_path)
    pixels = np.asarray(Image.open(png).convert("L"))
    assert min(pixels.shape) > 500
    assert pixels.std() > 5
    assert "two $x^$" in svg.read_text()
    before = [png.read_bytes(), svg.read_bytes()]
    assert [file.read_bytes() for file in drawn(tmp_path)] == before
    assert png.stat().st_mode & 0o777 == 0o644


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written takes its place or stays beside it."""
    png, svg = drawn(tmp_path)
    before = png.read_bytes()

    def full(figure: object, file: Path, **options: object) -> None:
        file.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        drawn(tmp_path)
    assert png.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([png, svg])
