"""Which model serves which role: all of a deployment's models behind one Backend, one Engine per request.

Everything that is asked of a role goes to its model. A model that helps and has gone takes its role with it, not the
server: who needs that role is told so (503), everybody else is served.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import replace
from functools import partial
from typing import Any, cast

import anyio

from thinkserve.server.deployment import Deployment, Remote
from thinkserve.server.errors import Refused, RoleDown, RoleFailed
from thinkserve.server.plan import Backend, Rendered, ServedModel
from thinkserve.server.settings import RemoteSettings, Settings
from thinkserve.server.vectors import VectorRegistry
from thinkserve.strategies.around import AroundChain
from thinkserve.strategies.engine import (
    Chain,
    Control,
    Delta,
    Detokenizer,
    Engine,
    Job,
    ModelInfo,
    Path,
    Role,
    Sampling,
    Score,
    Stream,
    Tokens,
)
from thinkserve.strategies.errors import EngineDead, EngineFailed, Lost, TooLong, Unsupported
from thinkserve.strategies.streams import Through

logger = logging.getLogger("thinkserve")

Blamed = Callable[[], AbstractContextManager[None]]


async def create(settings: Settings, deployment: Deployment) -> Roles:
    """Start the deployment's models and call its servers. Raises StartError; then nothing is left running."""
    from thinkserve.server.vllm_engine import start

    started = await start(settings, deployment.local)
    # The first is a generating model of this process, which is all that a Backend needs.
    target = cast("Backend", started[0])
    roles: dict[Role, ServedModel] = {}
    for place, model in zip(deployment.local, started, strict=True):
        roles |= dict.fromkeys(place.roles, model)
    backend = Roles(target, roles)
    try:
        for remote in deployment.remote:
            backend.add(remote.role, await _connect(remote, settings, target))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await backend.aclose()
        raise
    return backend


async def _connect(remote: Remote, settings: Settings, target: ServedModel) -> ServedModel:
    from thinkserve.server.remote_engine import connect

    # The tags of the server's own model, unless the remote one is said to have others.
    tags = {"reasoning_open": settings.reasoning_open, "reasoning_close": settings.reasoning_close}
    given = settings.remote.get(remote.role, RemoteSettings())
    told = tags | given.model_dump(exclude_unset=True)
    return await connect(remote.url, RemoteSettings(**told), target, remote.role)


class Roles:
    """A Backend: the target, and beside it the models of other roles. One model may serve several."""

    def __init__(self, target: Backend, roles: Mapping[Role, ServedModel]) -> None:
        self._target = target
        self._roles: dict[Role, ServedModel] = {**roles, "target": target}

    def add(self, role: Role, model: ServedModel) -> None:
        """Let a model serve a role."""
        self._roles[role] = model

    @property
    def roles(self) -> Mapping[Role, ServedModel]:
        """The model that serves each role there is."""
        return self._roles

    @property
    def info(self) -> ModelInfo:
        """Facts about the target."""
        return self._target.info

    @property
    def defaults(self) -> Sampling:
        """How tokens are drawn where a request says nothing: the target's generation_config."""
        return self._target.defaults

    @property
    def kv_tokens(self) -> int:
        """How many tokens the target's cache can hold."""
        return self._target.kv_tokens

    @property
    def alive(self) -> bool:
        """Whether the target is there: without it nothing can be served."""
        return self._target.alive

    @property
    def vectors(self) -> VectorRegistry | None:
        """The target's steering vectors."""
        return self._target.vectors

    @property
    def guides(self) -> bool:
        """Whether the target has a budget predictor."""
        return self._target.guides

    def engine(self, request_id: str, salt: str | None = None) -> Engine:
        """The Engine of one request, for all roles."""
        return RoledEngine(self._target.engine(request_id, salt), self._roles, request_id, salt)

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None, kwargs: Mapping[str, Any] = {}
    ) -> Rendered:
        """Apply the target's chat template. Raises TooLong, BadOptions."""
        return await self._target.render(messages, thinking=thinking, kwargs=kwargs)

    async def check(self) -> None:
        """Raise EngineDead when the target cannot serve any more."""
        await self._target.check()

    async def aclose(self) -> None:
        """Stop all models."""
        async with anyio.create_task_group() as group:
            for model in {id(each): each for each in self._roles.values()}.values():
                group.start_soon(model.aclose)


