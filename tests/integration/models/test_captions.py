"""Captions: cleaned as diffusers cleans them, to the character."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
from bs4.exceptions import ParserRejectedMarkup
from diffusers import IFPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from models.zoo.captions import clean_caption

ODD = (
    "A320", "Airbus A320", "\u732b", "cat", "  ", "\n", "\\n", "&quot;", "&amp;", "&lt;b&gt;",
    "<b>", "</b>", "<person>", "<!--", "-->", "<![CDATA[", "<![&", "<?xml version='1.0'?>",
    "<script>x</script>", "https://a.b/c", "www:/x", "www.foo.com/x", "foo.ru", "@nick", "#123",
    "#12345", "1234567", "10.0.0.1", "3:45 ", "a.png", "jpeg image", "..", '"', "'", "''", "-",
    "_", "\u2014", "\u058a", "x-y-z-a-b", "%20", "%E7%8C%AB", "+", "C++", "page 3",
    "worldwide free shipping", "download free", "click for more", "3x4", "3\u00d74", "3\u04454",
    " : ", " . ", ",", "/", "j2d1a2a", "jc6640vc", "6640vc231", "e\u0301", "\u00e2\u20ac\u2122",
    "\u00c3\u00a9", "\ufb01", "\uff21", "\u00bd", "\u00ab", "\u2019", "(", ")", "[", "]", "{", "}",
    "|", "\\", "*", "\u0130", "\u00df", "\u03a3", "\u200d", "\u3030", "\u30a0", "\u3231", "\u32cb",
    "\u334d", "\u3400", "\u4dc0", "\u31f0", "\u31c0", "&#x732b;", "&nbsp;", "\x00", "\x85",
    "\u2028", "\U0001f600",
)  # fmt: skip
"""What a step of the cleaning looks for, and what comes near it."""

WORDS = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.from_regex(r"[a-z]{0,4}[0-9]{0,7}[-_.,:x'\" /]{0,2}[a-z]{0,4}", fullmatch=True),
)


def theirs(caption: str) -> str | None:
    """diffusers' own reading of a caption, or None where its parser rejects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cleaner = object.__new__(IFPipeline)
            (read,) = IFPipeline._text_preprocessing(cleaner, [caption], clean_caption=True)
        except ParserRejectedMarkup:
            return None
    return str(read)


def ours(caption: str) -> str | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "It looks like you're")  # markup that resembles XML
        try:
            return clean_caption(caption)
        except ValueError:
            return None


@pytest.mark.parametrize("caption", [*ODD, *(f"A photo of {word}." for word in ODD)])
def test_each_step_is_that_of_diffusers(caption: str) -> None:
    """What each step looks for is read as diffusers reads it, by itself and in a sentence."""
    assert ours(caption) == theirs(caption)


def test_pairs_are_read_as_by_diffusers() -> None:
    """Two odd parts side by side, of which one step's result may be the next one's target, too."""
    unequal = [a + b for a, b in product(ODD, ODD) if ours(a + b) != theirs(a + b)]
    assert unequal == []


@settings(max_examples=1_500, deadline=None)
@given(st.lists(WORDS, max_size=8), st.sampled_from(["", " "]))
def test_any_caption_is_read_as_by_diffusers(words: list[str], between: str) -> None:
    """Whatever is put together from such parts and from any letters is read as diffusers does."""
    caption = between.join(words)
    assert ours(caption) == theirs(caption)


def test_known_captions() -> None:
    """Codes and ideographs vanish, markup is stripped, the rest is in lower case."""
    assert clean_caption("This is a photo of a SHIP.") == "this is a photo of a ship."
    assert clean_caption("An Airbus A320") == "an airbus"
    assert clean_caption("\u732b") == ""
    with pytest.raises(ValueError, match="holds markup that cannot be parsed"):
        clean_caption("<![&")
