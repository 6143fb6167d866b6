"""WebP files: the picture's metadata. libwebp itself rejects the damage that it detects."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class WebP:
    """A WebP, with its EXIF block and its ICC profile apart."""

    file: bytes
    exif: bytes | None
    icc: bytes | None

    format = "WEBP"

    @classmethod
    def parse(cls, data: bytes) -> WebP:
        """Walk the chunks; the first of each kind counts."""
        chunks: dict[bytes, bytes] = {}
        position = 12
        while position + 8 <= len(data):
            size = int.from_bytes(data[position + 4 : position + 8], "little")
            body = data[position + 8 : position + 8 + size]
            chunks.setdefault(data[position : position + 4], body)
            position += 8 + size + size % 2
        return cls(data, chunks.get(b"EXIF"), chunks.get(b"ICCP"))

    def check(self) -> None:
        """Do nothing: decoding raises for data that are cut off."""

    def layers(self, image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        """The decoded image as RGB, and its alpha channel or None."""
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        return image.convert("RGB"), alpha
