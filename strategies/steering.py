"""steering: one chain, its thinking steered towards shortness by a vector (ASC, arXiv:2507.04742, section 4).

    v = mean over questions of  h(question + concise thinking) - h(question + verbose thinking)      (made beforehand)
    at the last token of the prompt and at every generated token:  h <- h + scale * v, at the vector's layer

h is the output of a block. The vector is raw, so a scale means something for its vector only. Efficiency Steering
(arXiv:2506.15647) is the same with another vector. Any other strategy takes the same as a modifier: `steer`.
"""

from __future__ import annotations

from pydantic import Field

from thinkserve.strategies.controls import Positions, Steer
from thinkserve.strategies.engine import Answer, Control, Emit, Engine, Event, Task
from thinkserve.strategies.registry import Options, Supports, strategy
from thinkserve.strategies.single import stream_chain


class SteeringOptions(Options):
    """Parameters of steering."""

    vector: str = Field(min_length=1, max_length=64, description="Name of a vector of this server.", examples=["brief"])
    scale: float = Field(
        default=1.0, ge=-10, le=10, allow_inf_nan=False, description="Factor of the raw vector; negative: away from it."
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Blocks whose output is steered, counted from 0; left out, all that the vector has."
    )
    positions: Positions = Field(
        default="generated", description="All generated tokens, or only those until the end of thinking."
    )

    def controls(self) -> tuple[Control, ...]:
        """The one vector."""
        return (Steer(self.vector, self.scale, self.layers or (), self.positions),)


@strategy(
    "steering",
    title="Steering",
    options=SteeringOptions,
    reference="arXiv:2507.04742",
    supports=Supports(over=True),
    needs=("steering",),
)
async def run(task: Task, engine: Engine, emit: Emit, options: SteeringOptions) -> Answer:
    """One chain, steered towards shorter thinking by a vector added to its hidden states."""
    await emit(Event("steer.applied", 0, {"vector": options.vector, "scale": options.scale}))
    return await stream_chain(task, engine, emit, options.controls())
