"""Start-up: seconds from the start of the process to the first answered chat, asked every 50 ms.

Warm: vLLM's caches are there from an earlier start. Cold: its cache folder is empty, as on a fresh machine (the
operating system's own file cache is left alone: emptying it needs root).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import Options, Work
from bench.servers import Launch, running


def schedule(options: Options, launches: Sequence[Launch]) -> Iterator[tuple[str, Launch, bool]]:
    """Key, launch and whether cold, of every measured start."""
    for launch in launches:
        yield f"startup/cold/{launch.name}/0", launch, True
    for repeat in range(options.startups):
        for launch in launches:
            yield f"startup/warm/{launch.name}/{repeat}", launch, False


async def measure(launches: Sequence[Launch], logs: Path, work: Work) -> None:
    """Fill the journal with the start-ups it does not hold yet; one start that is not measured fills the caches."""
    warmed = set[str]()
    for key, launch, cold in schedule(work.options, launches):
        log = logs / f"startup-{launch.name}.log"
        if key in work.journal:
            continue
        if not cold and launch.name not in warmed:
            await _start(launch, log)
            warmed.add(launch.name)
        work.journal.put(key, await (_cold(launch, log) if cold else _start(launch, log)))
        work.advance()


async def _start(launch: Launch, log: Path) -> float:
    async with running(launch, log) as server:
        return server.first_answer_s


async def _cold(launch: Launch, log: Path) -> float:
    with TemporaryDirectory(prefix="bench-cold-") as empty:
        caches = {"VLLM_CACHE_ROOT": empty, "XDG_CACHE_HOME": empty, "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
        return await _start(replace(launch, env=dict(launch.env) | caches), log)
