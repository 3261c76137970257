"""Training of the predictor on a frozen model's own traces, with the Gamma negative log-likelihood (arXiv:2506.13752).

The target at a thinking position is the number L of thinking tokens that are left, the closing tag included, so that
the position that predicts the tag has L = 1; only the token that did come next is learned from. Beyond the paper:
positions at a line start, the only ones asked for in serving, are all used and others are a sample; and at each of them
the closing tag is learned too, because whenever it comes next, L is 1.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinkserve.guidance.predictor import Predictor, Size, gamma_nll
from thinkserve.guidance.traces import BadTraces, Trace

# States kept at once: as many traces as fit are a pool, learned from `epochs` times before the next one's are computed.
POOL_BYTES = 2**31
# All states of all tokens of one forward pass of the base model; a single trace may need more.
PASS_BYTES = 2**31
SEQUENCES = 8  # traces in one forward pass at most


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: on batches of `batch` positions; `others` is the share of positions within a line that are used.

    Traces are cut to `longest` tokens for learning. `close_weight` is the weight of the closing tag's own loss beside
    that of the tokens that came.
    """

    epochs: int = 10
    lr: float = 1e-3
    warmup: float = 0.05
    batch: int = 256
    others: float = 0.1
    longest: int = 8192
    held_out: float = 0.05
    close_weight: float = 0.25
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a trace: absolute index of the last token seen, the token that came, how many were left with it."""

    at: int
    token: int
    left: int
    line_start: bool


def positions(trace: Trace, close: int, newlines: frozenset[int]) -> list[Position]:
    """The thinking positions of a trace; none if its thinking has no end."""
    written = trace.completion or ()
    if close not in written:
        return []
    end, first = written.index(close), len(trace.prompt) - 1
    return [
        Position(first + i, written[i], end - i + 1, line_start=i == 0 or written[i - 1] in newlines)
        for i in range(end + 1)
    ]


@dataclass(frozen=True, slots=True)
class Data:
    """Positions to learn from: their states [positions, states, hidden], next tokens, log(L + 1), and line starts."""

    states: Tensor
    token: Tensor
    x: Tensor
    line_start: Tensor

    def at(self, index: Tensor) -> Data:
        """Some of them."""
        return Data(self.states[index], self.token[index], self.x[index], self.line_start[index])


Chosen = list[tuple[Trace, list[Position]]]


class Fit:
    """One training, in memory, on the GPU if there is one; `state` and `restore` make it resumable.

    Raises BadTraces when the traces are too few.
    """

    def __init__(
        self, folder: Path, traces: list[Trace], recipe: Recipe, close: int, newlines: tuple[int, ...]
    ) -> None:
        from transformers import AutoModel

        torch.manual_seed(recipe.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe, self.close, self._newlines = recipe, close, frozenset(newlines)
        usable = [t for t in traces if close in (t.completion or ()) and 0 < len(t.prompt) <= recipe.longest]
        prompts = list(dict.fromkeys(trace.prompt for trace in usable))
        if len(prompts) < 2:
            found = f"{len(usable)} of {len(traces)} traces have a prompt of 1 to {recipe.longest} tokens"
            raise BadTraces(f"{found} and end their thinking; training needs some of two prompts at least")
        rng = random.Random(recipe.seed)
        rng.shuffle(prompts)
        # Several traces of one prompt stand on one side: what is held out has not been learned from.
        held = set(prompts[: max(1, round(recipe.held_out * len(prompts)))])
        self.held_out = self.choose([trace for trace in usable if trace.prompt in held], None)
        self.traces = self.choose([trace for trace in usable if trace.prompt not in held], rng)
        # A GPU serves the model in 16 bits, and these are the states that the predictor will see.
        kind = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        base: Any = AutoModel.from_pretrained(folder, dtype=kind)
        self.base: Any = base.to(self.device).eval().requires_grad_(False)
        config = self.base.config.get_text_config()
        size = Size.of(config.hidden_size, config.num_hidden_layers, config.vocab_size)
        self.predictor = Predictor(size).to(self.device)
        self.optimizer = torch.optim.AdamW(self.predictor.parameters(), lr=recipe.lr, weight_decay=0.0)
        self._pools = list(self._pooled(self.traces))
        self.step = 0
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(map(self._steps, self._pools))

    def choose(self, traces: list[Trace], rng: random.Random | None) -> Chosen:
        """The positions of each trace: all line starts, and with an `rng` the sample of others."""
        share = self.recipe.others

        def used(place: Position) -> bool:
            return place.at < self.recipe.longest and (place.line_start or (rng is not None and rng.random() < share))

        return [(t, [p for p in positions(t, self.close, self._newlines) if used(p)]) for t in traces]

    def _room(self, size: int) -> int:
        """Positions whose states take so many bytes."""
        return max(1, size // (4 * self.predictor.size.states * self.predictor.size.hidden))

    def _pooled(self, chosen: Chosen) -> Iterator[Chosen]:
        most = self._room(POOL_BYTES)
        pool, count = Chosen(), 0
        for trace, places in chosen:
            if pool and count + len(places) > most:
                yield pool
                pool, count = [], 0
            pool.append((trace, places))
            count += len(places)
        yield pool

    def _steps(self, pool: Chosen) -> int:
        return self.recipe.epochs * -(-sum(len(places) for _, places in pool) // self.recipe.batch)

    def data(self, chosen: Chosen) -> Data:
        """Positions with the base model's states."""
        near = sorted(chosen, key=lambda pair: pair[1][-1].at)
        states = [self._states(few) for few in self._passes(near)]
        places = [place for _, found in near for place in found]
        on = self.device
        return Data(
            torch.cat(states),
            torch.tensor([place.token for place in places], device=on),
            torch.tensor([place.left + 1.0 for place in places], device=on).log(),
            torch.tensor([place.line_start for place in places], device=on),
        )

    def _passes(self, near: Chosen) -> Iterator[Chosen]:
        """Traces, sorted by their length, that go through the base model together."""
        few, most = Chosen(), self._room(PASS_BYTES)
        for trace, places in near:
            if few and (len(few) == SEQUENCES or (len(few) + 1) * (places[-1].at + 1) > most):
                yield few
                few = []
            few.append((trace, places))
        yield few

    @torch.no_grad()
    def _states(self, chosen: Chosen) -> Tensor:
        rows = [(trace.prompt + (trace.completion or ()))[: places[-1].at + 1] for trace, places in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        row = torch.tensor([row for row, (_, places) in enumerate(chosen) for _ in places], device=self.device)
        time_ = torch.tensor([place.at for _, places in chosen for place in places], device=self.device)
        # Causal: the padding on the right is seen by nobody who counts.
        out = self.base(ids, output_hidden_states=True, use_cache=False)
        return torch.stack([hidden[row, time_].float() for hidden in out.hidden_states], 1)

    def train(self) -> Iterator[float]:
        """Go on to the end; yields the loss of every step in nats per position. The same each time it is begun."""
        done = 0
        for number, pool in enumerate(self._pools):
            if self.step < done + self._steps(pool):
                began = time.monotonic()
                data = self.data(pool)
                self.seconds += time.monotonic() - began
                yield from self._train_on(data, number, self.step - done)
            done += self._steps(pool)

    def _train_on(self, data: Data, number: int, skip: int) -> Iterator[float]:
        size = len(data.token)
        per_epoch = -(-size // self.recipe.batch)
        for step in range(skip, self.recipe.epochs * per_epoch):
            began = time.monotonic()
            epoch, index = divmod(step, per_epoch)
            seed = self.recipe.seed + 1000 * number + epoch
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(self.device)
            loss = self._update(data.at(order[index * self.recipe.batch : (index + 1) * self.recipe.batch]))
            self.step += 1
            self.seconds += time.monotonic() - began
            yield loss

    def _update(self, batch: Data) -> float:
        seen = self.predictor.encode(batch.states)
        loss = gamma_nll(*self.predictor.chosen(seen, batch.token), batch.x).mean()
        border = seen[batch.line_start]
        closing = torch.full((len(border),), self.close, device=self.device)
        one = torch.full((len(border),), 2.0, device=self.device).log()
        close_loss = gamma_nll(*self.predictor.chosen(border, closing), one).sum() / len(seen)
        torch.autograd.backward(loss + self.recipe.close_weight * close_loss)
        torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * min(1.0, (self.step + 1) / max(1.0, self.recipe.warmup * self.steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """On held-out traces, at line starts: nats per position, and how often L is below three predicted quantiles."""
        said = [self._said(self.data(pool)) for pool in self._pooled(self.held_out)]
        alpha, rate, x = (torch.cat(part) for part in zip(*said, strict=True))
        level = torch.special.gammainc(alpha.double(), rate.double() * x.double())
        below = {f"below_{q}": round(float((level <= q).double().mean()), 4) for q in (0.1, 0.5, 0.9)}
        # Untrained tokens have rates below 1: a mask at this quantile still tells them from those that do occur.
        lowest = float(rate.quantile(0.01))
        return {
            "rate_1%": round(lowest, 3),
            "nats": round(float(gamma_nll(alpha, rate, x).mean()), 4),
            "positions": len(level),
            **below,
        }

    def _said(self, data: Data) -> tuple[Tensor, Tensor, Tensor]:
        """Shape, rate and log(L + 1) of each position, on the CPU."""
        seen = torch.cat([self.predictor.encode(states) for states in torch.split(data.states, self.recipe.batch)])
        alpha, rate = self.predictor.chosen(seen, data.token)
        return alpha.cpu(), rate.cpu(), data.x.cpu()

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs."""
        return {
            "recipe": asdict(self.recipe),
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "at": (self.step, self.seconds),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises BadTraces when it belongs to another training."""
        if state["recipe"] != asdict(self.recipe):
            raise BadTraces(f"an unfinished training with other settings is there: {json.dumps(state['recipe'])}")
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["at"]
