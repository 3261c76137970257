"""The reward model: what it reads, what it learns from, how it is measured."""

from __future__ import annotations

import json
import math
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForTokenClassification

from thinkserve.server.reward_formats import FORMATS
from thinkserve.strategies.engine import Path as Steps
from thinkserve.strategies.rewards import solution_steps
from thinkserve.train import prm_eval, vllm_sample
from thinkserve.train.export import load
from thinkserve.train.loop import Recipe
from thinkserve.train.model import IGNORE, SHAPES, Model, Shape, rotate, rotations
from thinkserve.train.prm import FORMAT as WRITTEN
from thinkserve.train.prm import RewardModel, export, load_reward
from thinkserve.train.prm_chains import (
    Chain,
    evaluation_tasks,
    prompt_of,
    read_chains,
    training_tasks,
    write_chains,
)
from thinkserve.train.prm_data import LessonBatcher, encode_steps, noisy, written
from thinkserve.train.prm_eval import Scored, Verdict, auroc
from thinkserve.train.prm_lesson import Lesson, LessonRun, final_states
from thinkserve.train.step_labels import label_steps, steps_of
from thinkserve.train.tasks import problems, split_of

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENIZER = Tokenizer.from_file(str(MODELS / "arith-small" / "tokenizer.json"))
TINY = Shape("tiny", hidden=64, layers=2, feed_forward=96, heads=4, kv_heads=2, head_dim=16)
FORMAT = next(each for each in FORMATS if each.name == WRITTEN["format"])
seeds = st.integers(0, 2**32)


def tiny() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(Model(TINY)).eval()


def chain(seed: int) -> Chain:
    return written(random.Random(seed))


