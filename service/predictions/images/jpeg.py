"""JPEG files: the picture's segments, its metadata, and the damage that libjpeg warns of."""

from __future__ import annotations

import re
from dataclasses import dataclass

import simplejpeg
from PIL import Image

from service.errors import InvalidImage

MAX_SCANS = 100
"""A usual progressive JPEG has ten scans; thousands in a few kilobytes take minutes to decode."""

MAX_SEGMENTS = 10_000
"""A file of 10 MB needs 160 segments for its metadata; millions would take seconds to walk."""

MAX_EXTRA_BYTES = 16
"""Bytes that may follow the scan data; damaged data usually leave more."""

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_EXTRA_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0xd9")

_SOS, _EOI = 0xDA, 0xD9
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_SEQUENTIAL = {0xC0, 0xC1, 0xC9}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}
_SKIPPED = {0x01, 0xDC, 0xFE, *range(0xD0, 0xD8), *range(0xE0, 0xF0)}
_STANDALONE = {0x01, *range(0xD0, 0xD8)}

_ALL_BITS = 16
_JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"


@dataclass(frozen=True, slots=True)
class Jpeg:
    """A JPEG up to EOI without metadata, with its EXIF block and its ICC profile apart."""

    file: bytes
    exif: bytes | None
    icc: bytes | None

    format = "JPEG"

    @classmethod
    def parse(cls, data: bytes) -> Jpeg:
        """Walk the markers up to EOI; bytes after EOI are ignored.

        Raises InvalidImage for a segment that is cut off, a missing EOI, a component without a
        scan, and more than MAX_SCANS scans or MAX_SEGMENTS segments.
        """
        return _Walk(data).jpeg()

    def check(self) -> None:
        """Raise InvalidImage for scan data in which libjpeg reports damage.

        libjpeg-turbo decodes the scan data again, at an eighth of the size, with its warnings on.
        Pillow suppresses these warnings, and returns gray or shifted rows.
        """
        try:
            simplejpeg.decode_jpeg(self.file, "GRAY", min_height=1, min_width=1, strict=True)
        except ValueError as error:
            if (extra := _EXTRA_BYTES.search(str(error))) and self._pads(int(extra[1])):
                return
            if "subsampling" in str(error):
                raise InvalidImage(
                    "The JPEG's chroma subsampling is not supported: save it as 4:4:4 or 4:2:0"
                ) from error
            raise InvalidImage(f"The JPEG is truncated or broken: {error}") from error

    def layers(self, image: Image.Image) -> tuple[Image.Image, None]:
        """The decoded image; a JPEG has no transparency."""
        return image, None

    def _pads(self, count: int) -> bool:
        """Whether the last `count` bytes before EOI are padding and not misread scan data."""
        padding = self.file[:-2].rstrip(b"\xff")[-count:]
        return count <= MAX_EXTRA_BYTES or padding == padding[:1] * count


class _Walk:
    """One pass over the markers of a JPEG."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._parts = [b"\xff\xd8"]
        self._exif: bytes | None = None
        self._profile: list[bytes] = []
        self._frame: int | None = None
        self._components: set[int] = set()
        self._missing: dict[int, list[int]] = {}  # by component: missing bits of each coefficient
        self._scans = 0

    def jpeg(self) -> Jpeg:
        position = 2
        for _ in range(MAX_SEGMENTS):
            found = _MARKER.search(self._data, position)
            if found is None:
                raise InvalidImage("The JPEG is truncated: it has no end marker")
            marker, position = found[1][0], found.end()
            if marker == _EOI:
                break
            if marker not in _STANDALONE:
                position = self._segment(marker, position)
        else:
            raise InvalidImage(f"The JPEG has more than {MAX_SEGMENTS} segments")
        if self._frame is None or self._components:
            raise InvalidImage("The JPEG is truncated or broken: a color component has no data")
        if self._frame in _PROGRESSIVE and any(map(any, self._missing.values())):
            raise InvalidImage("The JPEG is truncated: its last scans are missing")
        profile = b"".join(part[14:] for part in sorted(self._profile))
        return Jpeg(b"".join([*self._parts, b"\xff\xd9"]), self._exif, profile or None)

    def _segment(self, marker: int, start: int) -> int:
        """Keep the segment's data; returns the offset at which to search the next marker."""
        length = int.from_bytes(self._data[start : start + 2], "big")
        end = start + length
        if length < 2 or end > len(self._data):
            raise InvalidImage("The JPEG is truncated or broken: a segment is cut off")
        payload = self._data[start + 2 : end]
        if marker == _SOS:
            return self._scan(payload, end)
        if marker in _FRAMES:
            self._start_frame(marker, payload)
            self._keep(marker, payload)
        elif marker in _TABLES or (marker == _APP14 and payload.startswith(b"Adobe")):
            self._keep(marker, payload)
        elif marker == _APP0 and payload.startswith(b"JFIF\0"):
            self._keep(marker, _JFIF)  # Density, thumbnail and version do not matter.
        elif marker == _APP1 and payload.startswith(b"Exif\0") and self._exif is None:
            self._exif = payload
        elif marker == _APP2 and payload.startswith(b"ICC_PROFILE\0"):
            self._profile.append(payload)
        elif marker not in _SKIPPED:
            raise InvalidImage(f"The JPEG is broken: it has an unknown marker 0x{marker:02x}")
        return end

    def _start_frame(self, marker: int, payload: bytes) -> None:
        if self._frame is not None:
            raise InvalidImage("The JPEG is broken: it has two frame headers")
        self._frame = marker
        self._components = set(payload[6::3])
        self._missing = {component: [_ALL_BITS] * 64 for component in self._components}

    def _scan(self, payload: bytes, start: int) -> int:
        self._scans += 1
        if self._scans > MAX_SCANS:
            raise InvalidImage(f"The JPEG has more than {MAX_SCANS} scans")
        if self._frame in _SEQUENTIAL:  # Without effect; some writers leave 0.
            payload = payload[:-3] + b"\x00\x3f\x00"
        if self._frame not in _PROGRESSIVE or payload[-3:-2] == b"\0":
            self._components -= set(payload[1:-3:2])
        for component in set(payload[1:-3:2]) & self._missing.keys():
            first, last, bits = payload[-3:]
            for coefficient in range(first, min(last, 63) + 1):
                self._missing[component][coefficient] = bits & 15
        found = _SCAN_END.search(self._data, start)
        end = len(self._data) if found is None else found.start()
        self._keep(_SOS, payload)
        self._parts.append(self._data[start:end])
        return end

    def _keep(self, marker: int, payload: bytes) -> None:
        self._parts.append(bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload)
