"""Prompts to text states, against the tiny pipeline's own CLIP text encoder."""

from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from support.runs import PARITY
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from diffusers_lipreg.dreambooth.prompts import PromptEncoder, tokenize

INSTANCE, CLASS = "a photo of sks dog", "a photo of dog"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PARITY / "pipeline", subfolder="tokenizer")


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(PARITY / "pipeline", subfolder="text_encoder").requires_grad_(False)


def states(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, prompts: list[str], use_mask: bool = False
) -> Tensor:
    """What the text encoder makes of a batch of prompts."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if use_mask else None)[0]


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_rows_are_those_of_the_prompts(tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel) -> None:
    prompts = [INSTANCE, INSTANCE, CLASS, INSTANCE]
    expected = states(tokenizer, text_encoder, prompts)
    assert not torch.equal(expected[1], expected[2])
    equal(PromptEncoder(tokenizer, None, use_mask=False).encode(text_encoder, prompts), expected)


@pytest.mark.parametrize("use_mask", [False, True])
def test_the_mask_is_used_only_when_asked(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel, use_mask: bool
) -> None:
    expected, other = (states(tokenizer, text_encoder, [INSTANCE], mask) for mask in (use_mask, not use_mask))
    assert not torch.equal(expected, other)
    prompts = PromptEncoder(tokenizer, None, use_mask)
    equal(prompts.encode(text_encoder, [INSTANCE]), expected)
    equal(prompts.precompute(text_encoder, torch.device("cpu"), [[INSTANCE]])([INSTANCE]), expected)


def test_precomputed_states_are_those_of_the_batch_they_were_encoded_in(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel
) -> None:
    """To the last bit, row by row; other sizes take their rows from it, again and again where they need more."""
    prompts = PromptEncoder(tokenizer, None, use_mask=False)
    batch = [INSTANCE, INSTANCE, CLASS, CLASS]
    expected = prompts.encode(text_encoder, batch)
    states_of = prompts.precompute(text_encoder, torch.device("cpu"), [batch])
    equal(states_of(batch), expected)
    equal(states_of([INSTANCE, CLASS]), expected[[0, 2]])
    equal(states_of([INSTANCE] * 3 + [CLASS] * 3), expected[[0, 1, 0, 2, 3, 2]])


def test_precomputed_states_outlive_the_encoder(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel
) -> None:
    passing = deepcopy(text_encoder).requires_grad_(True)
    prompts = PromptEncoder(tokenizer, None, use_mask=False)
    states_of = prompts.precompute(passing, torch.device("cpu"), [[INSTANCE], [CLASS]])
    expected = [states(tokenizer, text_encoder, [prompt]) for prompt in (CLASS, INSTANCE)]
    with torch.no_grad():
        for parameter in passing.parameters():
            parameter.zero_()
    equal(states_of([CLASS, INSTANCE]), torch.cat(expected))
    assert not states_of([INSTANCE]).requires_grad


def test_a_trained_encoder_gets_gradients_from_every_row(
    tokenizer: PreTrainedTokenizerBase, text_encoder: CLIPTextModel
) -> None:
    trained = deepcopy(text_encoder).requires_grad_(True)
    encoded = PromptEncoder(tokenizer, None, use_mask=False).encode(trained, [INSTANCE, CLASS])
    for row in encoded:
        trained.zero_grad()
        row.square().sum().backward(retain_graph=True)
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained.parameters() if parameter.ndim == 2)


@pytest.mark.parametrize(("max_length", "length"), [(None, 77), (4, 4), (9, 9)])
@pytest.mark.usefixtures("fresh_accelerate")
def test_prompts_are_padded_or_cut(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    Accelerator(cpu=True)  # which logs need
    ids, mask = tokenize(tokenizer, CLASS, max_length, set())
    alone = tokenizer(CLASS).input_ids
    assert 4 < len(alone) < 9
    assert ids.shape == mask.shape == (1, length)
    if length == 4:
        assert ids[0].tolist() == [*alone[:3], tokenizer.eos_token_id]
    else:
        assert ids[0].tolist() == alone + [tokenizer.pad_token_id] * (length - len(alone))
    assert mask.sum() == min(length, len(alone))
    assert ("is cut: 'a photo of dog'" in caplog.text) == (length == 4)


@pytest.mark.usefixtures("fresh_accelerate")
def test_of_many_prompts_that_are_cut_three_are_named(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    Accelerator(cpu=True)
    prompts = PromptEncoder(tokenizer, 4, use_mask=False)
    for number in range(50):
        prompts.tokenize_one(f"a photo of dog {number}")
    assert len(caplog.messages) == 4
