"""What of a chat vLLM's renderer cannot take is the client's error. No engine is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.renderers.chat_utils import _postprocess_messages

from thinkserve.server.model_dir import find_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_render import Renderer
from thinkserve.strategies.errors import BadOptions

pytestmark = pytest.mark.anyio


class VllmRenderer:
    """The embedded model's tokenizer and template behind the part of vLLM's renderer that reads tool calls."""

    def __init__(self, path: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], dict[str, str]]:
        _postprocess_messages(messages)
        kwargs = params.get_apply_chat_template_kwargs()
        return messages, {"prompt": self._tokenizer.apply_chat_template(messages, **kwargs)}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    """Over the embedded model's tokenizer."""
    path = str(find_model(None).path)
    config = SimpleNamespace(
        model=path,
        tokenizer=path,
        code_revision=None,
        tokenizer_revision=None,
        trust_remote_code=False,
        max_model_len=1000,
        get_vocab_size=lambda: 1000,
        try_get_generation_config=dict,
    )
    return Renderer(SimpleNamespace(renderer=VllmRenderer(path), model_config=config), Settings(), "tiny")


def called(arguments: str) -> list[dict[str, Any]]:
    """A chat in which a function was called."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "user", "content": "1+1"}]


async def test_arguments_that_are_nested_too_deep_are_refused(renderer: Renderer) -> None:
    """They are JSON in a string, so the bound on the body's nesting does not see them."""
    await renderer.render(called("[]"), None, {})
    with pytest.raises(BadOptions) as refused:
        await renderer.render(called("[" * 2000 + "]" * 2000), None, {})
    assert refused.value.param == "messages"
