"""The committed tokenizer and chat template: what later strategies rely on, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from thinkserve.train.tokenizer import SPECIAL, VOCABULARY

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENIZER = Tokenizer.from_file(str(MODELS / "arith-small" / "tokenizer.json"))


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


@pytest.fixture(scope="module")
def fast() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODELS / "arith-small")


def rendered(fast: PreTrainedTokenizerFast, *messages: dict[str, Any], **choices: Any) -> str:
    found: str = fast.apply_chat_template(list(messages), tokenize=False, **choices)
    return found


@given(st.text())
def test_any_text_survives_the_round_trip(text: str) -> None:
    """Byte-level: every Unicode text decodes to itself."""
    assert text == TOKENIZER.decode(ids(text), skip_special_tokens=False)


@given(st.integers(0, 10**9))
def test_every_digit_is_a_token(number: int) -> None:
    """A number of n digits is n tokens, wherever it stands."""
    assert len(str(number)) == len(ids(str(number)))
    assert [ids(digit)[0] for digit in str(number)] == ids(f"={number}")[1:]


@pytest.mark.parametrize("text", ["\n\n", *SPECIAL])
def test_blank_lines_and_markers_are_single_tokens(text: str) -> None:
    """Also between words, where steps end."""
    assert 1 == len(ids(text))
    assert ids(text)[0] in ids(f"12.{text}Wait")


@pytest.mark.parametrize("word", ["Wait", "Hmm", "Alternatively", "Yes", "No", "Ann", " ball", " answer"])
def test_the_words_that_strategies_look_at_are_single_tokens(word: str) -> None:
    """Reflections after a blank line and verdicts are one token each."""
    assert 1 == len(ids(word))


def test_both_models_share_the_tokenizer() -> None:
    """The same file, of the documented size."""
    small, large = ((MODELS / name / "tokenizer.json").read_bytes() for name in ("arith-small", "arith-large"))
    assert small == large
    assert VOCABULARY == TOKENIZER.get_vocab_size()


def test_a_generation_prompt_opens_the_thinking(fast: PreTrainedTokenizerFast) -> None:
    """The model takes over inside the think block; a system message is optional."""
    user = {"role": "user", "content": "Q"}
    assert "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n" == rendered(
        fast, user, add_generation_prompt=True
    )
    assert rendered(fast, {"role": "system", "content": "Be brief."}, user).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    )


def test_without_thinking_the_block_is_closed_at_once(fast: PreTrainedTokenizerFast) -> None:
    """enable_thinking=false gives an empty block."""
    text = rendered(fast, {"role": "user", "content": "Q"}, add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_earlier_thoughts_are_left_out(fast: PreTrainedTokenizerFast) -> None:
    """History keeps an assistant's answer, not its thinking, in the content or beside it."""
    history = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nA", "reasoning_content": "hidden"},
        {"role": "user", "content": "R"},
    ]
    text = rendered(fast, *history, add_generation_prompt=True)
    assert "<|im_start|>assistant\nA<|im_end|>\n" in text
    assert "secret" not in text
    assert "hidden" not in text


def test_a_rendered_chat_ends_its_turns_with_the_stop_token(fast: PreTrainedTokenizerFast) -> None:
    """The tokenizer's eos is the token that ends a turn."""
    assert "<|im_end|>" == fast.eos_token
    assert fast.eos_token_id == ids("<|im_end|>")[0]
