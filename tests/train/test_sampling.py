"""Evaluation asks the model what training showed it, token for token."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

from thinkserve.train.data import spans_of
from thinkserve.train.evaluate import Evaluation
from thinkserve.train.side_tasks import exists
from thinkserve.train.tasks import problems

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENIZER = Tokenizer.from_file(str(MODELS / "arith-small" / "tokenizer.json"))


class Oracle:
    """A sampler that knows the answers by heart and is wrong about every third prompt."""

    def __init__(self, replies: list[str]) -> None:
        self.replies = replies
        self.prompts: list[list[int]] = []

    def __call__(self, prompts: list[list[int]], *, temperature: float, seed: int, most: int = 1024) -> list[list[int]]:
        self.prompts += prompts
        texts = [reply if i % 3 else "\\boxed{nothing}" for i, reply in enumerate(self.replies[: len(prompts)])]
        return [TOKENIZER.encode(text + "<|im_end|>").ids for text in texts]


def test_solutions_are_judged_by_their_last_boxed_answer() -> None:
    """Two of three right, and the lengths are those of the completions."""
    tasks = problems("medium", 30, 1000)
    oracle = Oracle([f"I first said \\boxed{{0}}. The answer is \\boxed{{{p.answer}}}." for p in tasks])
    trials = Evaluation(oracle, TOKENIZER).solve(tasks, 0.0)
    assert [i % 3 != 0 for i in range(30)] == [trial.right for trial in trials]
    assert all(trial.tokens > 5 for trial in trials)
    assert TOKENIZER.decode(oracle.prompts[0], skip_special_tokens=False) == (
        f"<|im_start|>user\n{tasks[0].question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_a_side_task_is_asked_with_its_thinking_closed() -> None:
    """The prompt ends where the reply begins; of a reply to a yes/no question the first word counts."""
    evaluation = Evaluation(Oracle([]), TOKENIZER)
    document = exists(problems("medium", 1, 1)[0], random.Random(1))
    prompt = TOKENIZER.decode(evaluation.full(document), skip_special_tokens=False)
    assert prompt + document.answer + "<|im_end|>\n" == "".join(text for text, _ in spans_of(document))
    always_yes = Evaluation(Oracle(["Yes"] * 300), TOKENIZER)
    assert 0.1 < always_yes.side(exists, "medium", 60)["value"] < 0.6
