"""A process reward model behind a remote vLLM server: paths go out as token ids, logits per token come back.

One request to /pooling scores a batch; vLLM runs its paths side by side. It pools over all tokens, or (STEP pooling)
over the step markers alone: which of the two, the number of logits tells. They come as base64 of float32, raw: turning
them into probabilities is the format's business.
"""

from __future__ import annotations

import math
import struct
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from thinkserve.server.model_dir import StartError
from thinkserve.server.remote_http import RemoteHttp
from thinkserve.server.remote_tokens import RemoteTokenizer, side_by_side
from thinkserve.server.remote_wire import salted
from thinkserve.server.reward_formats import FORMATS, Format, Reading
from thinkserve.strategies.engine import Path, Score, Tokens
from thinkserve.strategies.errors import EngineFailed


class Memory:
    """The tokens of texts that were used last: questions and steps come again with every longer path.

    At most `texts` of them with `tokens` in all; a text of more than `chars` characters is not kept.
    """

    def __init__(self, texts: int = 4096, tokens: int = 1 << 20, chars: int = 4096) -> None:
        self._texts, self._tokens, self._chars = texts, tokens, chars
        self._known: OrderedDict[str, Tokens] = OrderedDict()
        self._size = 0

    def find(self, text: str) -> Tokens | None:
        """The tokens of a text; None if they are not known (any more)."""
        if text in self._known:
            self._known.move_to_end(text)
        return self._known.get(text)

    def keep(self, text: str, tokens: Tokens) -> None:
        """Remember the tokens of a text, and forget what has not been used for longest."""
        if len(text) > self._chars:
            return
        self._size += len(tokens) - len(self._known.pop(text, ()))
        self._known[text] = tokens
        while len(self._known) > self._texts or self._size > self._tokens:
            self._size -= len(self._known.popitem(last=False)[1])


class RemoteReward:
    """Scores paths on the model called `model`; with `encode`, plain text is tokenized here and not by the server."""

    def __init__(
        self, http: RemoteHttp, model: str, context: int, format: Format, begin: str,
        tokenizer: RemoteTokenizer, encode: Callable[[str], Tokens] | None,
    ) -> None:  # fmt: skip
        self._http = http
        self._model = model
        self._context = context
        self._format = format
        self._begin = begin
        self._tokenizer = tokenizer
        self._local = encode
        self._memory = Memory()

    async def score(self, question: str, paths: Sequence[Path], salt: str | None = None) -> list[Score]:
        """Per path the rewards of its steps after the known ones; NaN for steps beyond the context.

        Raises Refused, EngineFailed.
        """
        whole = await self._readings(question, paths)
        readings = [reading.within(self._context) for reading in whole]
        wanted = [index for index, path in enumerate(paths) if len(readings[index].ends) > path.known]
        found = dict(zip(wanted, await self._rewards([readings[index] for index in wanted], salt), strict=True))
        return [self._score(path, readings[index], found.get(index)) for index, path in enumerate(paths)]

    def _score(self, path: Path, reading: Reading, rewards: Sequence[float] | None) -> Score:
        known = [math.nan] * len(reading.ends) if rewards is None else rewards
        beyond = [math.nan] * (len(path.steps) - len(reading.ends))
        return Score((*known, *beyond)[path.known :], 0 if rewards is None else len(reading.tokens))

    async def _rewards(self, readings: Sequence[Reading], salt: str | None) -> list[list[float]]:
        """The reward of every step of every path, in one request."""
        if not readings:
            return []
        body: dict[str, object] = {
            "model": self._model,
            "task": "token_classify",
            "input": [reading.tokens for reading in readings],
            "use_activation": False,
            "encoding_format": "base64",
            "embed_dtype": "float32",
            "endianness": "little",
        }
        answer = (await self._http.post("/pooling", body | salted(salt))).get("data")
        if not isinstance(answer, list) or len(answer) != len(readings):
            raise self._http.broken("did not score every path")
        rewards = [self._of_one(reading, each) for reading, each in zip(readings, answer, strict=True)]
        self._http.breaker.succeeded()
        return rewards

    def _of_one(self, reading: Reading, answer: object) -> list[float]:
        data = answer.get("data") if isinstance(answer, dict) else None
        try:
            content = b64decode(data, validate=True) if isinstance(data, str) else b""
        except ValueError as error:
            raise self._http.broken("sent logits that cannot be read") from error
        labels = self._format.labels
        rows, rest = divmod(len(content), 4 * labels)
        if rest or rows not in (len(reading.tokens), len(reading.ends)):
            # A marker in the caller's own words does this, too, for which nobody else is to be kept waiting.
            raise EngineFailed(
                f"{self._http.who} sent {len(content) // 4} logits for {len(reading.tokens)} tokens in "
                f"{len(reading.ends)} steps of a model with {labels} labels."
            )
        places: Iterable[int] = reading.ends if rows == len(reading.tokens) else range(rows)
        logits = [struct.unpack_from(f"<{labels}f", content, 4 * labels * place) for place in places]
        return [self._format.probability(each) for each in logits]

    async def _readings(self, question: str, paths: Sequence[Path]) -> list[Reading]:
        if self._local is not None:
            prompt = await self._prompt(question)
            return [self._format.read(prompt, path, self._local) for path in paths]
        # Reading is synchronous: a first pass notes which texts it wants, the second one finds their tokens.
        texts = dict[str, Tokens]()
        for path in paths:
            self._format.read((), path, lambda text: texts.setdefault(text, ()))
        prompt = await self._prompt(question)
        tokens = await side_by_side(lambda text: self._remember(text, self._tokenizer.encode), texts)
        return [self._format.read(prompt, path, tokens.__getitem__) for path in paths]

    async def _prompt(self, question: str) -> Tokens:
        if self._format.plain:
            return await self._remember(f"{self._begin}{question}\n", self._tokenizer.encode)
        messages = self._format.messages(question)
        return await self._remember(f"\0{question}", lambda _: self._tokenizer.chat(messages))

    async def _remember(self, text: str, ask: Callable[[str], Awaitable[Tokens]]) -> Tokens:
        tokens = self._memory.find(text)
        if tokens is None:
            tokens = await ask(text)
            self._memory.keep(text, tokens)
        return tokens


def named_format(asked: str | None, model: str) -> Format:
    """The family of a reward model: as named, or else told by the model's own name. Raises StartError."""
    known = {each.name: each for each in FORMATS}
    fitting = [name for name in known if name in model.lower()]
    name = asked or (fitting[0] if len(fitting) == 1 else None)
    if name not in known:
        raise StartError(f"say which kind of reward model it is: {', '.join(known)}")
    return known[name]