class RoledEngine:
    """The Engine of one request: hands on what is asked of a role to that role's model."""

    __slots__ = ("_engines", "_id", "_models", "_noted", "_salt", "_target")

    def __init__(self, target: Engine, models: Mapping[Role, ServedModel], request_id: str, salt: str | None) -> None:
        self._target = target
        self._models = models
        self._id = request_id
        self._salt = salt
        self._engines: dict[Role, Engine] = {}
        self._noted: set[tuple[Role, str]] = set()

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the role's model. Raises Unsupported when there is none."""
        return self._engine(role).info()

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """Token ids of plain text; no special tokens are added."""
        return self._engine(role).encode(text)

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the tokens, special tokens left out."""
        return self._engine(role).decode(tokens)

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder."""
        return self._engine(role).detokenizer()

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Run a job on its role's model."""
        return self._target.generate(job) if job.role == "target" else self._generate(job)

    def chain(self, job: Job) -> AbstractAsyncContextManager[Chain]:
        """Open a chain on its role's model."""
        return self._target.chain(job) if job.role == "target" else self._chain(job)

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """A chat as the role's model wants it. Raises TooLong, Unsupported, EngineFailed."""
        if role == "target":
            return await self._target.render(messages)
        async with self._up(role) as engine:
            with self._blamed(role):
                return await engine.render(messages)

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the reward model says of each path. Raises Unsupported, EngineFailed."""
        async with self._up(role) as engine:
            with self._blamed(role):
                return await engine.score(question, paths)

    @asynccontextmanager
    async def _generate(self, job: Job) -> AsyncIterator[Stream]:
        async with self._up(job.role) as engine:
            with self._blamed(job.role):
                opened = engine.generate(replace(job, role="target"))
            async with _helping(opened, partial(self._blamed, job.role)) as stream:
                yield stream

    @asynccontextmanager
    async def _chain(self, job: Job) -> AsyncIterator[Chain]:
        async with self._up(job.role) as engine, engine.chain(replace(job, role="target")) as chain:
            yield _HelpingChain(chain, partial(self._blamed, job.role))

    @asynccontextmanager
    async def _up(self, role: Role) -> AsyncIterator[Engine]:
        """The role's engine; that its model goes, or has gone, is told as the loss of the role alone."""
        engine, model = self._engine(role), self._models[role]
        try:
            await model.check()
            yield engine
        except EngineDead as error:
            # What passes through here may also be the target's end.
            if model.alive:
                raise
            self._note(role, error)
            raise RoleDown(role) from error

    @contextmanager
    def _blamed(self, role: Role) -> Iterator[None]:
        """That a model cannot do its part is told as its role's failure, why to the log; that it is gone, by `_up`."""
        try:
            yield
        except EngineDead:
            raise
        except (EngineFailed, Refused, TooLong) as error:
            self._note(role, error)
            raise RoleFailed(role) from error

    def _note(self, role: Role, error: Lost) -> None:
        # A search asks a helper that fails again and again.
        if (role, str(error)) not in self._noted:
            self._noted.add((role, str(error)))
            logger.warning("request %s: the model of the role %s failed: %s", self._id, role, error)

    def _engine(self, role: Role) -> Engine:
        if role == "target":
            return self._target
        model = self._models.get(role)
        if model is None:
            raise Unsupported(f"No model is configured for the role {role!r}.", "role")
        if role not in self._engines:
            self._engines[role] = model.engine(self._id, self._salt)
        return self._engines[role]


@asynccontextmanager
async def _helping(opened: AbstractAsyncContextManager[Stream], blamed: Blamed) -> AsyncIterator[Stream]:
    async with AsyncExitStack() as stack:
        with blamed():
            stream = await stack.enter_async_context(opened)
        yield _Helping(stream, blamed)


class _HelpingChain(AroundChain):
    """The chain of a helper."""

    def __init__(self, inner: Chain, blamed: Blamed) -> None:
        super().__init__(inner)
        self._blamed = blamed

    def segment(
        self, max_tokens: int, until: Tokens = (), controls: tuple[Control, ...] | None = None
    ) -> AbstractAsyncContextManager[Stream]:
        return _helping(self._inner.segment(max_tokens, until, controls), self._blamed)


class _Helping(Through):
    """The stream of a helper: its failures are told from the target's."""

    __slots__ = ("_blamed",)

    def __init__(self, inner: Stream, blamed: Blamed) -> None:
        super().__init__(inner)
        self._blamed = blamed

    async def __anext__(self) -> Delta:
        with self._blamed():
            return await super().__anext__()
