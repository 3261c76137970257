"""One job inside vLLM: entering submits it, iterating yields what the engine sampled, leaving aborts it.

The stream takes the place of vLLM's own output collector: the output processor calls `put` once per engine step, right
after it has counted the step's tokens in `vllm:generation_tokens`. So `generated` agrees with that counter at every
moment, whatever the strategy has read, and there is nothing to drain after an abort.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import anyio
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from thinkserve.server.thinking import vllm_budget
from thinkserve.server.vllm_scheduler import said_of
from thinkserve.server.vllm_worker import GUIDED, KEY, STATS
from thinkserve.strategies.engine import Delta, Finish, Job, ModelInfo, Tokens, TokenStats
from thinkserve.strategies.errors import (
    BadOptions,
    EngineDead,
    EngineFailed,
    TooLong,
)

# vLLM's finish reasons that are ours too; "abort" and "error" are failures unless we aborted.
_FINISH: Final[dict[str, Finish]] = {
    "stop": "stop",
    "length": "length",
    "repetition": "repetition",
}

TopList = tuple[tuple[int, float], ...]


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turn vLLM's exceptions into ours."""
    try:
        yield
    except EngineDeadError as error:
        raise EngineDead("The engine is gone.") from error
    except (VLLMClientError, ValueError) as error:
        raise BadOptions(str(error), getattr(error, "parameter", None)) from error


def sampling_params(job: Job, info: ModelInfo, asked: dict[str, Any], **more: Any) -> SamplingParams:
    """vLLM's parameters of a job; `asked` is for our worker. Raises BadOptions for values out of range, TooLong."""
    if len(job.prompt) >= info.context:
        raise TooLong(len(job.prompt), info.context)
    if job.stats:
        asked = {**asked, STATS: True}
    draw = job.sampling
    with engine_errors():
        return SamplingParams(
            max_tokens=min(job.max_tokens, info.context - len(job.prompt)),
            temperature=draw.temperature,
            top_p=draw.top_p,
            top_k=draw.top_k,
            min_p=draw.min_p,
            presence_penalty=draw.presence_penalty,
            frequency_penalty=draw.frequency_penalty,
            repetition_penalty=draw.repetition_penalty,
            logit_bias=dict(draw.logit_bias) or None,
            seed=None if job.seed is None else job.seed % 2**63,
            stop=list(job.stop),
            stop_token_ids=list(job.stop_tokens),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            detokenize=bool(job.stop),
            thinking_token_budget=vllm_budget(job, info),
            logprobs=job.logprobs,
            flat_logprobs=True,
            output_kind=RequestOutputKind.DELTA,
            # What comes with each step's output would be lost with it.
            stream_interval=job.interval if job.interval > 1 and job.logprobs is None and not job.stats else None,
            skip_clone=True,
            extra_args={KEY: asked} if asked else None,
            **more,
        )


