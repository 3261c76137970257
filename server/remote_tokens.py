"""The tokens of a remote model: asked of its server, and compared with the target's before they are exchanged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import anyio

from thinkserve.server.remote_http import RemoteHttp
from thinkserve.server.remote_wire import Malformed, ids
from thinkserve.server.thinking import closing, phase_of
from thinkserve.strategies.engine import Engine, ModelInfo, Tokens
from thinkserve.strategies.errors import ReasoningError, TooLong

Asked = TypeVar("Asked")
Told = TypeVar("Told")

# What tokenizers disagree about: tags, digits, spaces, line ends, accents (composed and not), scripts, joined emoji.
PROBES = (
    "<think>\n", "\n</think>\n\n", "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "<s>[INST]</s>", "<extra_0>",
    "0123456789 1234567890123 -3.14159e-10 1,000,000 ½ ٣", "a  b   c    d\te\r\nf\n\n\ng \n h", " leading, trailing ",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul \ufb01", "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u0417\u0434\u0440\u0430\u0432\u0441 \u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f52c \U0001f44d\U0001f3fd \U0001d4b3", "\x01\x7f\u00ad\ufeff\ufffd\u2028",
    "\\frac{1}{2}\\cdot x^{2} \\boxed{42}", "don't I'LL we've _snake_CamelCase http://a.b/c?d=e&f", "z" * 100,
)  # fmt: skip
# So many tokens of the vocabulary, spread over it, are compared as text besides.
_SAMPLE = 4096
# Texts of single tokens that are remembered, and questions that are asked at the same time.
_WORDS = 1 << 16
_AT_ONCE = 16
_BLANKS = ("\n", "\n\n", " ", "  ")


class RemoteTokenizer:
    """The tokenizer of the model called `model` behind `http`."""

    def __init__(self, http: RemoteHttp, model: str) -> None:
        self._http = http
        self._model = model
        self._gap: Tokens = ()
        self._blank = frozenset[int]()
        self._words: dict[int, str] = {}

    async def encode(self, text: str) -> Tokens:
        """Token ids of plain text; no special tokens are added. Raises EngineFailed, Refused."""
        return await self._tokens({"prompt": text, "add_special_tokens": False})

    async def chat(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> Tokens:
        """A chat by the model's own template, ready for the reply; a template without the switch ignores `thinking`."""
        # The names by which templates know the switch; vLLM drops those that a template does not.
        switches = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        asked = {"messages": [dict(message) for message in messages], "chat_template_kwargs": switches}
        return await self._tokens(asked | {"add_generation_prompt": True})

    async def closed_chat(self, messages: Sequence[Mapping[str, str]], info: ModelInfo) -> Tokens:
        """A chat whose reply begins with its answer. Raises TooLong."""
        tokens = await self.chat(messages, thinking=False)
        tokens += closing(info, phase_of(info, tokens, self._blank.issuperset), self._gap)
        if len(tokens) >= info.context:
            raise TooLong(len(tokens), info.context)
        return tokens

    async def learn(self, opening: str, ending: str) -> tuple[Tokens, Tokens]:
        """The tags of thinking as tokens, () unless both are single tokens; also notes how white space is written."""
        self._gap = await self.encode("\n\n")
        self._blank = frozenset([token for text in _BLANKS for token in await self.encode(text)])
        tags = await self.encode(opening), await self.encode(ending)
        return tags if all(len(tag) == 1 for tag in tags) else ((), ())

    async def name(self, tokens: Iterable[int]) -> None:
        """Learn the texts of these tokens, each by itself, for `word`. Raises EngineFailed."""
        if len(self._words) > _WORDS:
            self._words.clear()
        self._words |= await side_by_side(self._detokenized, set(tokens) - self._words.keys())

    def word(self, token: int) -> str | None:
        """The text of a token that has been learnt."""
        return self._words.get(token)

    async def difference(self, engine: Engine) -> str | None:
        """The first difference to the target's tokenizer in words for the operator; None if there is none."""
        for text in _texts(engine):
            mine, theirs = engine.encode(text), await self.encode(text)
            if mine != theirs:
                return _told(engine, text, mine, theirs)
        return None

    async def _detokenized(self, token: int) -> str:
        found = (await self._http.post("/detokenize", {"model": self._model, "tokens": [token]})).get("prompt")
        if not isinstance(found, str):
            raise self._http.broken("does not tell the text of a token")
        return found

    async def _tokens(self, body: Mapping[str, object]) -> Tokens:
        found = await self._http.post("/tokenize", {"model": self._model, **body})
        try:
            return ids(found.get("tokens"))
        except Malformed as error:
            raise self._http.broken(str(error)) from error


async def side_by_side(ask: Callable[[Asked], Awaitable[Told]], questions: Iterable[Asked]) -> dict[Asked, Told]:
    """The answers, by question, asked a few at a time. Raises the first error alone, not a group."""
    found: dict[Asked, Told] = {}
    errors: list[ReasoningError] = []
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def one(question: Asked) -> None:
        async with limiter:
            try:
                if not errors:
                    found[question] = await ask(question)
            except ReasoningError as error:
                errors.append(error)

    async with anyio.create_task_group() as group:
        for question in questions:
            group.start_soon(one, question)
    if errors:
        raise errors[0]
    return found


def _texts(engine: Engine) -> Iterator[str]:
    yield from PROBES
    size = engine.info().vocab_size
    words = [engine.decode((token,)) for token in range(0, size, max(1, size // _SAMPLE))]
    yield "\n".join(words)


def _told(engine: Engine, text: str, mine: Tokens, theirs: Tokens) -> str:
    pairs = zip(mine, theirs, strict=False)
    at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(mine), len(theirs)))
    before = engine.decode(mine[:at])
    one, other = (str(tokens[at]) if at < len(tokens) else "nothing" for tokens in (mine, theirs))
    return f"in {text[:60]!r}, token {at} (after {before[-20:]!r}) is {one} in the target and {other} there"
