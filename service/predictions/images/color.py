"""Converts the colors of an embedded ICC profile to sRGB."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20
"""More than the profiles of printers have."""

_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
_CLASSES = {"scnr", "mntr", "prtr", "spac"}
_STEPS = np.linspace(0, 255, 18).round().astype(np.uint8)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image (gray, RGB or CMYK, 8 bits) as RGB, from its profile's colors to those of sRGB.

    The intent is relative colorimetric, without black point compensation. Ignored are sRGB
    profiles, and profiles that are broken, too large or of another color space than the image.
    """
    transform = _transform(image.mode, profile) if profile else None
    if transform is None:
        return image.convert("RGB")
    return transform.apply(image)


def _transform(mode: str, profile: bytes) -> ImageCms.ImageCmsTransform | None:
    # A pipeline (mpet) may have any number of elements, so it could take any time.
    if len(profile) > MAX_PROFILE_BYTES or b"mpet" in profile:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        space, kind = opened.profile.xcolor_space, opened.profile.device_class
        if space != _SPACES.get(mode) or kind not in _CLASSES:
            return None
        transform = ImageCms.ImageCmsTransform(
            opened,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        return None if _keeps_colors(transform, mode) else transform
    except Exception:
        return None  # Of any class: an unreadable profile does not spoil readable pixels.


def _keeps_colors(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether no color moves by more than a level: sRGB, rounded by its writer."""
    if mode == "CMYK":
        return False
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        cube = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), -1).reshape(1, -1, 3)
        grays = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
        probe = Image.fromarray(np.concatenate([cube, grays], axis=1))
    moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return int(np.abs(moved).max()) <= 1
