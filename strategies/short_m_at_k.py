"""short-m@k: of k chains, the first m to finish thinking vote and the others stop at once (arXiv:2505.17813).

    launch k chains
    when m have finished thinking: stop every chain that can no longer be among the m shortest
    let the m members write their answers
    group equal answers; the largest group wins, a tie goes to the group with the shortest thinking
    return that group's shortest chain

Length is thinking length: tokens between the tags. "wall-clock" takes the first m to finish; "length-exact" takes the m
shortest whatever the engine's scheduling did to their order: a laggard that is still shorter displaces a member. An
empty but closed think block has finished; without any block a chain has finished when its text is complete.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from thinkserve.strategies.chains import Lane, Race
from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import LED, Options, Supports, strategy
from thinkserve.strategies.settle import settle


class ShortOptions(Options):
    """Parameters of short-m@k."""

    k: int = Field(default=8, ge=1, le=64, description="How many chains are started.")
    m: int = Field(
        default=3, ge=1, le=64, description="How many vote: the first to finish thinking. At most k; left out, 3 or k."
    )
    mode: Literal["wall-clock", "length-exact"] = Field(
        default="wall-clock", description="Who is first: by the clock, or by thinking length whatever the scheduling."
    )

    @model_validator(mode="before")
    @classmethod
    def _m_left_out(cls, given: Any) -> Any:
        if isinstance(given, dict) and "m" not in given and given.get("k") in (1, 2):
            return {**given, "m": given["k"]}
        return given

    @field_validator("m")
    @classmethod
    def _m_of_k(cls, m: int, info: ValidationInfo) -> int:
        if m > info.data.get("k", m):
            raise ValueError(f"m must not be larger than k ({info.data['k']})")
        return m

    def chains(self) -> int:
        """All k run at once."""
        return self.k


@strategy(
    "short-m-at-k",
    title="short-m@k",
    options=ShortOptions,
    reference="arXiv:2505.17813",
    aliases=("short-m@k",),
    supports=Supports(stream=LED, over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: ShortOptions) -> Answer:
    """k chains; the first m to finish thinking vote, the others stop at once."""
    race = Race(task, engine, emit, options.k)
    m = min(options.m, len(race.lanes))
    by_clock = options.mode == "wall-clock"
    await (_wall_clock if by_clock else _length_exact)(race, m)
    members = race.finished() if by_clock else sorted(race.finished(), key=_size)
    return await settle(race, members[:m], wanted=m)


async def _wall_clock(race: Race, m: int) -> None:
    def cut(_: Lane) -> None:
        members = race.finished()[:m]
        if len(members) == m:
            for lane in race.left():
                if lane not in members:
                    lane.drop()
            # The only voter has won: its pieces may go out while it writes.
            members[0].live |= m == 1

    await race.run(on_finish=cut)


async def _length_exact(race: Race, m: int) -> None:
    def hopeless(lane: Lane) -> bool:
        shorter = [other for other in race.lanes if other.finished and _size(other) < _size(lane)]
        return len(shorter) >= m

    def cut(_: Lane) -> None:
        for lane in race.left():
            if hopeless(lane):
                lane.drop()

    def overtaken(lane: Lane) -> None:
        if hopeless(lane):
            lane.drop()

    await race.run(on_finish=cut, on_token=overtaken)


def _size(lane: Lane) -> tuple[int, int]:
    return lane.length, lane.index