def tokens(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


def test_an_exported_reward_model_is_a_token_classifier(tmp_path: Path) -> None:
    """transformers loads it and gives our rewards; it says how chains must be written for it; it is stored in bf16."""
    model = tiny()
    export(model.state_dict(), TINY, TOKENIZER, tmp_path / "prm")
    hf = AutoModelForTokenClassification.from_pretrained(tmp_path / "prm", dtype=torch.float32).eval()
    ours, _ = load_reward(tmp_path / "prm")
    ids = torch.tensor([tokens(prompt_of("Q") + "1+1=2\n\n" * 40)])
    with torch.inference_mode():
        expected = hf(ids).logits.softmax(-1)[..., 1]
        torch.testing.assert_close(ours.rewards(ids, *rotations(ids.shape[1], 16)), expected, atol=1e-4, rtol=1e-3)
    assert {0: "wrong", 1: "right"} == hf.config.id2label
    assert ["Qwen3ForTokenClassification"] == json.loads((tmp_path / "prm" / "config.json").read_text())[
        "architectures"
    ]
    assert {"format": "thinkserve"} == json.loads((tmp_path / "prm" / "reward.json").read_text())
    stored = load_file(tmp_path / "prm" / "model.safetensors")
    assert {torch.bfloat16} == {weight.dtype for weight in stored.values()}
    assert {"score.weight", "score.bias"} == {name for name in stored if not name.startswith("model.")}


@given(seeds)
def test_the_model_reads_what_a_server_gives_it(seed: int) -> None:
    """The same tokens and ends of steps as from a server, which has the text without tags; a label at each end."""
    one = chain(seed)
    ids, labels = encode_steps(TOKENIZER, one, 4096)
    text = TOKENIZER.decode(tokens(one.text), skip_special_tokens=True)
    prompt, path = tuple(tokens(prompt_of(one.question))), Steps(solution_steps(text))
    reading = FORMAT.read(prompt, path, lambda step: tuple(tokens(step)))
    assert reading.tokens == tuple(ids)
    assert list(reading.ends) == [at for at, label in enumerate(labels) if label != IGNORE]
    assert [step.right for step in label_steps(one.problem, one.text)] == [bool(labels[at]) for at in reading.ends]


@given(seeds, st.integers(60, 400))
def test_a_long_chain_is_cut_between_steps(seed: int, longest: int) -> None:
    """What fits is whole steps, each with its label."""
    one = chain(seed)
    ids, labels = encode_steps(TOKENIZER, one, longest)
    whole, _ = encode_steps(TOKENIZER, one, 4096)
    prompt = len(tokens(prompt_of(one.question)))
    assert len(ids) <= max(longest, prompt)
    assert whole[: len(ids)] == ids
    assert labels[-1] != IGNORE or len(ids) == prompt


def test_traces_to_learn_from_hold_right_and_wrong_steps() -> None:
    """Both in plenty, in all kinds of problem, and only of training questions."""
    chains = [chain(seed) for seed in range(300)]
    steps = [step.right for one in chains for step in label_steps(one.problem, one.text)]
    assert 0.6 < sum(steps) / len(steps) < 0.9
    assert {"chain", "expression", "swaps"} == {one.problem.kind for one in chains}
    assert {"train"} == {split_of(one.problem.question) for one in chains}


@settings(max_examples=5)
@given(seeds)
def test_a_restored_batcher_goes_on_with_the_next_batch(seed: int) -> None:
    """Chains and traces alike; a label belongs to the token above it, and none to padding."""
    chains = [chain(seed + 1), chain(seed + 2)]
    batcher = LessonBatcher(TOKENIZER, chains, 2048, 512, seed)
    ids, labels = batcher.batch(0.9)
    known = labels != IGNORE
    assert set(labels[known].tolist()) <= {0, 1}
    assert set(ids[known].tolist()) <= {tokens(end)[0] for end in ("\n\n", "\n", ".")}
    copy = LessonBatcher(TOKENIZER, chains, 2048, 512, seed=0)
    copy.restore(deepcopy(batcher.state()))
    for _ in range(20):
        for ours, theirs in zip(batcher.batch(0.9), copy.batch(0.9), strict=True):
            assert torch.equal(ours, theirs)


def test_at_first_there_are_no_labels_but_much_that_is_unexpected() -> None:
    """Tokens behind the question are exchanged for others of the same text; the question stays."""
    batcher = LessonBatcher(TOKENIZER, [], 2048, 512, 1)
    assert (batcher.batch(1.0)[1] >= 0).any()
    batcher = LessonBatcher(TOKENIZER, [], 2048, 512, 1)
    assert all((batcher.batch(0.1)[1] == IGNORE).all() for _ in range(20))
    ids, _ = encode_steps(TOKENIZER, chain(3), 512)
    exchanged = noisy(ids, random.Random(0))
    begin = ids.index(tokens("<think>")[0]) + 1
    assert ids[:begin] == exchanged[:begin]
    assert set(exchanged) <= set(ids)
    assert 0.01 < sum(a != b for a, b in zip(ids, exchanged, strict=True)) / len(ids) < 0.25


def test_a_resumed_run_learns_on(tmp_path: Path) -> None:
    """The loss falls, the trunk stays as it was, and a run that is picked up again is where it stopped."""
    recipe = Recipe("small", minutes=1e9, tokens=20 * 512, batch=512, longest=256, start=MODELS / "arith-small")
    run = LessonRun(recipe, TOKENIZER, tmp_path, [chain(seed) for seed in range(40)])
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    losses = [run.update() for _ in range(20)]
    run.save()
    again = LessonRun(recipe, TOKENIZER, tmp_path, [])
    assert fmean(losses[10:]) < 0.8 * fmean(losses[:5]), losses
    assert again.step == 20
    found = run.model.state_dict()
    assert all(torch.equal(weight, again.model.state_dict()[name]) for name, weight in found.items())
    learned = {name for name, weight in found.items() if not torch.equal(weight, before[name])}
    assert {"reward.score.weight", "reward.model.norm.weight"} < learned
    assert {"6", "7"} == {name.split(".")[3] for name in learned if "layers" in name}
    assert "reward.model.embed_tokens.weight" not in learned


def test_what_was_taught_is_as_loud_as_its_trunk(tmp_path: Path) -> None:
    """The rewards are those of the lesson; the trunk's weights are arith-small's again."""
    start = MODELS / "arith-small"
    lesson = LessonRun(Recipe("small", 1.0, start=start), TOKENIZER, tmp_path / "a", [])
    taught, ids = lesson.taught(), torch.tensor([encode_steps(TOKENIZER, chain(5), 300)[0]])
    angles = rotations(ids.shape[1], SHAPES["small"].head_dim)
    assert isinstance(lesson.model, Lesson)
    with torch.no_grad():
        torch.testing.assert_close(
            taught.rewards(ids, *angles), lesson.model.reward.rewards(ids, *angles), atol=0.02, rtol=0
        )
    stored = load_file(start / "model.safetensors")["model.layers.3.mlp.down_proj.weight"].float()
    torch.testing.assert_close(stored, taught.model.blocks()[3].mlp.down_proj.weight, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def lesson() -> tuple[Lesson, Model, Tensor]:
    trunk, _ = load(MODELS / "arith-small")
    samples = [torch.tensor(encode_steps(TOKENIZER, chain(seed), 512)[0]) for seed in range(10)]
    return Lesson(trunk, samples[1:]), trunk, samples[0]


def test_the_trunk_expects_what_it_expected(lesson: tuple[Lesson, Model, Tensor]) -> None:
    """Below the fresh layers it is the model it came from, only quieter."""
    taught, trunk, ids = lesson
    angles = rotations(len(ids), SHAPES["small"].head_dim)
    with torch.no_grad():
        x: Tensor = taught.reward.model.embed_tokens(ids[None])
        for layer in taught.reward.model.blocks()[: taught.depth]:
            x = layer(x, *angles)
        assert float(x.pow(2).mean().sqrt()) == pytest.approx(4.0, rel=0.5)
        torch.testing.assert_close(taught.chances(x), trunk(ids[None], *angles).softmax(-1), atol=0.03, rtol=0)


def test_the_first_fresh_layer_looks_one_token_back(lesson: tuple[Lesson, Model, Tensor]) -> None:
    """From nearly everywhere, on a document it was not fitted to."""
    taught, trunk, ids = lesson
    attention = taught.reward.model.blocks()[taught.depth].self_attn
    shape, (cos, sin) = attention.shape, rotations(len(ids), SHAPES["small"].head_dim)
    with torch.no_grad():
        x = torch.rms_norm(final_states(trunk, [ids]), (shape.hidden,))
        q = rotate(attention.q_norm(attention.q_proj(x).view(len(ids), -1, shape.head_dim)).transpose(0, 1), cos, sin)
        k = rotate(attention.k_norm(attention.k_proj(x).view(len(ids), -1, shape.head_dim)).transpose(0, 1), cos, sin)
    scores = q[0] @ k[0].T / math.sqrt(shape.head_dim)
    looked = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf).softmax(-1).diagonal(-1)
    assert (looked > 0.5).float().mean() > 0.95


def test_the_second_fresh_layer_listens_for_the_unexpected(lesson: tuple[Lesson, Model, Tensor]) -> None:
    """A state that points against the direction draws half the heads, however far back; no other state does."""
    taught, trunk, ids = lesson
    attention = taught.reward.model.blocks()[taught.depth + 1].self_attn
    shape, count = attention.shape, 1500
    states = torch.rms_norm(final_states(trunk, [ids]), (shape.hidden,))[:40].repeat(40, 1)[:count]
    states = states - (states @ taught.direction - 4.0)[:, None] * taught.direction
    states[17] -= 8.0 * taught.direction
    cos, sin = rotations(count, shape.head_dim)
    with torch.no_grad():
        q = rotate(attention.q_norm(attention.q_proj(states).view(count, -1, shape.head_dim)[-1]), cos[-1], sin[-1])
        k = attention.k_norm(attention.k_proj(states).view(count, -1, shape.head_dim)).transpose(0, 1)
        heard = (q[0] @ rotate(k, cos, sin)[0].T / math.sqrt(shape.head_dim)).softmax(-1)
    assert heard[17] > 0.9


def test_the_tasks_belong_to_their_splits() -> None:
    """Training chains are of training problems, evaluation chains of others, k of each in a row."""
    assert {"train"} == {split_of(task.problem.question) for task in training_tasks(60, 1)}
    assert training_tasks(60, 1)[:30] == training_tasks(30, 1)
    tasks = evaluation_tasks("easy", 3, 2, 7)
    assert {"eval"} == {split_of(task.question) for task in tasks}
    assert [tasks[0], tasks[2], tasks[4]] == [tasks[1], tasks[3], tasks[5]]
    assert 3 == len({task.question for task in tasks})


class Sampler:
    """Writes the same chain for every prompt, and counts the prompts."""

    asked = 0

    def __init__(self, folder: Path) -> None:
        assert folder.name == "arith-small"

    def __call__(self, prompts: list[list[int]], *, temperature: float, seed: int) -> list[list[int]]:
        assert (0.7, tokens("<think>")[0]) == (temperature, prompts[0][-2])
        Sampler.asked += len(prompts)
        return [tokens("Answer: 1\n</think>\n\nThe answer is \\boxed{1}.<|im_end|>")] * len(prompts)


def test_sampling_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that the file holds are not written again, and come back as they were."""
    monkeypatch.setattr(vllm_sample, "VllmSampler", Sampler)
    tasks, file = training_tasks(5, 1), tmp_path / "deep" / "chains.jsonl"
    write_chains(MODELS / "arith-small", tasks[:3], file, 0.7, 1)
    write_chains(MODELS / "arith-small", tasks, file, 0.7, 1)
    chains = read_chains(file)
    assert Sampler.asked == 5
    assert [task.problem for task in tasks] == [one.problem for one in chains]
    assert chains[0].text.endswith("\\boxed{1}.<|im_end|>")
    assert 2 == len(steps_of(chains[0].text))


PROBLEM = problems("easy", 1, 0, kinds=("chain",))[0]


def verdict(reward: float, right: bool, problem: str = "p") -> Verdict:
    return Verdict(problem, "chain", "easy", 1, reward, right, early=True)


def scored(answer: str, *rewards: float) -> Scored:
    return Scored(Chain(PROBLEM, PROBLEM.question, f"\\boxed{{{answer}}}."), rewards, (True,) * len(rewards))


@given(st.lists(st.tuples(st.sampled_from((0.1, 0.2, 0.5, 0.9)), st.booleans()), max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(found: list[tuple[float, bool]]) -> None:
    """A right step above a wrong one counts one, a tie one half."""
    right, wrong = ([reward for reward, label in found if label is kind] for kind in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert expected == pytest.approx(auroc([verdict(*one) for one in found]), nan_ok=True)


def test_the_interval_holds_the_value() -> None:
    """Problems are resampled; few of them make it wide."""
    steps = [verdict(0.1 * (i % 7), i % 3 > 0, str(i // 4)) for i in range(80)]
    found = prm_eval.measured(steps)
    assert found["low"] < found["value"] < found["high"]
    assert 80 == found["steps"]


def test_calibration_by_hand() -> None:
    """Three quarters right at a reward of 0.75 is perfect; none right at 0.95 is not."""
    perfect = [verdict(0.75, right) for right in (True, True, True, False)]
    assert 0.0 == prm_eval.calibration_error(perfect)
    assert 0.475 == pytest.approx(prm_eval.calibration_error([*perfect, *[verdict(0.95, right=False)] * 4]))


def test_the_best_chain_depends_on_how_rewards_are_put_together() -> None:
    """One bad step hurts the minimum and the product, not the last; without an answer nothing is chosen."""
    steady, late = scored(PROBLEM.answer, 0.8, 0.8, 0.8), scored("-1", 0.1, 0.9, 0.9)
    rules = prm_eval.AGGREGATES
    assert prm_eval.chosen([steady, late], rules["min"])
    assert prm_eval.chosen([steady, late], rules["prod"])
    assert prm_eval.chosen([steady, late], rules["mean"])
    assert not prm_eval.chosen([steady, late], rules["last"])
    assert not prm_eval.chosen([replace(steady, chain=replace(steady.chain, text="..."))], rules["last"])


def test_every_step_of_a_chain_is_scored_once() -> None:
    """In the order given, and as the model alone would say."""
    model, chains = tiny(), [chain(seed) for seed in range(5)]
    found = prm_eval.score(model, TOKENIZER, chains)
    for one, result in zip(chains, found, strict=True):
        ids = torch.tensor([encode_steps(TOKENIZER, one, 4096)[0]])
        with torch.inference_mode():
            rewards = model.rewards(ids, *rotations(ids.shape[1], 16))[0]
        assert [step.right for step in label_steps(one.problem, one.text)] == list(result.right)
        assert float(rewards[-1]) == pytest.approx(result.rewards[-1], abs=1e-4)


def test_a_report_counts_first_mistakes_apart() -> None:
    """What follows a first mistake is counted among all steps, not among those up to it."""
    one = Scored(Chain(PROBLEM, PROBLEM.question, "\\boxed{0}."), (0.9, 0.2, 0.3, 0.1), (True, False, False, False))
    two = Scored(Chain(PROBLEM, PROBLEM.question, f"\\boxed{{{PROBLEM.answer}}}."), (0.9, 0.25), (True, True))
    report = prm_eval.report([one, two])
    assert 6 == report["auroc"]["steps"]
    assert 4 == report["first_mistakes"]["steps"]
    assert 1.0 == report["first_mistakes"]["value"]
    assert 1.0 == report["selection"]["easy"]["best by prod"]["value"]
