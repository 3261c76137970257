"""A remote model is introduced: `connect` finds out whether a server can do what a role needs, or says why not.

The server must be vLLM's (or speak as it does): /v1/models, /tokenize, and /v1/completions that takes and gives token
ids, or /pooling with a logit per token for a reward model. The address comes from the configuration, never from a
request, and a key only from the environment.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import replace
from urllib.parse import urlsplit

import httpx

from thinkserve.server.model_dir import StartError
from thinkserve.server.plan import ServedModel
from thinkserve.server.remote_http import RemoteHttp
from thinkserve.server.remote_model import RemoteModel
from thinkserve.server.remote_reward import RemoteReward, named_format
from thinkserve.server.remote_tokens import RemoteTokenizer
from thinkserve.server.settings import RemoteSettings
from thinkserve.strategies.engine import Engine, Job, ModelInfo, Path, Role, Sampling, Tokens
from thinkserve.strategies.errors import ReasoningError, Unsupported
from thinkserve.strategies.verifier import ALTERNATIVES

GREEDY = Sampling(temperature=0.0)


async def connect(url: str, settings: RemoteSettings, target: ServedModel | None, role: Role) -> RemoteModel:
    """The model behind `url`, found fit for the role. Raises StartError in one line.

    A guide must have the target's tokenizer. Other models may have one of their own, which only their server knows.
    """
    http = RemoteHttp(_base(url, role), settings, check_access(settings, role), f"The remote {role}")
    try:
        return await _Introduction(http, role).model(target)
    except ReasoningError as error:
        await http.aclose()
        raise StartError(f"{error} ({role}: {url})") from error
    except StartError as error:
        await http.aclose()
        raise StartError(f"{http.who} cannot be used: {error} ({role}: {url})") from error
    except BaseException:
        await http.aclose()
        raise


def _base(url: str, role: Role) -> str:
    """The server's address; a path before the routes is kept, a `/v1` at the end is understood."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(httpx.URL(url).host) and (parts.port or 1) > 0
    except (ValueError, httpx.InvalidURL):
        fits = False
    if not fits or parts.username is not None or parts.query or parts.fragment:
        raise StartError(f"{role}: not the address of a server (http://host:port, without a password)")
    return url.rstrip("/").removesuffix("/v1")


def check_access(settings: RemoteSettings, role: Role) -> str | None:
    """The key of a role's server, if it has one. Raises StartError for a key or certificates that are not there."""
    try:
        if settings.ca_file is not None:
            ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        reason = error.strerror or "no certificates"
        raise StartError(f"{role}: cannot use the ca_file {settings.ca_file}: {reason}") from error
    if settings.key_env is None:
        return None
    key = os.environ.get(settings.key_env, "")
    if not key or not key.isascii() or not key.isprintable():
        raise StartError(f"{role}: the environment variable {settings.key_env} holds no usable key")
    return key


class _Introduction:
    """What is asked of a server before it is used."""

    def __init__(self, http: RemoteHttp, role: Role) -> None:
        self._http = http
        self._role: Role = role

    async def model(self, target: ServedModel | None) -> RemoteModel:
        """The model, after all questions. Raises StartError, and what the questions raise."""
        settings = self._http.settings
        name, root, context = await self._chosen()
        tokenizer = RemoteTokenizer(self._http, name)
        opening, ending = await tokenizer.learn(settings.reasoning_open, settings.reasoning_close)
        info = ModelInfo(name, context, vocab_size=0, eos=(), think_open=opening, think_close=ending)
        text = None if target is None else await self._fitting(target.engine(f"remote-{self._role}"), tokenizer)
        if text is not None:
            info = replace(text.info(), name=name, context=context)
        if self._role == "reward":
            return await self._reward(info, root, tokenizer, text)
        model = RemoteModel(self._http, info, self._role, tokenizer, text)
        await self._try_out(model, await tokenizer.encode("1 + 1 ="))
        return model

    async def _fitting(self, target: Engine, tokenizer: RemoteTokenizer) -> Engine | None:
        """The target's engine if its tokenizer is the same. Raises StartError for a guide for which it is not."""
        different = await tokenizer.difference(target)
        if different is not None and self._role == "guide":
            raise StartError(f"its tokenizer is not the target's: {different}")
        return None if different else target

    async def _chosen(self) -> tuple[str, str, int]:
        """Name, root and context of the model to use; adapters are used only if they are named."""
        data = (await self._http.get("/v1/models")).get("data")
        cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
        asked = self._http.settings.model
        names = [str(card.get("id")) for card in cards if asked is not None or card.get("parent") is None]
        if asked is None and len(names) != 1:
            raise StartError(f"it serves {len(names)} models, say which one: {self._http.told(', '.join(names))}")
        name = names[0] if asked is None else asked
        card = next((card for card in cards if card.get("id") == name), None)
        if card is None:
            raise StartError(f"it does not serve {name!r} but {self._http.told(', '.join(names)) or 'nothing'}")
        parent = next((each for each in cards if each.get("id") == card.get("parent")), card)
        context = parent.get("max_model_len")
        if type(context) is not int or context < 1:
            raise StartError("it does not tell its context (max_model_len): no vLLM server")
        return name, str(card.get("root") or ""), context

    async def _reward(self, info: ModelInfo, root: str, tokenizer: RemoteTokenizer, text: Engine | None) -> RemoteModel:
        settings = self._http.settings
        form = named_format(settings.reward_format, f"{info.name} {root}")
        encode = None if text is None else text.encode
        reward = RemoteReward(self._http, info.name, info.context, form, settings.begin, tokenizer, encode)
        await reward.score("What is 1 + 1?", [Path(("1 + 1 = 2",))])
        return RemoteModel(self._http, info, self._role, tokenizer, text, reward)

    async def _try_out(self, model: RemoteModel, prompt: Tokens) -> None:
        """One token, to see that ids come back; one more, to see whether the end of thinking is forced.

        A verifier is asked for as many alternatives as it will be: servers may allow fewer.
        """
        alternatives = ALTERNATIVES if self._role == "verifier" else 1
        if not await _written(model, Job(prompt, 1, GREEDY, logprobs=alternatives)):
            raise StartError("it writes nothing")
        if model.info.reasons:
            try:
                forced = await _written(model, Job(model.info.think_open, 1, GREEDY, thinking_budget=0))
            except Unsupported:
                forced = ()
            model.budgets = forced == model.info.think_close


async def _written(model: RemoteModel, job: Job) -> Tokens:
    async with model.open(job, "start") as stream:
        return tuple([token async for delta in stream for token in delta.tokens])
