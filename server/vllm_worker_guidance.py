"""The part `guidance`: budget guidance of requests that ask, one batched predictor call a step (arXiv:2506.13752).

A request is guided at its first thinking token and at each one that follows a token with a line break, until the end of
thinking. There the raw logits become log-probabilities of the guided distribution, times the request's temperature, so
that the sampler, which divides by it, draws from the distribution as published; masks, grammars and biases act after
that, and so do top-p, top-k and penalties, which the paper's code skips. Rows that are not guided are not written.

A token that guidance leaves (next to) nothing is written as the model has it, BELOW what is guided and at most SPREAD
further down. Such tokens are exp(-BELOW / temperature) of all draws, 1e-11 where it is 2; where masks leave no others,
the model's own order counts; and as a whole row lies closer together than 100, a bias of 100 forces, of -100 bans any.

vLLM's log-probabilities are of these logits as they are: where a temperature makes a difference, the logarithm of their
sum is reported, with which the front end makes of them those that were drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinkserve.guidance.checkpoint import About, load
from thinkserve.guidance.predictor import Predictor
from thinkserve.kernels.guide import guide
from thinkserve.server.vllm_worker import GUIDED, Step
from thinkserve.server.vllm_worker_states import States, graft_norms
from thinkserve.server.vllm_worker_stats import to_host

GUIDE = "guide"
# Distances of logits, before the sampler divides them by the temperature. Their sum is less than a bias may be.
BELOW, SPREAD = 50.0, 35.0


@dataclass(slots=True)
class _Guided:
    """One request: thinking is open from position `start` on (None: not yet), for `budget` tokens.

    Where earlier jobs have `begun` it, what stands before `start` is thinking too, and a line may go on there. `told`:
    its log-probabilities have to be put right.
    """

    budget: int
    temperature: float
    start: int | None
    begun: bool
    told: bool = False
    closed: bool = False

    def see(self, position: int, token: int, open_: int, close: int) -> None:
        """Take note of a token behind the prompt."""
        if self.start is None:
            self.start = position + 1 if token == open_ else None
        elif position >= self.start and token == close:
            self.closed = True


class Guidance:
    """Implements Part. A request's `guide` is {"budget", "start", "open", "begun"}.

    open: -1 where thinking is open at start; begun: there are tokens of it before that.
    """

    def __init__(self, predictor: Predictor, about: About, states: States) -> None:
        self._predictor = predictor
        self._close = about.close
        self._newlines = frozenset(about.newlines)
        self._lam_min = about.lam_min
        self._states = states
        self._asked: dict[str, tuple[_Guided, int]] = {}
        self._rows: list[int] = []
        self._remaining: list[float] = []
        self._temperature: list[float] = []
        # Which of the guided rows are told, by request id; and their sums.
        self._told: dict[str, int] = {}
        self._sums: Callable[[], list[list[float]]] | None = None

    @property
    def busy(self) -> bool:
        """Whether any live request is guided, or the last step's rows are still wanted."""
        return bool(self._asked) or self._states.count > 0

    def admit(self, request_id: str, asked: Mapping[str, Any], params: Any, tokens: list[int]) -> None:
        """Note a request; what it has generated before (preemption, resubmission) is in `tokens`."""
        wanted = asked.get(GUIDE)
        if not wanted:
            self.forget((request_id,))
            return
        opens = int(wanted["open"])
        start = int(wanted["start"])
        # A greedy sampler divides by nothing.
        begins = start if opens < 0 else None
        temperature = params.temperature or 1.0
        told = params.logprobs is not None and temperature != 1.0
        state = _Guided(int(wanted["budget"]), temperature, begins, bool(wanted["begun"]), told)
        for position, token in enumerate(tokens[start:], start):
            state.see(position, token, opens, self._close)
        self._asked[request_id] = state, opens

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for request_id in request_ids:
            self._asked.pop(request_id, None)

    def prepare(self, step: Step) -> None:
        """Find the rows whose next token is guided, by request id and absolute position."""
        live = [(row, *self._asked[i]) for row, i in enumerate(step.request_ids) if i in self._asked]
        rows = [int(step.first_row[row] + step.count[row] - 1) for row, _, _ in live]
        # On a GPU this waits for the last step's tokens, in steps with a guided request only.
        tokens = step.ids[rows].tolist() if rows else []
        self._rows, self._remaining, self._temperature, wanted = [], [], [], []
        self._told, self._sums = {}, None
        for (row, state, opens), last, token in zip(live, rows, tokens, strict=True):
            position = int(step.position[row] + step.count[row] - 1)
            state.see(position, token, opens, self._close)
            if self._at_line_start(state, position, token):
                if state.told:
                    self._told[step.request_ids[row]] = len(self._rows)
                self._rows.append(row)
                self._remaining.append(float(max(1, state.budget - (position + 1 - (state.start or 0)))))
                self._temperature.append(state.temperature)
                wanted.append(last)
        self._states.want(wanted)

    def _at_line_start(self, state: _Guided, position: int, token: int) -> bool:
        if state.start is None or state.closed or position + 1 < state.start:
            return False
        return token in self._newlines or (position + 1 == state.start and not state.begun)

    def logits(self, step: Step, logits: Tensor) -> Tensor:
        """Replace the guided rows of logits [requests, vocabulary + padding]."""
        if not self._rows:
            return logits
        # As the sampler will have them: so far from 0, 16 bits would not tell one token from another.
        logits = logits.float()
        alpha, rate = self._predictor(self._states.taken())
        device, vocabulary = logits.device, alpha.shape[-1]
        rows = torch.tensor(self._rows, device=device)
        raw = logits[rows, :vocabulary]
        remaining = torch.tensor(self._remaining, device=device)
        guided = guide(raw, alpha, rate, remaining, lam_min=self._lam_min)
        logits[rows, :vocabulary] = final = written(guided, raw, torch.tensor(self._temperature, device=device))
        if self._told:
            self._sums = to_host(final.logsumexp(1, keepdim=True))
        logits[rows, vocabulary:] = float("-inf")
        self._rows = []
        return logits

    def report(self) -> Callable[[], Mapping[str, Mapping[str, Any]]] | None:
        """By how much the log-probabilities of a step's tokens are off, where they are."""
        told, sums, self._sums = self._told, self._sums, None
        if sums is None:
            return None
        return lambda: {name: {GUIDED: found[row][0]} for found in (sums(),) for name, row in told.items()}

    def clear(self) -> None:
        """A dummy pass: no row is anybody's."""
        self._rows, self._sums = [], None
        self._states.want([])


