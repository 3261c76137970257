"""How each family of process reward models reads a solution: its tokens, and where the rewards of the steps stand.

A path is a prompt made of the question and then the steps, one after the other. Every family is causal, so the reward
of a step does not depend on what follows it, and paths that begin alike share their tokens. The families differ in the
prompt, in what stands between the steps, and in how the logits at the end of a step become a probability. A model's
family is that of its architecture, unless `reward.json` in its folder names another ({"format": "thinkserve"}).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.strategies.engine import Path, Tokens

FILE = "reward.json"
Encode = Callable[[str], Tokens]
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """A path as a reward model reads it; `ends[i]` is the position of the token that holds the reward of step i."""

    tokens: Tokens
    ends: tuple[int, ...]

    def within(self, context: int) -> Reading:
        """Only the whole steps that fit into `context` tokens."""
        ends = tuple(end for end in self.ends if end < context)
        return Reading(self.tokens[: ends[-1] + 1] if ends else (), ends)


@dataclass(frozen=True, slots=True)
class Format:
    """One family.

    The prompt is a chat, opened by `system` if there is one, or what `plain` makes of the tokenizer's text for the
    beginning of a sequence and the question. `marker` is written behind each step, whose own blank space at the end it
    replaces, in tokens of its own; without one, steps are read as they were written. `probability` turns the `labels`
    logits of a token into a reward.
    """

    name: str
    labels: int
    probability: Callable[[Sequence[float]], float]
    system: str | None = None
    plain: Callable[[str, str], str] | None = None
    marker: str = ""

    def messages(self, question: str) -> Messages:
        """The chat whose reply is the solution."""
        user = {"role": "user", "content": question}
        return (user,) if self.system is None else ({"role": "system", "content": self.system}, user)

    def read(self, prompt: Tokens, path: Path, encode: Encode) -> Reading:
        """The whole path. Each step is tokenized on its own, so that a longer path begins with the tokens it had."""
        tokens, ends = list(prompt), list[int]()
        for step in path.steps:
            tokens += self._marked(step, encode) if self.marker else encode(step)
            ends.append(len(tokens) - 1)
        return Reading(tuple(tokens), tuple(ends))

    def _marked(self, step: str, encode: Encode) -> Iterator[int]:
        """The step and its marker, each by itself: a tokenizer may make one token of a full stop and a line break.

        So are markers within the step, as where a family's own code cuts a solution at every line break.
        """
        for part in step.rstrip().split(self.marker):
            yield from encode(part) if part else ()
            yield from encode(self.marker)


def right(logits: Sequence[float]) -> float:
    """The probability of the second of two labels, which is "right"."""
    return sigmoid((logits[1] - logits[0],))


def sigmoid(logits: Sequence[float]) -> float:
    """The probability that a single value stands for."""
    value = logits[0]
    if math.isnan(value):
        return value
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))


FORMATS = (
    # Ours (train/prm): the chat of the solver with its thinking open, the steps as it wrote them.
    Format("thinkserve", 2, right),
    # Qwen2.5-Math-PRM (arXiv:2501.07301): its model card's system prompt, a marker behind every step.
    Format(
        "qwen2.5-math-prm", 2, right, marker="<extra_0>",
        system="Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    # Skywork-o1-Open-PRM: no chat; the question on a line of its own, then the steps with their values at line breaks.
    Format("skywork-o1-prm", 1, sigmoid, plain=lambda begin, question: f"{begin}{question}\n", marker="\n"),
)  # fmt: skip
ARCHITECTURES = {
    "Qwen3ForTokenClassification": "thinkserve",
    "Qwen2ForTokenClassification": "thinkserve",
    "Qwen2ForProcessRewardModel": "qwen2.5-math-prm",
    "Qwen2ForRewardModel": "skywork-o1-prm",
    "Qwen2ForPrmModel": "skywork-o1-prm",
}


def is_reward_model(model: ModelDir) -> bool:
    """Whether the model rates steps, so that it cannot write."""
    return model.architecture in ARCHITECTURES or (model.path / FILE).is_file()


def format_of(model: ModelDir) -> Format:
    """The family of a reward model. Raises StartError for a model that is none."""
    file, known = model.path / FILE, {each.name: each for each in FORMATS}
    try:
        content: object = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise StartError(f"Cannot read {file}: {error}") from error
    named = content.get("format") if isinstance(content, dict) else None
    name = named or ARCHITECTURES.get(model.architecture)
    if name is None:
        kinds = ", ".join(ARCHITECTURES)
        raise StartError(f"{model.path} ({model.architecture}) is no process reward model; known are {kinds}")
    if name not in known:
        raise StartError(f"{file}: unknown format {name!r}; known are {', '.join(known)}")
    return known[name]
