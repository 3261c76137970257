"""The decoder blocks of a model, made to add steering to their output, in the form that suits how the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from thinkserve.kernels.steer import native, steer
from thinkserve.server.vllm_worker import graft

if TYPE_CHECKING:
    from thinkserve.server.vllm_worker_steering import Steering


def graft_blocks(blocks: Any, steering: Steering, config: Any, *, exact: bool = False) -> None:
    """Let the blocks that `steering` has tables for read its buffers; `config` is vLLM's CompilationConfig.

    `exact`: nothing may be fused with steering, so that rows without it keep the bits of a model that has none.
    """
    form = _form(config, exact=exact)
    for layer, table in steering.tables.items():
        block = blocks[layer]
        for name, buffer in (("table", table), ("index", steering.index), ("scale", steering.scale)):
            block.register_buffer(f"thinkserve_{name}", buffer, persistent=False)
        block.thinkserve_part, block.thinkserve_layer = steering, layer
        graft(block, form)


def is_here(block: Any) -> bool:
    """Whether a block is on this rank."""
    return type(block).__name__ != "PPMissingLayer"


def blocks_of(model: Any) -> Any:
    """The list of decoder blocks, by global number also under pipeline parallelism. Raises ValueError."""
    inner = model
    while not isinstance(getattr(inner, "layers", None), nn.ModuleList):
        inner = getattr(inner, "language_model", None) or getattr(inner, "model", None)
        if inner is None:
            raise ValueError(f"steering: no list of layers in {type(model).__name__}; switch steering off to serve it")
    return inner.layers


def _form(config: Any, *, exact: bool) -> Any:
    """How a block is steered: fused by Inductor, as one op in every pass, or only in passes that need it."""
    from vllm.config import CompilationMode, CUDAGraphMode

    if config.mode not in (None, CompilationMode.NONE):
        return _always if exact else _inline
    return _skipping if config.cudagraph_mode in (None, CUDAGraphMode.NONE) else _always


def _inline(base: type) -> type:
    class Block(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            hidden = _hidden(output)
            rows = hidden.shape[0]
            steered = native(hidden, self.thinkserve_table, self.thinkserve_index[:rows], self.thinkserve_scale[:rows])
            return steered if hidden is output else (steered, *output[1:])

    return Block


def _always(base: type) -> type:
    class Block(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            _add(self, _hidden(output))
            return output

    return Block


def _skipping(base: type) -> type:
    class Block(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if self.thinkserve_layer in self.thinkserve_part.layers_now:
                _add(self, _hidden(output))
            return output

    return Block


def _add(block: Any, hidden: Tensor) -> None:
    rows = hidden.shape[0]
    steer(hidden, block.thinkserve_table, block.thinkserve_index[:rows], block.thinkserve_scale[:rows])


def _hidden(output: Any) -> Tensor:
    """What a block adds to the stream, or the stream itself where a block returns nothing else."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
