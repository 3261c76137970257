"""The vLLM adapter: AsyncLLM as the strategies' Engine and as the server's Backend.

`create` imports and starts vLLM; importing this module does not. The Engine of a request is a cheap view of the backend
that carries the request's id and cache salt.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from thinkserve.server.deployment import Local, target_alone
from thinkserve.server.model_dir import StartError
from thinkserve.server.plan import Rendered, ServedModel
from thinkserve.server.reward_formats import format_of
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import VectorRegistry, Vectors, open_registry
from thinkserve.server.vllm_controls import NOTHING, Continued, Steered, steering
from thinkserve.server.vllm_guidance import guidance
from thinkserve.server.vllm_launch import is_cpu_build, launch
from thinkserve.server.vllm_served import Served
from thinkserve.server.vllm_vectors import Kept, LoadedVectors
from thinkserve.strategies.engine import (
    Chain,
    Detokenizer,
    Job,
    ModelInfo,
    Path,
    Role,
    Sampling,
    Score,
    Stream,
    Tokens,
)
from thinkserve.strategies.errors import ReasoningError, Unsupported
from thinkserve.strategies.together import together

if TYPE_CHECKING:
    from thinkserve.server.vllm_render import Renderer
    from thinkserve.server.vllm_reward import RewardBackend


async def create(settings: Settings) -> VllmBackend:
    """Start vLLM with the configured target alone and serve it a first request. Raises StartError.

    The event loop is blocked while vLLM is imported and started.
    """
    (backend,) = await start(settings, [target_alone(settings, is_cpu_build())])
    return cast("VllmBackend", backend)


async def start(settings: Settings, places: Sequence[Local]) -> list[ServedModel]:
    """Start an engine per model and serve each a first request. Raises StartError; then none is left running."""
    vectors = [open_registry(settings, place.model) if place.target else None for place in places]
    llms = launch(settings, places)
    try:
        backends = [await _serve(settings, *each) for each in zip(places, llms, vectors, strict=True)]
        await together(_warm_up, zip(places, backends, strict=True))
    except BaseException:
        for llm in llms:
            llm.shutdown(timeout=0)
        raise
    return list(backends)


async def _warm_up(started: tuple[Local, VllmBackend | RewardBackend]) -> None:
    place, backend = started
    try:
        await backend.warm_up()
    except ReasoningError as error:
        raise StartError(f"{place.name} does not answer: {error}") from error


async def _serve(
    settings: Settings, place: Local, llm: Any, vectors: VectorRegistry | None
) -> VllmBackend | RewardBackend:
    from thinkserve.server.vllm_render import Renderer

    renderer, tasks = Renderer(llm, settings, place.name), await llm.get_supported_tasks()
    if "reward" not in place.roles:
        return VllmBackend(llm, renderer, tasks, vectors)
    from thinkserve.server.vllm_reward import RewardBackend

    return RewardBackend(llm, renderer, tasks, format_of(place.model))


class VllmBackend(Served):
    """One served model. Everything here belongs to the event loop that it was started on."""

    def __init__(self, llm: Any, renderer: Renderer, tasks: Any, vectors: VectorRegistry | None) -> None:
        from thinkserve.server.vllm_args import STEERING_SLOTS
        from thinkserve.server.vllm_stream import VllmStream, sampling_params

        super().__init__(llm, renderer)
        self.vectors = vectors
        self._loaded = LoadedVectors(self._call_steering, STEERING_SLOTS)
        self._tasks = tasks
        self._stream = VllmStream
        self._params = sampling_params
        self._serial = count()

    @property
    def roles(self) -> Mapping[Role, ServedModel]:
        """Alone it is the target and nothing else."""
        return {"target": self}

    @property
    def guides(self) -> bool:
        """Whether the model has a budget predictor, so that jobs may carry a Guide."""
        config = self._llm.vllm_config.additional_config or {}
        return len(self.info.think_close) == 1 and any("guidance" in parts for parts in config.values())

    @property
    def _plugged_in(self) -> bool:
        return bool(self._llm.vllm_config.additional_config)

    @cached_property
    def defaults(self) -> Sampling:
        """How tokens are drawn where a request says nothing: the model's generation_config, which vLLM reads anew."""
        found = self._llm.model_config.get_diff_sampling_param()
        known = {name: value for name, value in found.items() if name in Sampling.__dataclass_fields__}
        return Sampling(**known | {"top_k": max(known.get("top_k", 0), 0)})

    def engine(self, request_id: str, salt: str | None = None) -> VllmEngine:
        """The Engine of one request: engine ids start with `request_id`, prefixes are shared within `salt` only."""
        vectors = None if self.vectors is None else self.vectors.snapshot()
        return VllmEngine(self, self.renderer, request_id, salt, vectors)

    def open(
        self, request_id: str, salt: str | None, job: Job, steered: Steered = NOTHING, **more: Any
    ) -> AbstractAsyncContextManager[Stream]:
        """A stream of `job`, not yet submitted; `more` goes to vLLM's sampling parameters."""
        if job.stats and not self._plugged_in:
            raise Unsupported("This server computes no statistics of tokens.", "strategy")
        asked = {**steered.args(), **guidance(job, self.info, self.guides)}
        params = self._params(job, self.info, asked, **more)
        engine_id = f"{request_id}-{next(self._serial)}"
        stream = self._stream(self._llm, self._tasks, engine_id, job=job, params=params, salt=salt)
        return self._steered(stream, steered) if steered.vectors else stream

    @asynccontextmanager
    async def _steered(self, stream: AbstractAsyncContextManager[Stream], steered: Steered) -> AsyncIterator[Stream]:
        async with self._loaded.hold(steered.vectors), stream as opened:
            yield opened

    def kept(self) -> Kept:
        """The vectors that a chain will hold: none yet."""
        return Kept(self._loaded)

    async def _call_steering(self, method: str, *args: Any) -> list[Any]:
        found: list[Any] = await self._llm.collective_rpc("call_part", args=("Steering", method, *args))
        return found

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        kwargs: Mapping[str, Any] = {},
    ) -> Rendered:
        """Apply the model's chat template off the event loop. Raises TooLong, BadOptions."""
        return await self.renderer.render(messages, thinking, kwargs)

    async def warm_up(self) -> None:
        """Run one token of every kind through the engine, so that the first request does not pay for lazy set-up."""
        prompt = (self.info.eos or (0,))[:1]
        for logprobs in (None, 0):
            job = Job(
                prompt=prompt,
                max_tokens=1,
                logprobs=logprobs,
                sampling=Sampling(top_p=0.9),
                seed=0,
            )
            async with self.open("warm-up", "warm-up", job) as stream:
                async for _ in stream:
                    pass


