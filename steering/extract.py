"""Where vectors come from: pairs of a short and a long thought about one question, and the states behind them.

    asc:         v = mean over questions of  h(q + concise thought)[-1] - h(q + verbose thought)[-1]
                 the thoughts are given (a pairs file), or the model's own with and without a request for brevity
    efficiency:  the same for the shortest and the longest of the model's own correct answers to q

h is the output of a block. ASC: arXiv:2507.04742, section 4; it takes the last token. Efficiency Steering:
arXiv:2506.15647. Beside the last token the mean over the thought is taken and, where the model was asked for brevity,
the last token of the prompts alone: asked - not asked. The vector is stored raw, because a strength means nothing
without its norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thinkserve.steering.model import Model
from thinkserve.steering.questions import Question
from thinkserve.steering.vector_file import CONVENTION, BadVector, VectorFile, view
from thinkserve.steering.writer import Vectors, Writer, Written

Recipe = Literal["asc", "efficiency"]
Position = Literal["last", "mean", "prompt"]
TEMPERATURE = 0.7
MIN_RATIO = 1.5  # of the longest to the shortest correct answer: below it, a pair says little about length
MIN_PAIRS = 4


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids: a prompt, a short and a long thought after it, and the prompt that asked for the short one."""

    prompt: list[int]
    concise: list[int]
    verbose: list[int]
    asked: tuple[int, ...] = ()


def given_pairs(model: Model, questions: Sequence[Question]) -> list[Pair]:
    """The pairs of a file. Raises BadVector for a question without both thoughts."""
    pairs: list[Pair] = []
    for question in questions:
        if question.concise is None or question.verbose is None:
            raise BadVector(f"a pair needs concise and verbose thoughts: {question.text[:60]}")
        thoughts = model.encode(question.concise), model.encode(question.verbose)
        if not all(thoughts):
            raise BadVector(f"a thought is empty: {question.text[:60]}")
        pairs.append(Pair(model.prompt(question.text), *thoughts))
    return pairs


def own_pairs(model: Model, writer: Writer, questions: Sequence[Question], seed: int, most: int) -> list[Pair]:
    """ASC from the model's own thoughts, asked with and without a request for brevity; both must lead to the answer."""
    plain = _sampled(writer, [model.prompt(q.text) for q in questions], seed, most)
    brief = _sampled(writer, [model.prompt(q.brief) for q in questions], seed + 1, most)
    both = zip(questions, brief, plain, strict=True)
    return [
        Pair(model.prompt(question.text), short.thinking, long.thinking, tuple(model.prompt(question.brief)))
        for question, short, long in both
        if _right(model, question, short)
        and _right(model, question, long)
        and 0 < len(short.thinking) < len(long.thinking)
    ]


def efficiency_pairs(
    model: Model, writer: Writer, questions: Sequence[Question], samples: int, seed: int, most: int
) -> list[Pair]:
    """Shortest against longest correct of `samples` answers, within one question and at least MIN_RATIO apart."""
    prompts = [model.prompt(question.text) for question in questions]
    written = _sampled(writer, [prompt for prompt in prompts for _ in range(samples)], seed, most)
    pairs: list[Pair] = []
    for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        group = written[index * samples : (index + 1) * samples]
        right = sorted((w.thinking for w in group if w.thinking and _right(model, question, w)), key=len)
        if len(right) > 1 and len(right[-1]) >= MIN_RATIO * len(right[0]):
            pairs.append(Pair(prompt, right[0], right[-1]))
    return pairs


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean difference per layer, [hidden] float32, and how well the single pairs agree with it."""

    vectors: Mapping[int, Tensor]
    agreement: Mapping[int, float]


def differences(model: Model, pairs: Sequence[Pair], layers: Sequence[int]) -> dict[Position, Difference]:
    """concise - verbose at each position, "prompt" only where brevity was asked for.

    Raises BadVector when there are too few pairs to mean anything.
    """
    if len(pairs) < MIN_PAIRS:
        raise BadVector(f"only {len(pairs)} usable pairs; at least {MIN_PAIRS} are needed: give more questions")
    rows: dict[Position, list[Tensor]] = {"last": [], "mean": []}
    if all(pair.asked for pair in pairs):
        rows["prompt"] = [
            model.states([], list(pair.asked), layers)[0] - model.states([], pair.prompt, layers)[0] for pair in pairs
        ]
    for pair in pairs:
        short, long = (model.states(pair.prompt, thought, layers) for thought in (pair.concise, pair.verbose))
        rows["last"].append(short[0] - long[0])
        rows["mean"].append(short[1] - long[1])
    return {position: _difference(torch.stack(each), layers) for position, each in rows.items()}


def sign_check(
    writer: Writer, prompts: Sequence[list[int]], vectors: Vectors, scale: float, most: int
) -> dict[str, Any]:
    """Mean greedy length with +scale, without, and with -scale; `ok` when a larger scale is shorter throughout.

    Published code adds and published code subtracts; only the model can tell which way a vector points.
    """
    runs = {sign: writer.write(prompts, vectors, sign * scale, most=most) for sign in (1, 0, -1)}
    shorter, plain, longer = (sum(len(w.tokens) for w in runs[sign]) / len(prompts) for sign in (1, 0, -1))
    lengths = {"plus": round(shorter, 1), "zero": round(plain, 1), "minus": round(longer, 1)}
    return {"scale": scale, "questions": len(prompts), "tokens": lengths, "ok": shorter < plain < longer}


def to_file(difference: Difference, about: Mapping[str, Any]) -> VectorFile:
    """The vector as it is stored."""
    agreement = {str(layer): round(value, 4) for layer, value in difference.agreement.items()}
    return VectorFile(to_layers(difference.vectors), {"convention": CONVENTION, "agreement": agreement, **about})


def to_layers(vectors: Vectors) -> dict[int, memoryview[float]]:
    """Tensors as a file holds them: [hidden] float32 per layer."""
    return {n: view(v.detach().float().cpu().contiguous().numpy().tobytes()) for n, v in vectors.items()}


def to_tensors(layers: Mapping[int, memoryview[float]]) -> dict[int, Tensor]:
    """A stored vector as [hidden] tensors per layer."""
    return {layer: torch.tensor(list(vector)) for layer, vector in layers.items()}


def _difference(rows: Tensor, layers: Sequence[int]) -> Difference:
    """From the rows of all pairs, [pairs, layers, hidden]."""
    mean = rows.mean(0)
    cosines = torch.cosine_similarity(rows, mean[None], dim=-1).mean(0)
    indexed = list(enumerate(layers))
    return Difference({n: mean[i] for i, n in indexed}, {n: float(cosines[i]) for i, n in indexed})


def _sampled(writer: Writer, prompts: Sequence[list[int]], seed: int, most: int) -> list[Written]:
    return writer.write(prompts, temperature=TEMPERATURE, seed=seed, most=most)


def _right(model: Model, question: Question, written: Written) -> bool:
    return written.closed and question.check(model.decode(written.tokens))
