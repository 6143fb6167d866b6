"""Sources of fetched networks: their hub repositories, and which files are needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FP16 = "fp16"
"""The preferred variant of a network's weights."""
SOURCE = "source.json"
"""A fetched folder's file with its origin."""
TEXT_ENCODER, UNET, OPEN_CLIP = "model", "diffusion_pytorch_model", "open_clip_model"
"""File names of the weights of a kind of network, without variant and suffix."""

DEEPFLOYD_LICENCE = (
    "DeepFloyd IF License Agreement: the weights are for non-commercial research only"
)
CLIP_LICENCE = "CLIP ViT-B/32: MIT (OpenAI)"


@dataclass(frozen=True, slots=True)
class Network:
    """A network within a source: its folder ("" for the source's own), configuration and weights'
    name.
    """

    folder: str
    config: str
    weights: str

    def chosen(self, names: Iterable[str]) -> tuple[str | None, list[str]]:
        """The variant to take and the files of its weights, indices included.

        `names` are those in the network's folder. Returns (None, []) where there are no weights.
        """
        found: dict[str | None, list[str]] = {}
        shape = re.compile(
            rf"{self.weights}(?:\.(?P<one>\w+))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors"
            rf"|{self.weights}\.safetensors\.index(?:\.(?P<many>\w+))?\.json"
        )
        for name in names:
            if match := shape.fullmatch(name):
                found.setdefault(match["one"] or match["many"], []).append(name)
        for variant in (FP16, None):
            if variant in found:
                return variant, sorted(found[variant])
        return None, []


@dataclass(frozen=True, slots=True)
class Source:
    """A hub repository, its default revision, its networks and patterns of their small files."""

    repository: str
    revision: str
    licence: str
    networks: tuple[Network, ...]
    others: tuple[str, ...] = ()

    def wanted(self, names: Iterable[str]) -> list[str]:
        """The files of a repository to fetch: never a pickle, and one variant of the weights."""
        listed = list(names)
        chosen = [name for name in listed if any(fnmatchcase(name, p) for p in self.others)]
        for network in self.networks:
            prefix = f"{network.folder}/" if network.folder else ""
            inside = [n.removeprefix(prefix) for n in listed if n.startswith(prefix)]
            own = [name for name in inside if name == network.config]
            chosen += [prefix + name for name in [*own, *network.chosen(inside)[1]]]
        return sorted(chosen)


_TOKENIZER = ("tokenizer/*.json", "tokenizer/spiece.model")
_UNET = Network("unet", "config.json", UNET)

SOURCES: Mapping[str, Source] = {
    "if-ii-l/stage1": Source(
        "DeepFloyd/IF-I-XL-v1.0",
        "c03d510e9b75bce9f9db5bb85148c1402ad7e694",
        DEEPFLOYD_LICENCE,
        (Network("text_encoder", "config.json", TEXT_ENCODER), _UNET),
        ("model_index.json", "scheduler/*.json", *_TOKENIZER),
    ),
    "if-ii-l/stage2": Source(
        "DeepFloyd/IF-II-L-v1.0",
        "609476ce702b2d94aff7d1f944dcc54d4f972901",
        DEEPFLOYD_LICENCE,
        (_UNET,),
        ("model_index.json", "scheduler/*.json", "image_noising_scheduler/*.json"),
    ),
    "clip-vit-b-32": Source(
        "timm/vit_base_patch32_clip_224.openai",
        "ab5b8ef490e86faa07d3523926b842c765de1de5",
        CLIP_LICENCE,
        (Network("", "open_clip_config.json", OPEN_CLIP),),
    ),
}
"""Folders below the models directory, each with the origin of its files."""

FETCHABLE: Mapping[str, tuple[str, ...]] = {"if-ii-l": tuple(SOURCES)}
"""Arguments of `vouchsafe models fetch`, with the folders they fill."""


def fetch_command(folder: str) -> str:
    """The command that fills a folder of SOURCES."""
    name = next(name for name, folders in FETCHABLE.items() if folder in folders)
    return f"vouchsafe models fetch {name}"


def origin(folder: Path) -> str | None:
    """Repository and commit of a fetched folder, as `repository@commit`; None for a manual copy."""
    try:
        source = json.loads((folder / SOURCE).read_text())
        return f"{source['repository']}@{source['commit']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
