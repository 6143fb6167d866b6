"""Caption cleaning as in DeepFloyd IF, without torch.

A port of `IFPipeline._text_preprocessing(clean_caption=True)` of diffusers (Copyright The
HuggingFace Team, Apache-2.0), step by step. Its output equals the original's in every character.
"""

from __future__ import annotations

import html
import json
import re
from io import StringIO
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _compiled(*steps: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), instead) for pattern, instead in steps)


_BEFORE_MARKUP = _compiled(
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
)
_AFTER_MARKUP = _compiled(
    (r"@[\w\d]+\b", ""),  # nicknames
    (r"[\u31c0-\u31ef]+", ""),  # CJK strokes
    (r"[\u31f0-\u31ff]+", ""),  # Katakana phonetic extensions
    (r"[\u3200-\u32ff]+", ""),  # enclosed CJK letters and months
    (r"[\u3300-\u33ff]+", ""),  # CJK compatibility
    (r"[\u3400-\u4dbf]+", ""),  # CJK unified ideographs, extension A
    (r"[\u4dc0-\u4dff]+", ""),  # Yijing hexagrams
    (r"[\u4e00-\u9fff]+", ""),  # CJK unified ideographs
    (
        r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030"
        r"\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+",
        "-",
    ),  # dashes
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article ids
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (
        "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~"
        r")(\]\[}{|\\/*]+",
        " ",
    ),  # punctuation
    (r"\s+\.\s+", " "),
)
_JOINER = re.compile(r"[-_]")
_MOST_JOINERS = 3
_AFTER_REPAIR = _compiled(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # 3x4
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """The caption as DeepFloyd IF's text encoder reads it: lower case, markup and codes stripped.

    Raises ValueError for markup that the parser rejects.
    """
    # Twice, as in diffusers: the second pass strips what the first one decodes.
    return _cleaned(_cleaned(caption))


def _cleaned(caption: str) -> str:
    caption = _replaced(unquote_plus(caption).strip().lower(), _BEFORE_MARKUP)
    try:
        # A stream, because BeautifulSoup warns about strings that look like a path.
        caption = BeautifulSoup(StringIO(caption), features="html.parser").text
    except ParserRejectedMarkup as error:
        shown = json.dumps(caption, ensure_ascii=False)
        raise ValueError(f"{shown} holds markup that cannot be parsed") from error
    caption = _replaced(caption, _AFTER_MARKUP)
    if len(_JOINER.findall(caption)) > _MOST_JOINERS:
        caption = _JOINER.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return _replaced(caption, _AFTER_REPAIR).strip()


def _replaced(text: str, steps: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, instead in steps:
        text = pattern.sub(instead, text)
    return text
