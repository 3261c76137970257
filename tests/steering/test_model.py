"""Hooks and generation: what is added, where, and to nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from thinkserve.steering.model import Model
from thinkserve.steering.vector_file import BadVector

PROMPTS = ("Start with 3. Add 4.", "Compute 2+2.", "Ann has the key. Ann and Bob swap. What does Ann have?")


def vector(seed: int, size: float = 3.0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(seed)), dim=0) * size


def prompts(model: Model) -> list[list[int]]:
    return [model.prompt(text) for text in PROMPTS]


def logits(model: Model, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return out


def tokens(written: Sequence[Any]) -> list[list[int]]:
    return [each.tokens for each in written]


def test_a_prompt_ends_where_the_model_begins(model: Model) -> None:
    """Inside the think block, as the chat template has it."""
    assert model.tokenizer.decode(model.prompt("1+1")).endswith("<|im_start|>assistant\n<think>\n")
    assert model.close is not None


def test_rows_of_a_batch_are_as_if_alone(model: Model) -> None:
    """Padding, neighbours that end earlier, and a neighbour's vector's absence change nothing."""
    together = model.generate(prompts(model), {1: vector(0)}, 0.5, most=12)
    alone = [model.generate([prompt], {1: vector(0)}, 0.5, most=12)[0] for prompt in prompts(model)]

    assert tokens(alone) == tokens(together)


def test_rows_that_end_leave_the_others_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is cut at its own first end token and otherwise unchanged."""
    whole = tokens(model.generate(prompts(model), most=12))
    end = whole[0][3]
    monkeypatch.setattr(model, "ends", frozenset({end}))

    cut = tokens(model.generate(prompts(model), most=12))

    assert [row[: row.index(end) + 1] if end in row else row for row in whole] == cut
    assert len(cut[0]) <= 4


def test_scale_zero_is_no_vector_at_all(model: Model) -> None:
    """The same tokens, and none of the hooks."""
    assert model.generate(prompts(model), most=8) == model.generate(prompts(model), {0: vector(0)}, 0.0, most=8)


def test_a_vector_is_added_to_the_last_prompt_token_and_what_follows(model: Model) -> None:
    """The states of a recomputed steered sequence differ by scale * vector there, by nothing before."""
    prompt, seen = model.prompt(PROMPTS[0]), list[Tensor]()
    added = 2.0 * vector(1)
    written = model.generate([prompt], {0: vector(1)}, 2.0, most=6)[0].tokens
    sequence = prompt + written[:-1]

    def add(_: int, hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[:, len(prompt) - 1 :] += added
        seen.append(changed - hidden)
        return changed

    with model.hooked(0, add):
        expected = logits(model, sequence)[len(prompt) - 1 :].argmax(-1).tolist()

    assert expected == written
    assert 0.0 == float(seen[0][0, : len(prompt) - 1].abs().max())
    assert written != model.generate([prompt], most=6)[0].tokens


def test_vectors_of_several_layers_act_together(model: Model) -> None:
    """Each at its own block."""
    both = model.generate(prompts(model), {0: vector(1), 1: vector(2)}, 2.0, most=8)
    single = [model.generate(prompts(model), {layer: vector(layer + 1)}, 2.0, most=8) for layer in (0, 1)]

    assert both not in single


def test_after_thinking_nothing_is_added_if_so_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the closing tag as steered, from the token after it as unsteered on the same text."""
    prompt, steer = model.prompt(PROMPTS[2]), {1: vector(3)}
    whole = model.generate([prompt], steer, 5.0, most=10)[0].tokens
    at = next(i for i, token in enumerate(whole) if i >= 2 and token not in whole[:i])
    monkeypatch.setattr(model, "close", whole[at])

    written = model.generate([prompt], steer, 5.0, most=10, thinking_only=True)[0]

    def add(_: int, hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[:, len(prompt) - 1 : len(prompt) + at] += 5.0 * steer[1]
        return changed

    with model.hooked(1, add):
        expected = logits(model, prompt + written.tokens)[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert expected == written.tokens
    assert whole[:at] == written.thinking
    assert written.closed


def test_sampling_follows_the_seed(model: Model) -> None:
    """The same seed writes the same, another one something else."""
    runs = [tokens(model.generate(prompts(model), temperature=1.0, seed=seed, most=8)) for seed in (1, 1, 2)]

    assert runs[0] == runs[1] != runs[2]


def test_states_are_outputs_of_blocks(model: Model) -> None:
    """Of the last token and averaged over the thought, against the library's own list of hidden states."""
    prompt, thought = model.prompt("1+1"), model.encode("So 2.")
    out = model.model(torch.tensor([prompt + thought]), output_hidden_states=True, use_cache=False).hidden_states

    last, mean = model.states(prompt, thought, [0])

    torch.testing.assert_close(out[1][0, -1], last[0])
    torch.testing.assert_close(out[1][0, len(prompt) :].mean(0), mean[0])


def test_a_layer_that_is_not_there_is_told(model: Model) -> None:
    """With those that are."""
    assert [0, 1] == model.checked([1, 0, 1])
    for layer in (-1, 2):
        with pytest.raises(BadVector, match="layers are 0 to 1"):
            model.checked([layer])
