"""Inside the worker process: requests' controls become changes of the forward pass and of the logits.

`attach` grafts onto the loaded model runner: single objects get a subclass of their own class, so other models in the
process (a draft, a reward model) are untouched. What a request asks for arrives in `SamplingParams.extra_args[KEY]`,
was validated in the front end, and is handed to the parts, one per capability. A part keeps its state by request id;
which rows belong to whom is told anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thinkserve.server.vllm_refusal import noted
from thinkserve.server.vllm_worker_report import Later, joined, reported
from thinkserve.server.vllm_worker_seeds import generators_kept

if TYPE_CHECKING:
    from torch import Tensor

KEY = "thinkserve"
STATS = "stats"
GUIDED = "guided"

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: request i owns rows `first_row[i]` to `first_row[i] + count[i]` (exclusive).

    `position[i]` is the position in its sequence of its first row; `ids` are the token ids of all rows, on the model's
    device; logits rows follow the order of `request_ids`.
    """

    request_ids: list[str]
    first_row: Ints
    count: Ints
    position: Ints
    ids: Tensor


class Part(Protocol):
    """One capability. Nothing here may raise because of what a request contains."""

    def admit(self, request_id: str, asked: Mapping[str, Any], params: Any, tokens: list[int]) -> None:
        """A request begins, begins again after preemption, or goes on with new parameters; `tokens` are its prompt."""
        ...

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any live request needs this part (or rows of the last step are still set)."""
        ...

    def prepare(self, step: Step) -> None:
        """The pass over these rows is about to begin."""
        ...

    def logits(self, step: Step, logits: Tensor) -> Tensor:
        """Raw logits [requests, vocabulary + padding], before masks and temperature; returns what takes their place."""
        ...

    def report(self) -> Later | None:
        """What the step just done has to say about requests, once: msgpack types, by request id and name."""
        ...

    def clear(self) -> None:
        """A dummy pass follows: no row is anybody's."""
        ...


class Parts:
    """All capabilities of a worker, and the step that is under way."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self._parts = parts
        self._step: Step | None = None

    def part(self, kind: str) -> Part:
        """The part whose class has this name. Raises StopIteration when there is none."""
        return next(part for part in self._parts if type(part).__name__ == kind)

    @property
    def busy(self) -> bool:
        """Whether the next step matters to any part."""
        return any(part.busy for part in self._parts)

    def admit(self, request_id: str, params: Any, tokens: list[int] | None) -> None:
        """A request begins; one without controls only ends what its id may have left."""
        asked = (getattr(params, "extra_args", None) or {}).get(KEY)
        for part in self._parts:
            if asked:
                part.admit(request_id, asked, params, tokens or [])
            else:
                part.forget((request_id,))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        gone = tuple(request_ids)
        for part in self._parts if gone else ():
            part.forget(gone)

    def prepare(self, step: Step) -> None:
        """Tell the parts whose rows these are."""
        self._step = step
        for part in self._parts:
            if part.busy:
                part.prepare(step)

    def logits(self, logits: Tensor | None) -> Tensor | None:
        """Offer the raw logits of the step that was prepared; returns what takes their place."""
        step, self._step = self._step, None
        if step is None or logits is None or len(logits) != len(step.request_ids):
            return logits
        for part in self._parts:
            if part.busy:
                logits = part.logits(step, logits)
        return logits

    def report(self) -> Later | None:
        """What the parts have to say, merged by request id; None when that is nothing."""
        return joined(part.report() for part in self._parts)

    def clear(self) -> None:
        """Before a dummy pass."""
        self._step = None
        for part in self._parts:
            part.clear()


def attach(worker: Any) -> None:
    """Build the parts that the configuration asks for and graft them onto the worker's model runner."""
    config = worker.vllm_config
    wanted = (config.additional_config or {}).get(KEY) if isinstance(config.additional_config, dict) else None
    if wanted is None:
        return
    from thinkserve.server.vllm_worker_parts import build

    runner = worker.model_runner
    # Not `runner.model`, which may be a wrapper that replays CUDA graphs.
    model = runner.get_model()
    runner.thinkserve = parts = Parts(build(worker, model, wanted))
    model.thinkserve = parts
    graft(model, _model)
    if hasattr(runner, "model_state"):
        runner.model_state.thinkserve = parts
        graft(runner.model_state, _state_v2)
        graft(runner, _runner_v2)
    else:
        graft(runner, _runner_v1)


