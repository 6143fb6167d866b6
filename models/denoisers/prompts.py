"""Prompts of text-conditional denoisers, cleaned and encoded as DeepFloyd IF does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.zoo.captions import clean_caption

PROMPT_TOKENS = 77
"""Length that DeepFloyd IF pads every prompt to."""


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """Prompts as DeepFloyd IF reads them (lower case, markup stripped); training uses the same."""
    return [clean_caption(prompt) for prompt in prompts]


def fitting_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The cleaned prompts; raises ValueError for one longer than 77 tokens."""
    cleaned = clean_prompts(prompts)
    for given, prompt in zip(prompts, cleaned, strict=True):
        tokens = len(tokenizer(prompt).input_ids)
        if tokens > PROMPT_TOKENS:
            raise ValueError(f"prompt {given!r} has {tokens} tokens; the limit is {PROMPT_TOKENS}")
    return cleaned


def encode_prompts(tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """States (B,77,D) of a T5 encoder's last layer, the attention mask used (method.md 1.6).

    Raises ValueError for a prompt longer than 77 tokens, which diffusers would truncate silently.
    """
    cleaned = fitting_prompts(tokenizer, prompts)
    encoded = tokenizer(
        cleaned, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt"
    ).to(next(text_encoder.parameters()).device)
    with torch.no_grad():
        states: Tensor = text_encoder(encoded.input_ids, encoded.attention_mask)[0]
    return states
