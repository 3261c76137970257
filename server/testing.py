"""ScriptedBackend: a served model that writes scripts, for tests of everything above the engine; shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thinkserve.server.plan import Rendered, ServedModel
from thinkserve.server.vectors import VectorRegistry
from thinkserve.strategies.engine import Engine, ModelInfo, Role, Sampling
from thinkserve.strategies.errors import EngineDead, TooLong, Unsupported
from thinkserve.strategies.testing import ScriptedEngine

ROLES: tuple[Role, ...] = ("target", "guide", "reward", "verifier")


class ScriptedBackend:
    """One ScriptedEngine for all requests, behind a chat template that is `role: text` per line.

    Generation starts inside the think block unless thinking is switched off. Set `alive` to False to lose the engine;
    controls are kept in `scripted.history[i].job` and change nothing.
    """

    def __init__(
        self,
        engine: ScriptedEngine,
        kv_tokens: int = 1 << 30,
        vectors: VectorRegistry | None = None,
        *,
        guides: bool = False,
    ) -> None:
        self.scripted = engine
        self.vectors = vectors
        self.guides = guides
        self.kv_tokens = kv_tokens
        self.alive = True
        self.closed = False
        self.salts: list[str | None] = []

    @property
    def info(self) -> ModelInfo:
        """The engine's model."""
        return self.scripted.info()

    @property
    def roles(self) -> Mapping[Role, ServedModel]:
        """The one engine, for each role that it was given."""
        return dict.fromkeys((role for role in ROLES if self._serves(role)), self)

    def _serves(self, role: Role) -> bool:
        try:
            self.scripted.info(role)
        except Unsupported:
            return False
        return True

    @property
    def defaults(self) -> Sampling:
        """Neutral sampling."""
        return Sampling()

    def engine(self, request_id: str, salt: str | None = None) -> Engine:
        """The one engine; the salt is kept for tests to see."""
        self.salts.append(salt)
        return self.scripted

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None, kwargs: Mapping[str, Any] = {}
    ) -> Rendered:
        """The lines as tokens. Raises TooLong."""
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        tokens = self.scripted.encode(text + ("<think></think>" if thinking is False else "<think>"))
        if len(tokens) >= self.info.context:
            raise TooLong(len(tokens), self.info.context)
        return Rendered(tokens, "answer" if thinking is False else "thinking")

    async def check(self) -> None:
        """Raise EngineDead when `alive` is False."""
        if not self.alive:
            raise EngineDead("The engine is gone.")

    async def aclose(self) -> None:
        """Note that the server has closed its backend."""
        self.closed = True
