"""Prompts to text-encoder states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)
TextStates = Callable[[int], Tensor]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of one prompt, both (1, max_length), padded or cut to the length."""
    length = len(tokenizer(prompt, verbose=False).input_ids)
    if length > (limit := max_length or tokenizer.model_max_length):
        logger.warning_once(f"The text encoder reads {limit} tokens; this prompt has {length} and is cut: {prompt!r}.")
    tokens = tokenizer(
        prompt,
        truncation=True,
        padding="max_length",
        max_length=limit,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def encode(text_encoder: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states (B, length, width) of token ids (B, length); without a mask the padding is attended to, too."""
    device = next(text_encoder.parameters()).device
    return text_encoder(ids.to(device), attention_mask=None if mask is None else mask.to(device))[0]


def read_once(tokenizers: Sequence[PreTrainedTokenizerBase]) -> Callable[[str], list[Tensor]]:
    """Token ids (1, length) of a prompt by each of the tokenizers, which see every prompt only once."""
    return cache(lambda prompt: [tokenize(tokenizer, prompt, None)[0] for tokenizer in tokenizers])


def encode_sdxl(
    tokens: Callable[[str], list[Tensor]], text_encoders: Sequence[nn.Module], prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """States (B, length, sum of widths) and pooled states (B, width) of prompts, as SDXL's UNet takes them.

    The states are those before the last layer of each encoder, side by side; pooled are those of the second encoder.
    `tokens` is what `read_once` gave.
    """
    states = []
    for ids, text_encoder in zip(zip(*map(tokens, prompts), strict=True), text_encoders, strict=True):
        device = next(text_encoder.parameters()).device
        output = text_encoder(torch.cat(ids).to(device), output_hidden_states=True, return_dict=False)
        pooled = output[0]
        states.append(output[-1][-2])
    return torch.cat(states, dim=-1), pooled


class Prompts:
    """The prompts of a run as text states of a batch, in blocks as its pixels are: instance first, then class."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int | None, use_mask: bool
    ) -> None:
        self.tokens = [tokenize(tokenizer, prompt, max_length) for prompt in prompts]
        self.use_mask = use_mask

    def encode(self, text_encoder: nn.Module, batch_size: int) -> Tensor:
        """States (batch_size, length, width), with a gradient where the encoder is trained."""
        rows = batch_size // len(self.tokens)
        ids, mask = (torch.cat([tokens.repeat(rows, 1) for tokens in kind]) for kind in zip(*self.tokens, strict=True))
        return encode(text_encoder, ids, mask if self.use_mask else None)

    @torch.no_grad()
    def precompute(self, text_encoder: nn.Module, device: torch.device, batch_size: int | None = None) -> TextStates:
        """States by batch size, from one pass; the encoder is not needed any more.

        The pass is that of a batch of `batch_size`, for matrices of another shape may round otherwise, or by default
        one of each prompt alone.
        """
        if batch_size is None:
            blocks = [encode(text_encoder, ids, mask if self.use_mask else None) for ids, mask in self.tokens]
        else:
            blocks = list(self.encode(text_encoder, batch_size).chunk(len(self.tokens)))
        blocks = [block.to(device) for block in blocks]

        def states(size: int) -> Tensor:
            rows = torch.arange(size // len(blocks), device=device)
            return torch.cat([block[rows % len(block)] for block in blocks])

        return cache(states)
