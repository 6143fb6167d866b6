"""Every kind of denoiser, with its loader."""

from __future__ import annotations

from models import kinds
from models.denoisers.base import Loader, load_none
from models.denoisers.ffdnet import load_ffdnet
from models.denoisers.super_resolution import load_super_resolution
from models.denoisers.unconditional import load_unconditional

DENOISERS: dict[str, Loader] = {
    "super-resolution": load_super_resolution,
    "unconditional": load_unconditional,
    "ffdnet": load_ffdnet,
    "none": load_none,
}
"""The place to add a denoiser: a module beside this one, and one line here and in `kinds`."""


def denoiser_loader(kind: str) -> Loader:
    """The loader of a kind, an installed package's included; raises KeyError for an unknown one."""
    if kind in DENOISERS:
        return DENOISERS[kind]
    loader: Loader = kinds.installed(kinds.DENOISER_GROUP)[kind].load()
    return loader