def written(guided: Tensor, raw: Tensor, temperature: Tensor) -> Tensor:
    """Logits [rows, V] to sample from: `guided` log-probabilities times `temperature` [rows], no token too far down.

    Raw logits of -inf, which nobody may draw, stay -inf.
    """
    own = (temperature[:, None] * raw.log_softmax(-1)).clamp_min(-SPREAD).masked_fill(raw.isneginf(), float("-inf"))
    return torch.maximum(temperature[:, None] * guided, own - BELOW)


def make(worker: Any, model: Any, options: Mapping[str, Any]) -> Guidance:
    """The part of a worker; `options` name the predictor's folder. Raises ValueError where it cannot work."""
    config = worker.vllm_config
    predictor, about = load(Path(options["folder"]))
    states = graft_norms(model, config.scheduler_config.max_num_seqs, config.compilation_config)
    count, _, hidden = states.out.shape
    if (about.size.states, about.size.hidden) != (count, hidden):
        raise ValueError(f"the budget predictor is made for another model: {options['folder']}")
    device = states.out.device
    # The paper runs it in the model's type; on a CPU float32 is faster.
    predictor = predictor.to(device, states.out.dtype if device.type == "cuda" else torch.float32)
    # The kernel is built on first use, which no request should wait for.
    one = torch.ones(1, about.size.vocabulary, device=device)
    guide(one, 20 * one, 20 * one, one[:, 0])
    return Guidance(predictor, about, states)
