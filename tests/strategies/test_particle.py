"""Particle filtering: weights, systematic resampling, and the search with and without a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.worlds import World, search, text_of, told
from thinkserve.strategies.engine import Path, Role, Score
from thinkserve.strategies.errors import EngineFailed, Unsupported
from thinkserve.strategies.particle import (
    ParticleOptions,
    Weights,
    effective,
    log_potential,
    normalised,
    systematic,
)

KINDS: tuple[Weights, ...] = ("odds", "softmax")


@pytest.mark.parametrize(("kind", "weights"), [("odds", (0.890, 0.099, 0.011)), ("softmax", (0.472, 0.316, 0.212))])
def test_weights_of_three_rewards(kind: Weights, weights: tuple[float, ...]) -> None:
    """Rewards .9, .5 and .1 as odds and under a softmax."""
    logs = [log_potential(kind, reward, ()) for reward in (0.9, 0.5, 0.1)]

    assert weights == pytest.approx(normalised(logs), abs=1e-3)


def test_sure_rewards_have_finite_weights() -> None:
    """0 and 1 are clipped."""
    assert [pytest.approx(1.0), pytest.approx(0.0, abs=1e-12)] == normalised(
        [log_potential("odds", reward, ()) for reward in (1.0, 0.0)]
    )


def test_without_a_reward_model_a_step_weighs_its_mean_log_probability() -> None:
    """A long step is not worse than a short one; a step without any is neutral."""
    assert pytest.approx(-0.5) == log_potential("self", nan, [-0.2, -0.8])
    assert pytest.approx(-0.5) == log_potential("self", nan, [-0.5] * 40)
    assert 0.0 == log_potential("self", nan, ())


@pytest.mark.parametrize(("weights", "size"), [([0.25] * 4, 4.0), ([1.0, 0.0], 1.0), ([0.5, 0.5, 0.0, 0.0], 2.0)])
def test_the_effective_number_of_particles(weights: list[float], size: float) -> None:
    """All of them when they are equal, one when it has everything."""
    assert pytest.approx(size) == effective(weights)


@given(raw=st.lists(st.floats(0, 1), min_size=1, max_size=20), n=st.integers(1, 64), start=st.floats(0, 0.999))
def test_systematic_copies_are_the_expected_number_rounded(raw: list[float], n: int, start: float) -> None:
    """Up or down, and n in all."""
    weights = [value / sum(raw) for value in raw] if sum(raw) > 1e-3 else [1 / len(raw)] * len(raw)

    counts = systematic(weights, n, start)

    assert n == sum(counts)
    assert all(abs(count - n * weight) < 1 + 1e-6 for count, weight in zip(counts, weights, strict=True))


def test_resampling_follows_the_weights() -> None:
    """Chi-square of 10,000 resamples of one from the odds of .9, .5 and .1: below the 0.1% point of 2 degrees."""
    weights = normalised([log_potential("odds", reward, ()) for reward in (0.9, 0.5, 0.1)])
    rng = Random(0)
    drawn = [systematic(weights, 1, rng.random()) for _ in range(10_000)]

    seen = [sum(counts[at] for counts in drawn) for at in range(3)]
    chi = sum((have - 10_000 * weight) ** 2 / (10_000 * weight) for have, weight in zip(seen, weights, strict=True))

    assert chi < 13.8


def test_particles_are_copied_by_weight_once_few_are_effective() -> None:
    """One of four has nearly all of the weight: all four go on from it, and the others are pruned."""
    rewards = {"a\n\n": 0.99, "b\n\n": 0.01, "c\n\n": 0.01, "d\n\n": 0.01}
    world = World({"": tuple(rewards)}, rewards)

    _, out = search("particle", world, n=4)

    assert {"": 4, "a\n\n": 4} == dict(world.visits)
    assert {2, 3, 4} == {event["node"] for event in told(out, "node.pruned") if event["reason"] == "resampled"}


@pytest.mark.parametrize(("threshold", "resampled"), [(0.5, False), (1.0, True)])
def test_while_weights_are_alike_all_particles_go_on(threshold: float, resampled: bool) -> None:
    """Weights of 9 to 5, four of each: 7.4 of 8 are effective. Only a threshold of 1 copies the heavier."""
    rewards = {f"{name}\n\n": 0.9 if name < "e" else 0.3 for name in "abcdefgh"}
    world = World({"": tuple(rewards)}, rewards)

    _, out = search("particle", world, n=8, weights="softmax", threshold=threshold)

    assert resampled == any(event["reason"] == "resampled" for event in told(out, "node.pruned"))
    heavy = sum(world.visits[text] for text, reward in rewards.items() if reward > 0.5)
    assert (heavy in {5, 6}) if resampled else heavy == 4


def test_complete_solutions_keep_their_weight_and_compete() -> None:
    """An answer found early is resampled against steps that are still open, and answers if it is heaviest."""
    steps = {"": ("1", "b\n\n", "b\n\n", "b\n\n"), "b\n\n": ("2",)}
    world = World(steps, {"1": 0.99, "b\n\n": 0.2, "b\n\n2": 0.2})

    answer, _ = search("particle", world, n=4)

    assert "1" == text_of(world, answer)
    assert "rated" in answer.reason


def test_equal_particles_are_scored_once_and_count_as_many() -> None:
    """Three of four wrote the same: a vote of equal weights is theirs."""
    world = World({"": ("1", "2", "2", "2")}, lambda text: 0.5)

    answer, _ = search("particle", world, n=4, select="majority")

    assert ({"2": 3, "1": 1}, 2) == (dict(answer.votes), sum(len(paths) for _, paths in world.scored))


def test_without_a_reward_model_the_own_log_probabilities_weigh() -> None:
    """The surer of two answers; log-probabilities are asked for, and nothing is scored."""
    # The log-probability of a scripted token is -(token % 7 + 1) / 10: 'a' has -0.3, 'f' has -0.1, the end -0.1.
    world = World({"": ("a" * 9, "f" * 9)}, roles=("target",))

    answer, _ = search("particle", world, n=2)

    assert "f" * 9 == text_of(world, answer)
    assert [0, 0] == [stream.job.logprobs for stream in world.history]
    assert "0 scorer passes" in answer.reason


def test_without_a_reward_model_the_limit_of_passes_says_nothing() -> None:
    """There are none: all particles move."""
    world = World({"": ("1", "2", "2", "2")}, roles=("target",))

    answer, _ = search("particle", world, n=4, select="majority", max_passes=1)

    assert {"1": 1, "2": 3} == dict(answer.votes)


def test_with_a_reward_model_odds_are_the_default() -> None:
    """The rewarded answer, not the surer one."""
    world = World({"": ("a" * 9, "f" * 9)}, lambda text: 0.9 if "a" in text else 0.1)

    assert "a" * 9 == text_of(world, search("particle", world, n=2)[0])


class Bereft(World):
    """Its reward model has gone, and says so whatever it is asked."""

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        raise EngineFailed("the reward model is gone")


def test_a_reward_model_that_has_gone_is_done_without_where_nobody_asked_for_it() -> None:
    """As if there were none, from the first step on and with a warning."""
    world = Bereft({"": ("a" * 9, "f" * 9)}, lambda text: 0.9 if "a" in text else 0.1)

    answer, _ = search("particle", world, n=2)

    assert "f" * 9 == text_of(world, answer)
    assert ["the reward model is not available"] == [warning.partition(";")[0] for warning in answer.warnings]
    assert [0, 0] == [stream.job.logprobs for stream in world.history]


def test_a_reward_model_that_has_gone_is_noticed_before_the_first_token_where_it_was_asked_for() -> None:
    """Nothing is written that nobody can weigh."""
    world = Bereft({"": ("a",)})

    with pytest.raises(EngineFailed, match="gone"):
        search("particle", world, n=2, weights="softmax")
    assert [] == world.history


@pytest.mark.parametrize(("weights", "roles"), [(None, {}), ("self", {}), *((w, {"weights": "reward"}) for w in KINDS)])
def test_options_tell_which_model_they_need(weights: Weights | None, roles: dict[str, str]) -> None:
    """So that a server can refuse them before it begins."""
    assert roles == ParticleOptions(weights=weights).roles()


def test_rewards_that_are_asked_for_need_their_model() -> None:
    """Refused before the first token."""
    world = World({"": ("a",)}, roles=("target",))

    with pytest.raises(Unsupported, match="reward"):
        search("particle", world, n=2, weights="odds")
    assert [] == world.history


def test_the_seed_decides_what_is_resampled() -> None:
    """Equal seeds resample alike, others do not always."""

    def heirs(seed: int) -> tuple[str, ...]:
        rewards = {f"{name}\n\n": 0.5 + place / 20 for place, name in enumerate("abcdef")}
        world = World({"": tuple(rewards)}, rewards)
        search("particle", world, world.task(seed=seed), n=6, threshold=1.0)
        return tuple(sorted(world.visits.elements()))

    assert heirs(1) == heirs(1)
    assert len({heirs(seed) for seed in range(20)}) > 1


@pytest.mark.parametrize("select", ["best", "weighted", "majority"])
def test_a_solution_that_was_resampled_away_answers_where_time_is_over_for_all_others(select: str) -> None:
    """Better than any that is not complete; of several the best rated."""
    rewards = {"so 1": 0.01, "it is 2": 0.02, "c\n\n": 0.99, "d\n\n": 0.1}
    world = World({"": tuple(rewards), "c\n\n": ("x" * 99,), "d\n\n": ("x" * 99,)}, rewards, deadline=20)

    answer, out = search("particle", world, n=4, select=select)

    assert {1, 2} <= {event["node"] for event in told(out, "node.pruned") if event["reason"] == "resampled"}
    expected = "so 1" if select == "majority" else "it is 2"
    assert (expected, "stop", "deadline") == (text_of(world, answer), answer.finish, answer.stopped_by)


def test_dead_ends_have_no_weight() -> None:
    """What ended inside its thinking is not copied, however it is rated."""
    steps = {"": ("so 7.", "a\n\n", "a\n\n", "a\n\n"), "a\n\n": ("b</think>8",)}
    world = World(steps, lambda text: 0.99 if text == "so 7." else 0.01, prompt="q<think>")

    _, out = search("particle", world, world.task(phase="thinking"), n=4)

    assert "8" == world.decode(out.tokens_of("answer"))


def test_particles_that_were_lost_are_made_up_for() -> None:
    """Of four that began, two came to a dead end: four go on."""
    steps = {"": ("so 1.", "so 2.", "a\n\n", "b\n\n"), "a\n\n": ("c</think>8",), "b\n\n": ("c</think>8",)}
    world = World(steps, prompt="q<think>")

    search("particle", world, world.task(phase="thinking"), n=4)

    assert {"": 4, "a\n\n": 2, "b\n\n": 2} == dict(world.visits)


def test_where_a_whole_round_fails_the_heaviest_is_gone_on_with() -> None:
    """Not the longest: the particles are lost with their proposals, but not their weights."""
    steps = {"": ("long long\n\n", "b\n\n"), "b\n\n": ("rest",), "long long\n\n": ("rest",)}
    rewards = {"long long\n\n": 0.4, "b\n\n": 0.6}
    world = World(steps, rewards, fail={index: (0, EngineFailed("lost")) for index in (2, 3)})

    answer, _ = search("particle", world, n=2, threshold=0)

    assert "b\n\nrest" == text_of(world, answer)


def test_solutions_that_were_resampled_away_do_not_make_a_search_complete() -> None:
    """As many as were wanted, but all particles would have gone on."""
    steps = {"": ("so 1", "c\n\n"), "c\n\n": ("so 2", "e\n\n")}
    world = World(steps, lambda text: 0.99 if text.endswith("\n\n") else 0.01)

    answer, _ = search("particle", world, n=2, threshold=1, max_passes=4)

    assert ("budget", True) == (answer.stopped_by, "its limit of passes" in answer.reason)
