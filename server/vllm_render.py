"""Text on both sides of the engine: chat templates through vLLM's renderer, and the served model's tokenizer.

Templates are untrusted code on untrusted data: they run in transformers' sandbox, in a worker thread, and see only the
scalar arguments that the template itself declares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import anyio
import anyio.to_thread
from vllm.renderers.hf import resolve_chat_template, resolve_chat_template_kwargs
from vllm.renderers.params import ChatParams

from thinkserve.server.detokenizer import ByteDetokenizer, WindowDetokenizer, byte_table
from thinkserve.server.model_dir import StartError
from thinkserve.server.plan import Rendered
from thinkserve.server.settings import Settings
from thinkserve.server.thinking import closing, phase_of
from thinkserve.server.vllm_stream import engine_errors
from thinkserve.strategies.engine import Detokenizer, ModelInfo, Tokens
from thinkserve.strategies.errors import BadOptions, TooLong

# Names by which templates know the switch for thinking.
_SWITCHES = ("enable_thinking", "thinking")
_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "return_dict",
    }
)


class Renderer:
    """Tokenizer and chat template of a model; its methods are safe to call from several threads.

    `begin` is the text with which the tokenizer begins a sequence that is no chat, if any.
    """

    def __init__(self, llm: Any, settings: Settings, name: str) -> None:
        self._renderer = llm.renderer
        self._model_config = llm.model_config
        tokenizer = llm.renderer.get_tokenizer()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise StartError("The model has no fast tokenizer (tokenizer.json)")
        # A tokenizer of our own: vLLM's pool copies a whole one whenever two calls overlap.
        self._tokenizer = type(backend).from_str(backend.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._table = byte_table(self._tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._widest = max(len(text) for text in self._tokenizer.get_vocab(with_added_tokens=True))
        self._template = resolve_chat_template(tokenizer, None, None, model_config=llm.model_config)
        self._hf_tokenizer = tokenizer
        self.begin = tokenizer.bos_token or ""
        self.info = self._model_info(llm, settings, name)
        self._limiter = anyio.CapacityLimiter(2)

    def _model_info(self, llm: Any, settings: Settings, name: str) -> ModelInfo:
        config = llm.model_config
        eos = config.try_get_generation_config().get("eos_token_id")
        listed = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        own = [] if self._hf_tokenizer.eos_token_id is None else [self._hf_tokenizer.eos_token_id]
        opening = self._tokenizer.token_to_id(settings.reasoning_open)
        closing = self._tokenizer.token_to_id(settings.reasoning_close)
        tagged = opening is not None and closing is not None
        return ModelInfo(
            name=name,
            context=config.max_model_len,
            vocab_size=config.get_vocab_size(),
            eos=tuple(dict.fromkeys(own + listed)),
            think_open=(opening,) if tagged else (),
            think_close=(closing,) if tagged else (),
        )

    def encode(self, text: str) -> Tokens:
        """Token ids of plain text; no special tokens are added. Raises BadOptions for text that is not Unicode."""
        try:
            # The batch call is the one that releases the interpreter lock.
            return tuple(self._tokenizer.encode_batch([text], add_special_tokens=False)[0].ids)
        except TypeError as error:
            raise BadOptions("The text holds half of a surrogate pair.") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder."""
        return WindowDetokenizer(self.decode) if self._table is None else ByteDetokenizer(self._table)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None,
        kwargs: Mapping[str, Any],
    ) -> Rendered:
        """Apply the chat template in a worker thread. Raises TooLong, BadOptions."""
        switches = self._template_arguments(thinking, kwargs)
        return await anyio.to_thread.run_sync(
            self._render,
            [dict(message) for message in messages],
            switches,
            thinking,
            limiter=self._limiter,
        )

    def _template_arguments(self, thinking: bool | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        asked = dict(kwargs)
        for name, value in asked.items():
            if name in _RESERVED or not isinstance(value, str | int | float | bool | None):
                raise BadOptions(
                    f"{name!r} cannot be given to the chat template.",
                    f"chat_template_kwargs.{name}",
                )
        known = self._declared([*asked, *_SWITCHES])
        unknown = sorted(asked.keys() - known)
        if unknown:
            message = f"The model's chat template has no argument {unknown[0]!r}."
            raise BadOptions(message, f"chat_template_kwargs.{unknown[0]}")
        if thinking is not None:
            asked |= {name: thinking for name in _SWITCHES if name in known}
        return asked

    def _declared(self, names: list[str]) -> set[str]:
        if self._template is None:
            raise BadOptions("The model has no chat template.", "messages")
        probe: dict[str, Any] = dict.fromkeys(names)
        return set(resolve_chat_template_kwargs(self._hf_tokenizer, self._template, probe))

    def _render(self, messages: list[Any], arguments: dict[str, Any], thinking: bool | None) -> Rendered:
        params = ChatParams(chat_template_kwargs=arguments | {"add_generation_prompt": True, "tokenize": False})
        try:
            with engine_errors():
                _, prompt = self._renderer.render_messages(messages, params)
        except (TypeError, KeyError, RecursionError) as error:
            raise BadOptions(f"The chat template cannot render these messages: {error}", "messages") from error
        text = prompt["prompt"]
        # No token is wider than the widest: a text that cannot fit is refused before it is tokenized.
        least = ceil(len(text) / self._widest)
        if least >= self.info.context:
            raise TooLong(least, self.info.context)
        tokens = self.encode(text)
        phase = phase_of(self.info, tokens, lambda rest: not self.decode(rest).strip())
        if thinking is False and (added := closing(self.info, phase, self.encode("\n\n"))):
            tokens, phase = tokens + added, "answer"
        if len(tokens) >= self.info.context:
            raise TooLong(len(tokens), self.info.context)
        return Rendered(tokens, phase)