class Submitted:
    """Something in the engine: entering submits it, leaving aborts what has not ended; `put` takes vLLM's outputs."""

    __slots__ = ("_ended", "_error", "_id", "_left", "_llm", "_params", "_salt", "_tasks", "_waiter")

    def __init__(self, llm: Any, tasks: Any, engine_id: str, *, params: Any, salt: str | None) -> None:
        self._llm = llm
        self._tasks = tasks
        self._id = engine_id
        self._params = params
        self._salt = salt
        self._error: Exception | None = None
        self._ended = False
        self._left = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def prompt(self) -> Tokens:
        """What the engine reads."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        llm = self._llm
        if llm.errored:
            raise EngineDead("The engine is gone.")
        with engine_errors():
            prompt = tokens_input(list(self.prompt), cache_salt=self._salt)
            request = llm.input_processor.process_inputs(self._id, prompt, self._params, self._tasks)
            request.external_req_id = self._id
            try:
                llm.output_processor.add_request(request, None, None, 0, self)
                await llm.engine_core.add_request_async(request)
            except BaseException:
                await self._abort()
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._abort()

    async def _abort(self) -> None:
        self._left = True
        if not self._ended and self._error is None:
            # vLLM forgets the request before its first await, so no token is counted from here on.
            with anyio.CancelScope(shield=True):
                await self._llm.abort(self._id, internal=True)

    def put(self, output: Any) -> None:
        """Called by vLLM's output processor with the output of one step, or with the error that ended the engine."""
        if isinstance(output, Exception):
            self._error = output
        else:
            self.take(output)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def take(self, output: Any) -> None:
        """Keep what came; `_ended` is set once nothing more will."""
        raise NotImplementedError

    async def next_output(self) -> None:
        """Return when `put` has been called again."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class VllmStream(Submitted):
    """A job in the engine: an async context manager, and the stream of its deltas."""

    __slots__ = ("_finish", "_job", "_logprobs", "_said", "_stats", "_tokens", "_top", "cached")

    def __init__(
        self,
        llm: Any,
        tasks: Any,
        engine_id: str,
        *,
        job: Job,
        params: SamplingParams,
        salt: str | None,
    ) -> None:
        super().__init__(llm, tasks, engine_id, params=params, salt=salt)
        self._job = job
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[TopList] = []
        self._said: list[TokenStats] = []
        self._finish: str | None = None
        self._stats: Any = None
        self.cached = 0

    @property
    def prompt(self) -> Tokens:
        """The job's."""
        return self._job.prompt

    @property
    def generated(self) -> int:
        """Tokens sampled so far, as vLLM counts them; final after the block."""
        return 0 if self._stats is None else int(self._stats.num_generation_tokens)

    def take(self, output: Any) -> None:
        """The tokens of one step."""
        completion = output.outputs[0]
        self._tokens += completion.token_ids
        self._stats = output.metrics
        self.cached = output.num_cached_tokens or 0
        if completion.logprobs is not None:
            self._take_logprobs(completion.logprobs, said_of(output).get(GUIDED))
        if self._job.stats and (row := said_of(output).get(STATS)):
            self._said.append(TokenStats(*row))
        self._finish = completion.finish_reason
        self._ended = self._finish is not None

    def _take_logprobs(self, flat: Any, guided: float | None) -> None:
        logprobs, temperature = flat.logprobs, self._job.sampling.temperature
        if guided is not None:
            # Guided logits are what is drawn from, times the temperature; `guided` is the logarithm of their sum.
            logprobs = [(value + guided) / temperature for value in logprobs]
        # Of each position the first entry is the sampled token, then come the alternatives, best first.
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
            self._logprobs.append(logprobs[start])
            if self._job.logprobs:
                self._top.append(tuple(zip(flat.token_ids[start + 1 : end], logprobs[start + 1 : end], strict=True)))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._left:
            raise StopAsyncIteration
        while not self._tokens and self._finish is None and self._error is None:
            await self.next_output()
        return self._next()

    def unread(self) -> Delta:
        """What is here and what vLLM holds back; nothing of a job with statistics or log-probabilities is held back."""
        state = self._llm.output_processor.request_states.get(self._id)
        if state is not None and self._params.stream_interval is not None:
            written = state.detokenizer.output_token_ids
            self._tokens += written[state.sent_tokens_offset :]
            state.sent_tokens_offset = len(written)
        return self._delta(_FINISH.get(self._finish or ""))

    def _next(self) -> Delta:
        finish = None
        if self._finish is not None:
            finish = _FINISH.get(self._finish)
            if finish is None:
                raise EngineFailed(f"The engine gave up on the request ({self._finish}).")
            self._left = True
        elif self._error is not None and not self._tokens:
            raise EngineDead("The engine is gone.") from self._error
        if self._job.stats and len(self._said) != len(self._tokens):
            raise EngineFailed("The engine left out the statistics of a token.")
        return self._delta(finish)

    def _delta(self, finish: Finish | None) -> Delta:
        delta = Delta(tuple(self._tokens), tuple(self._logprobs), tuple(self._top), finish, tuple(self._said))
        self._said.clear()
        self._tokens.clear()
        self._logprobs.clear()
        self._top.clear()
        return delta
