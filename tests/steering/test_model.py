"""States of the blocks, and the hooks that change them."""

from __future__ import annotations

import torch
from torch import Tensor

from thinkserve.steering.model import Model


def test_a_prompt_ends_where_the_model_begins(model: Model) -> None:
    """Inside the think block, as the chat template has it."""
    assert model.tokenizer.decode(model.prompt("1+1")).endswith("<|im_start|>assistant\n<think>\n")


def test_states_are_outputs_of_blocks(model: Model) -> None:
    """Of the last token and averaged over the thought, against the library's own list of hidden states."""
    prompt, thought = model.prompt("1+1"), model.encode("So 2.")
    out = model.model(torch.tensor([prompt + thought]), output_hidden_states=True, use_cache=False).hidden_states

    last, mean = model.states(prompt, thought, [0])

    torch.testing.assert_close(out[1][0, -1], last[0])
    torch.testing.assert_close(out[1][0, len(prompt) :].mean(0), mean[0])


def test_a_hook_changes_its_layer_while_it_is_there(model: Model) -> None:
    """What it returns is the block's output to all that follows; afterwards all is as before."""
    prompt, thought = model.prompt("1+1"), model.encode("So 2.")

    def add(layer: int, hidden: Tensor) -> Tensor:
        return hidden + 1.0 + layer

    before, _ = model.states(prompt, thought, [0, 1])
    with model.hooked(0, add):
        during, _ = model.states(prompt, thought, [0, 1])
    after, _ = model.states(prompt, thought, [0, 1])

    torch.testing.assert_close(before[0] + 1.0, during[0])
    assert not torch.allclose(before[1], during[1])
    assert torch.equal(before, after)
