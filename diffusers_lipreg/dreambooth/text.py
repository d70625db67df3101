"""Prompts to text-encoder states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import cycle

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)
TextStates = Callable[[Sequence[str]], Tensor]  # of a batch, by the prompts of its instance half


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int | None, cut: set[str]
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of one prompt, both (1, max_length), padded or cut to the length.

    Prompts that are cut are put into `cut`; the first three are named in the log, for there may be thousands.
    """
    length = len(tokenizer(prompt, verbose=False).input_ids)
    if length > (limit := max_length or tokenizer.model_max_length) and prompt not in cut:
        cut.add(prompt)
        if len(cut) <= 3:
            logger.warning(f"The text encoder reads {limit} tokens; this prompt has {length} and is cut: {prompt!r}.")
        elif len(cut) == 4:
            logger.warning("There are more prompts that are too long, and cut.")
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
    cut: set[str] = set()
    return cache(lambda prompt: [tokenize(tokenizer, prompt, None, cut)[0] for tokenizer in tokenizers])


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
    """Prompts as text states; each is tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, use_mask: bool) -> None:
        cut: set[str] = set()
        self.tokens = cache(lambda prompt: tokenize(tokenizer, prompt, max_length, cut))
        self.use_mask = use_mask

    def encode(self, text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
        """States (len(prompts), length, width), with a gradient where the encoder is trained."""
        ids, mask = (torch.cat(kind) for kind in zip(*map(self.tokens, prompts), strict=True))
        return encode(text_encoder, ids, mask if self.use_mask else None)

    @torch.no_grad()
    def precompute(
        self, text_encoder: nn.Module, device: torch.device, batches: Iterable[Sequence[str]]
    ) -> Callable[[Sequence[str]], Tensor]:
        """States of prompts from one pass over each of the batches; the encoder is not needed any more.

        A prompt that stands several times in a batch has several states, which it is given in turn: matrices of another
        shape may round otherwise, and so may rows at another place.
        """
        known: dict[str, list[Tensor]] = {}
        for batch in batches:
            for prompt, states in zip(batch, self.encode(text_encoder, batch).to(device), strict=True):
                known.setdefault(prompt, []).append(states)

        def states_of(prompts: Sequence[str]) -> Tensor:
            turns = {prompt: cycle(known[prompt]) for prompt in prompts}
            return torch.stack([next(turns[prompt]) for prompt in prompts])

        return states_of
