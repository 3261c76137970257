"""The states of single token rows after every block, copied out of the forward pass for who looks into the model.

In vLLM the sum of a block's two outputs is formed in the norm that follows, so the norms are where the stream can be
seen: the first block's sees the embedding, each later one leaves the stream in its residual, and what the last one
returns is what Hugging Face calls the last state. All buffers exist before anything is compiled or captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from thinkserve.server.vllm_worker import graft
from thinkserve.server.vllm_worker_blocks import blocks_of, is_here


class States:
    """`out` [states, rows, hidden] holds, after a pass, the states of the rows that `want` named before it."""

    def __init__(self, states: int, rows: int, hidden: int, like: Tensor) -> None:
        self.out = torch.zeros(states, rows, hidden, dtype=like.dtype, device=like.device)
        self.index = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.count = 0

    def want(self, rows: list[int]) -> None:
        """Name the rows of the pass that is about to begin. Without any, nothing is copied unless a graph is fixed."""
        if self.count:
            # A captured copy reads all of them: none may point beyond a smaller pass.
            self.index.zero_()
        self.count = len(rows)
        if rows:
            self.index[: self.count] = async_tensor_h2d(rows, self.index.device, self.index.dtype)

    def taken(self) -> Tensor:
        """The states of the rows wanted, [rows, states, hidden]."""
        return self.out[:, : self.count].transpose(0, 1)


def graft_norms(model: Any, rows: int, config: Any) -> States:
    """Let the model's norms keep the states of up to `rows` token rows; `config` is vLLM's CompilationConfig.

    Raises ValueError for a model without the norms that are known, or with some of its blocks elsewhere.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    blocks = blocks_of(model)
    inner = next((m for m in model.modules() if getattr(m, "layers", None) is blocks), None)
    last = getattr(inner, "norm", None)
    if not all(is_here(block) and hasattr(block, "input_layernorm") for block in blocks) or last is None:
        raise ValueError(f"budget guidance does not know the norms of {type(model).__name__}")
    hidden = last.weight.shape[0]
    states = States(len(blocks) + 1, rows, hidden, last.weight)
    compiled = config.mode not in (None, CompilationMode.NONE)
    captured = config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    form = _always if compiled or captured else _when_wanted
    for number, norm in enumerate([*(block.input_layernorm for block in blocks), last]):
        norm.register_buffer("thinkserve_out", states.out[number], persistent=False)
        norm.register_buffer("thinkserve_rows", states.index, persistent=False)
        norm.thinkserve_states, norm.thinkserve_last = states, norm is last
        graft(norm, form)
    return states


@torch.library.custom_op("thinkserve::take_rows", mutates_args=("out",))
def take_rows(source: Tensor, rows: Tensor, out: Tensor) -> None:
    """Copy the rows [n] of `source` [tokens, hidden] to `out` [n, hidden]."""
    torch.index_select(source, 0, rows, out=out)


@take_rows.register_fake
def _(source: Tensor, rows: Tensor, out: Tensor) -> None:
    return None


def _seen(norm: Any, arguments: tuple[Any, ...], output: Any) -> Tensor:
    """The state that this norm stands for: what goes into it with the residual, of the last norm what comes out."""
    raw, normed = (arguments[0], output) if isinstance(output, Tensor) else (output[1], output[0])
    seen: Tensor = normed if norm.thinkserve_last else raw
    return seen


def _always(base: type) -> type:
    class Norm(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            take_rows(_seen(self, args, output), self.thinkserve_rows, self.thinkserve_out)
            return output

    return Norm


def _when_wanted(base: type) -> type:
    class Norm(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            count = self.thinkserve_states.count
            if count:
                seen = _seen(self, args, output)
                torch.index_select(seen, 0, self.thinkserve_rows[:count], out=self.thinkserve_out[:count])
            return output

    return Norm
