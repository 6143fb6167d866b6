"""A contact sheet: what a task's labels look like to the denoiser that was adapted to them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from models.adaptation.plan import REFERENCES
from service.tasks.store import Store
from service.tasks.task import Task

_TILE = 64
_TALLEST = 32_000
"""Pixels: a task of many labels gets smaller pictures instead of a taller sheet."""
_MOST_SHOTS = 16
_WORDS = 220
_GAP = 4


def contact_sheet(store: Store, task: Task, out: Path) -> int:
    """Write a PNG with one row a label: its text, then its pictures. Returns how many there are.

    Where the task has no pictures nothing is written.
    """
    folder = store.jobs / task.id / REFERENCES
    shots = min(int(task.settings.get("shots", 0)), _MOST_SHOTS)
    tile = max(16, min(_TILE, _TALLEST // len(task.labels) - _GAP))
    row = tile + _GAP
    sheet = Image.new("RGB", (_WORDS + shots * row + _GAP, len(task.labels) * row + _GAP), "white")
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
                sheet.paste(small, (_WORDS + shot * row, top))
                placed += 1
    if placed:
        sheet.save(out, "PNG")
    return placed


def _fitting(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The label, cut where it would run into the pictures."""
    if font.getlength(label) <= _WORDS - 2 * _GAP:
        return label
    while font.getlength(f"{label}…") > _WORDS - 2 * _GAP:
        label = label[:-1]
    return f"{label}…"
