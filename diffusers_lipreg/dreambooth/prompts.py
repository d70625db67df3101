"""Tokenize each prompt once, and encode it to prompt_embeds, once where the text encoders are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import cycle

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int | None, cut: set[str]
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of one prompt, both (1, max_length), padded or cut to the length.

    A prompt that is cut joins the set `cut`. The first three are named in the log.
    """
    length = len(tokenizer(prompt, verbose=False).input_ids)
    if length > (limit := max_length or tokenizer.model_max_length) and prompt not in cut:
        cut.add(prompt)
        if len(cut) <= 3:
            logger.warning(f"The text encoder reads {limit} tokens; this prompt has {length} and is cut: {prompt!r}.")
        elif len(cut) == 4:
            logger.warning("There are more prompts that are too long, and cut.")
    tokens = tokenizer(prompt, truncation=True, padding="max_length", max_length=limit, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


class PromptEncoder:
    """Encode prompts with the text encoder of Stable Diffusion 1, 2 or IF.

    Args:
        max_length: Tokens that a prompt is padded or cut to; `None` for the tokenizer's own limit.
        use_mask: Hide the padding from the text encoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, use_mask: bool) -> None:
        cut: set[str] = set()
        self.tokenize_one = cache(lambda prompt: tokenize(tokenizer, prompt, max_length, cut))
        self.use_mask = use_mask

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention masks, both (len(prompts), length)."""
        ids, masks = zip(*map(self.tokenize_one, prompts), strict=True)
        return torch.cat(ids), torch.cat(masks)

    def encode(self, text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (len(prompts), length, width), with a gradient where the encoder is trained."""
        ids, mask = self.tokenize(prompts)
        device = next(text_encoder.parameters()).device
        return text_encoder(ids.to(device), attention_mask=mask.to(device) if self.use_mask else None)[0]

    @torch.no_grad()
    def precompute(
        self, text_encoder: nn.Module, device: torch.device, batches: Iterable[Sequence[str]]
    ) -> Callable[[Sequence[str]], Tensor]:
        """Encode each batch of prompts once; return a lookup from prompts to their embeddings on `device`.

        A prompt that a batch holds several times has several embeddings, which are used in turn: an encoder may round
        each row of a batch differently.
        """
        known: dict[str, list[Tensor]] = {}
        for batch in batches:
            for prompt, embeds in zip(batch, self.encode(text_encoder, batch).to(device), strict=True):
                known.setdefault(prompt, []).append(embeds)

        def look_up(prompts: Sequence[str]) -> Tensor:
            turns = {prompt: cycle(known[prompt]) for prompt in prompts}
            return torch.stack([next(turns[prompt]) for prompt in prompts])

        return look_up


def sdxl_tokenizer(tokenizers: Sequence[PreTrainedTokenizerBase]) -> Callable[[Sequence[str]], list[Tensor]]:
    """Return a function from B prompts to the token ids (B, length) of each tokenizer; it tokenizes no prompt twice."""
    cut: set[str] = set()
    tokenize_one = cache(lambda prompt: [tokenize(tokenizer, prompt, None, cut)[0] for tokenizer in tokenizers])
    return lambda prompts: [torch.cat(ids) for ids in zip(*map(tokenize_one, prompts), strict=True)]


def encode_sdxl(text_encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Encode the token ids (B, length) of each tokenizer with the text encoders of SDXL.

    Returns the embeddings (B, length, width of both) of the last layer but one, and the second encoder's pooled
    embeddings (B, width).
    """
    embeds = []
    for text_encoder, its_ids in zip(text_encoders, ids, strict=True):
        device = next(text_encoder.parameters()).device
        output = text_encoder(its_ids.to(device), output_hidden_states=True, return_dict=False)
        pooled_embeds = output[0]  # that of the second encoder remains, as in the official script
        embeds.append(output[-1][-2])
    return torch.cat(embeds, dim=-1), pooled_embeds