def graft(target: Any, make: Callable[[type], type]) -> None:
    """Give one object a subclass of its own class; the single base keeps CPython's object layout."""
    base = type(target)
    made = make(base)
    made.__name__ = made.__qualname__ = f"Thinkserve{base.__name__}"
    target.__class__ = made


def _model(base: type) -> type:
    class Model(base):
        def compute_logits(self, *args: Any, **kwargs: Any) -> Any:
            return self.thinkserve.logits(super().compute_logits(*args, **kwargs))

    return Model


def _runner_v1(base: type) -> type:
    class Runner(base):
        """Model runner V1: requests come and go in `_update_states`, rows are laid out in `_prepare_inputs`."""

        def _update_states(self, scheduler_output: Any) -> Any:
            self.thinkserve.forget(scheduler_output.finished_req_ids)
            for new in scheduler_output.scheduled_new_reqs:
                self.thinkserve.admit(new.req_id, new.sampling_params, new.prompt_token_ids)
            return super()._update_states(scheduler_output)

        def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Ints) -> Any:
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
            if self.thinkserve.busy:
                batch, ends = self.input_batch, np.cumsum(num_scheduled_tokens)
                first = ends - num_scheduled_tokens
                computed = batch.num_computed_tokens_cpu[: len(ends)]
                ids = self.input_ids.gpu[: int(ends[-1])]
                self.thinkserve.prepare(Step(list(batch.req_ids), first, num_scheduled_tokens, computed, ids))
            return prepared

        def sample_tokens(self, grammar_output: Any) -> Any:
            with generators_kept(self):
                output = super().sample_tokens(grammar_output)
            return reported(output, KEY, self.thinkserve.report())

        def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
            self.thinkserve.clear()
            return super()._dummy_run(*args, **kwargs)

    return Runner


def _state_v2(base: type) -> type:
    class State(base):
        """Model runner V2's per-model hook: requests (again after preemption) and rows of every batch, dummies too."""

        def add_request(self, req_index: int, new_req_data: Any) -> Any:
            # After preemption these are the prompt and all that was generated.
            tokens = new_req_data.prefill_token_ids or new_req_data.prompt_token_ids
            self.thinkserve.admit(new_req_data.req_id, new_req_data.sampling_params, tokens)
            return super().add_request(req_index, new_req_data)

        def remove_request(self, req_id: str) -> Any:
            self.thinkserve.forget((req_id,))
            return super().remove_request(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            if self.thinkserve.busy:
                batch = input_batch
                first = batch.query_start_loc_np[: len(batch.req_ids)]
                computed, ids = batch.num_computed_tokens_np, batch.input_ids[: batch.num_tokens]
                self.thinkserve.prepare(Step(list(batch.req_ids), first, batch.num_scheduled_tokens, computed, ids))
            return super().prepare_inputs(input_batch, req_states)

    return State


def _runner_v2(base: type) -> type:
    class Runner(base):
        def sample_tokens(self, grammar_output: Any) -> Any:
            output = super().sample_tokens(grammar_output)
            return reported(output, KEY, self.thinkserve.report())

    return Runner


def _worker(base: type) -> type:
    class Worker(base):
        """vLLM's worker with our parts; its extra methods are called through `collective_rpc`."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            loaded = super().load_model(*args, **kwargs)
            with noted():
                attach(self)
            return loaded

        def call_part(self, kind: str, method: str, *args: Any) -> Any:
            """Call a method of one of our parts, named by its class."""
            return getattr(self.model_runner.thinkserve.part(kind), method)(*args)

    return Worker


def __getattr__(name: str) -> Any:
    # vLLM resolves `worker_cls` by name in every worker process; this module stays cheap to import elsewhere.
    if name == "CpuWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        return _worker(CPUWorker)
    if name == "GpuWorker":
        from vllm.v1.worker.gpu_worker import Worker

        return _worker(Worker)
    raise AttributeError(name)
