"""Contact sheets: the pictures from which a task was made, a row for each label."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from models.adaptation.plan import REFERENCES
from service.tasks.store import Store
from service.tasks.task import Task

_TILE = 64
_MAX_HEIGHT = 32_000
"""Maximum height in pixels; a task of many labels gets smaller pictures."""
_MAX_SHOTS = 16
_TEXT_WIDTH = 220
_GAP = 4


def contact_sheet(store: Store, task: Task, out: Path) -> int:
    """Write a PNG with one row for each label: its text, then its pictures.

    Returns the number of pictures. Nothing is written for a task without pictures.
    """
    folder = store.jobs / task.id / REFERENCES
    shots = min(int(task.settings.get("shots", 0)), _MAX_SHOTS)
    tile = max(16, min(_TILE, _MAX_HEIGHT // len(task.labels) - _GAP))
    row = tile + _GAP
    sheet = Image.new(
        "RGB", (_TEXT_WIDTH + shots * row + _GAP, len(task.labels) * row + _GAP), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=min(14, tile - 2))
    placed = 0
    for index, label in enumerate(task.labels):
        top = _GAP + index * row
        draw.text((_GAP, top + tile / 2), _fitting(label, font), "black", font, anchor="lm")
        for shot in range(shots):
            path = folder / f"{index}-{shot}.png"
            if path.is_file():
                with Image.open(path) as picture:
                    small = picture.convert("RGB").resize((tile, tile), Image.Resampling.BICUBIC)
                sheet.paste(small, (_TEXT_WIDTH + shot * row, top))
                placed += 1
    if placed:
        sheet.save(out, "PNG")
    return placed


def _fitting(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The label, cut to the width of its column."""
    if font.getlength(label) <= _TEXT_WIDTH - 2 * _GAP:
        return label
    while font.getlength(f"{label}…") > _TEXT_WIDTH - 2 * _GAP:
        label = label[:-1]
    return f"{label}…"