class VllmEngine:
    """The Engine of one request."""

    __slots__ = ("_backend", "_id", "_renderer", "_salt", "_vectors")

    def __init__(
        self,
        backend: VllmBackend,
        renderer: Renderer,
        request_id: str,
        salt: str | None,
        vectors: Vectors | None,
    ) -> None:
        self._backend = backend
        self._renderer = renderer
        self._id = request_id
        self._salt = salt
        # As they were when the request came: a chain started later must not run under another version.
        self._vectors = vectors

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the model of a role. Raises Unsupported for a role other than `target`."""
        self._need(role)
        return self._renderer.info

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """Token ids of plain text; no special tokens are added."""
        self._need(role)
        return self._renderer.encode(text)

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the tokens, special tokens left out."""
        self._need(role)
        return self._renderer.decode(tokens)

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder."""
        self._need(role)
        return self._renderer.detokenizer()

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Run a job; leaving the block aborts what is left of it in the engine."""
        return self._start(job, self._steer(job))

    @asynccontextmanager
    async def chain(self, job: Job) -> AsyncIterator[Chain]:
        """Open a chain on the job's prompt, by resubmission: the prefix cache keeps what was computed."""
        vectors = self._backend.kept()

        @asynccontextmanager
        async def start(segment: Job, steered: Steered) -> AsyncIterator[Stream]:
            await vectors.change(steered.vectors)
            async with self._start(segment, steered) as stream:
                yield stream

        try:
            yield Continued(start, self._steer, job, self.info(job.role))
        finally:
            vectors.release()

    def _start(self, job: Job, steered: Steered) -> AbstractAsyncContextManager[Stream]:
        self._need(job.role)
        return self._backend.open(self._id, self._salt, job, steered)

    def _steer(self, job: Job, past: Steered = NOTHING) -> Steered:
        return steering(job, self._renderer.info, self._vectors, past)

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """A chat ready for the model's reply, thinking closed at once. Raises TooLong."""
        self._need(role)
        return (await self._renderer.render(messages, False, {})).tokens

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """Raises Unsupported: this model generates, it does not rate."""
        raise Unsupported(f"No model is configured for the role {role!r}.", "role")

    def _need(self, role: Role) -> None:
        if role != "target":
            raise Unsupported(f"No model is configured for the role {role!r}.", "role")
