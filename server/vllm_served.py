"""What a writing and a rating model in vLLM have in common: facts, health, and how the engine is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from thinkserve.strategies.engine import ModelInfo
from thinkserve.strategies.errors import EngineDead

if TYPE_CHECKING:
    from thinkserve.server.vllm_render import Renderer


class Served:
    """An AsyncLLM with its tokenizer; it belongs to the event loop that it was started on."""

    def __init__(self, llm: Any, renderer: Renderer) -> None:
        self._open: Any = llm
        self.renderer = renderer

    @property
    def _llm(self) -> Any:
        if self._open is None:
            raise EngineDead("The engine has been stopped.")
        return self._open

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self.renderer.info

    @property
    def kv_tokens(self) -> int:
        """Tokens that the key-value cache holds; one block is vLLM's own."""
        cache = self._llm.vllm_config.cache_config
        return int((cache.num_gpu_blocks - 1) * cache.block_size)

    @property
    def alive(self) -> bool:
        """Whether the engine process is there."""
        return self._open is not None and not self._open.errored

    @property
    def unfinished(self) -> int:
        """Requests that vLLM is still to answer."""
        return int(self._llm.output_processor.get_num_unfinished_requests())

    async def check(self) -> None:
        """Raise EngineDead when the engine cannot serve any more."""
        if not self.alive:
            raise EngineDead("The engine is gone.")

    async def aclose(self) -> None:
        """Stop the engine and its processes; what is still open ends with EngineDead."""
        from thinkserve.server.vllm_metrics import KEPT

        llm, self._open = self._open, None
        if llm is None:
            return
        llm.output_processor.propagate_error(EngineDead("The server is shutting down."))
        # Ends vLLM's reader before its socket closes, which it would report as the death of the engine.
        llm.output_handler.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: llm.shutdown(timeout=5))
            with anyio.move_on_after(1):
                # vLLM has closed its sockets and leaves their context to the garbage collector, which complains.
                await anyio.to_thread.run_sync(llm.engine_core.resources.ctx.term, abandon_on_cancel=True)
        for logger in llm.logger_manager.stat_loggers:
            KEPT.drop(logger)
