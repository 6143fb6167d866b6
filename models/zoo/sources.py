"""Networks that are fetched, not shipped: the hub repositories they come from, and which files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FP16 = "fp16"
"""The variant of a network's weights that is taken where there is one."""
SOURCE = "source.json"
"""A fetched folder's file of where it came from."""
TEXT_ENCODER, UNET, OPEN_CLIP = "model", "diffusion_pytorch_model", "open_clip_model"
"""What the weights of a kind of network are called, without variant and ending."""

DEEPFLOYD_LICENCE = (
    "DeepFloyd IF License Agreement: the weights are for non-commercial research only"
)
CLIP_LICENCE = "CLIP ViT-B/32: MIT (OpenAI)"


@dataclass(frozen=True, slots=True)
class Network:
    """A network within a source: its folder there ("" for the source's own), its configuration,
    and what its weights are called."""

    folder: str
    config: str
    weights: str

    def chosen(self, names: Iterable[str]) -> tuple[str | None, list[str]]:
        """The variant to take and the weights' files of it, indices included, of names in the
        network's folder; (None, []) where there are none."""
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
    """A hub repository, the revision that is fetched unless another is asked for, its networks and
    patterns of the small files they need."""

    repository: str
    revision: str
    licence: str
    networks: tuple[Network, ...]
    others: tuple[str, ...] = ()

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Of a repository's files the ones to fetch: never a pickle, one variant of the weights."""
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
"""Folders below the models directory, each with where its files come from."""

FETCHABLE: Mapping[str, tuple[str, ...]] = {"if-ii-l": tuple(SOURCES)}
"""What `vouchsafe models fetch` takes, with the folders it fills."""


def fetch_command(folder: str) -> str:
    """The command that fills a folder of SOURCES."""
    name = next(name for name, folders in FETCHABLE.items() if folder in folders)
    return f"vouchsafe models fetch {name}"


def origin(folder: Path) -> str | None:
    """Repository and commit of a fetched folder, as `repository@commit`; None for one that was put
    there by hand."""
    try:
        told = json.loads((folder / SOURCE).read_text())
        return f"{told['repository']}@{told['commit']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
