"""Pictures: what is drawn is what was computed."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.certificates.rules import certify
from models.denoisers.base import NoDenoiser
from models.evaluation.pictures.demo import shown
from models.evaluation.pictures.sheets import Shown, contact_sheet, noisy_and_denoised, picture_grid
from models.noise import total_variation
from models.rows import Rows
from models.runtime import numerics_of
from models.smoothing import SmoothedModel

CPU = torch.device("cpu")


class Constant:
    """Names everything alike."""

    labels = ("a", "b")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(x), -1)


def test_the_shown_row_is_the_noisy_row_clipped() -> None:
    """The picture is the row that the network sees, confined to what a screen can show."""
    model = SmoothedModel(NoDenoiser(), Constant(), numerics_of(CPU, torch.float32, 4), CPU)
    rows = Rows(np.full((3, 8, 8), 128, np.uint8), b"plots/tests/noise".ljust(32), 5, 6, 0.5)
    noisy, denoised = noisy_and_denoised(model, rows)
    wanted = model.noisy([rows])[0][0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.array_equal(noisy, wanted)
    assert np.array_equal(denoised, wanted)
    assert wanted.std() > 0


def test_the_demo_shows_what_was_certified() -> None:
    """Counts, label and radius are those of CERTIFY, and the noisy picture is its first row."""
    model = SmoothedModel(NoDenoiser(), Constant(), numerics_of(CPU, torch.float32, 64), CPU)
    image = np.full((8, 8, 3), 128, np.uint8)
    one = shown(model, image, "b", 0.5, b"plots!")
    assert one.counts == {"a": 1000, "b": 0}
    assert (one.label, one.truth) == ("a", "b")
    exact = certify(
        [100, 0],
        [1000, 0],
        0.5,
        0.001,
        method="cohen",
        total_variation=total_variation(0.5, (3, 8, 8)),
    )
    assert one.certificate.radius == exact.radius
    key = sha256(b"estimationplots!").digest()
    rows = Rows(image.transpose(2, 0, 1).copy(), key, 0, 1, 0.5)
    assert np.array_equal(one.noisy, noisy_and_denoised(model, rows)[0])


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    """Every picture is a PNG with something in it, abstentions and wrong labels included."""
    picture = np.random.default_rng(0).random((8, 8, 3))
    sure, unsure = (certify([10, 0], counts, 0.25, 0.001) for counts in ([100, 0], [50, 50]))
    sheet = [
        Shown("a", picture, picture, picture, {"a": 100, "b": 0}, "a", sure),
        Shown("b", picture, picture, picture, {"a": 100, "b": 0}, "a", sure),
        Shown("b", picture, picture, picture, {"a": 50, "b": 50}, None, unsure),
    ]
    contact_sheet(sheet, "title", tmp_path / "sheet.png")
    picture_grid([[picture] * 2] * 3, ["x", "y", "z"], ["1", "2"], tmp_path / "grid.png")
    for name in ("sheet", "grid"):
        drawn = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(drawn.shape) > 50
        assert drawn.std() > 5
