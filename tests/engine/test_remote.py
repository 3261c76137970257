"""vLLM's own server as the model of a role: the same weights answer there as they do in process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

import anyio
import httpx
import pytest
from anyio.from_thread import BlockingPortal

from thinkserve.server.model_dir import EMBEDDED, MODELS
from thinkserve.server.remote_engine import connect
from thinkserve.server.remote_model import RemoteModel
from thinkserve.server.settings import RemoteSettings
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Engine, Finish, Job, Sampling, Tokens
from thinkserve.strategies.errors import Unsupported

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GREEDY = Sampling(temperature=0.0)
QUESTIONS = ("What is 12 + 30?", "Tom has 3 boxes of 4 pens and gives 2 pens away. How many are left?")
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_API_KEY": "sesame",
}  # fmt: skip
FLAGS = (
    "--served-model-name", "elsewhere", "--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(2**27),
    "--max-model-len", "1024", "--max-num-seqs", "8", "--distributed-executor-backend", "uni",
    "--reasoning-parser", "qwen3",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def elsewhere(backend: VllmBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's server with the embedded model, in the number type of the engine in process."""
    port, folder = free_port(), tmp_path_factory.mktemp("elsewhere")
    dtype = str(backend._llm.model_config.dtype).removeprefix("torch.")
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(MODELS / EMBEDDED), "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, folder / "log")
        yield url
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    started = monotonic()
    while monotonic() - started < 600:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        assert process.poll() is None, log.read_text()
        sleep(0.2)
    pytest.fail(f"no answer in time: {log.read_text()}")


@asynccontextmanager
async def connected(url: str, backend: VllmBackend) -> AsyncIterator[RemoteModel]:
    """The model there as a guide of the one here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSEWHERE_KEY", "sesame")
        model = await connect(url, RemoteSettings(key_env="ELSEWHERE_KEY"), backend, "guide")
    try:
        yield model
    finally:
        await model.aclose()


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a job."""

    tokens: Tokens
    finish: Finish | None
    generated: int
    top: tuple[Mapping[int, float], ...] = ()


async def run(engine: Engine, job: Job) -> Ran:
    async with engine.generate(job) as stream:
        deltas = [delta async for delta in stream]
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    top = tuple(dict(each) for delta in deltas for each in delta.top)
    return Ran(tokens, deltas[-1].finish, stream.generated, top)


async def prompt_of(backend: VllmBackend, question: str) -> Tokens:
    return (await backend.render([{"role": "user", "content": question}])).tokens


def test_the_same_weights_write_the_same_tokens(portal: BlockingPortal, backend: VllmBackend, elsewhere: str) -> None:
    """Greedy: tokens, finish and count, whatever ends the job; chats as well, and what chains are made of."""

    async def scenario() -> None:
        async with connected(elsewhere, backend) as model:
            here, there = backend.engine("here"), model.engine("there", "tenant")
            assert replace(backend.info, name="elsewhere", context=1024) == model.info
            for question in QUESTIONS:
                job = Job(await prompt_of(backend, question), 300, GREEDY)
                jobs = (
                    job,
                    replace(job, max_tokens=7),
                    replace(job, stop=("\n", "+ ")),
                    replace(job, stop_tokens=(job.prompt[-1],)),
                    replace(job, thinking_budget=9, max_tokens=20),
                    replace(job, thinking_budget=0, max_tokens=5),
                )
                for each in jobs:
                    mine, theirs = await run(here, each), await run(there, each)
                    assert mine == theirs
                messages = [{"role": "user", "content": question}]
                assert await here.render(messages) == await there.render(messages)

    portal.call(scenario)


def test_alternatives_are_the_same(portal: BlockingPortal, backend: VllmBackend, elsewhere: str) -> None:
    """The best five of each token, by id; a server refuses more than it gives."""

    async def scenario() -> None:
        async with connected(elsewhere, backend) as model:
            job = Job(await prompt_of(backend, QUESTIONS[0]), 30, GREEDY, logprobs=5)
            here, there = await run(backend.engine("here"), job), await run(model.engine("there"), job)
            assert here.tokens == there.tokens
            for mine, theirs in zip(here.top, there.top, strict=True):
                assert theirs == pytest.approx(mine, abs=1e-3)
            with pytest.raises(Unsupported, match="logprobs"):
                await run(model.engine("there"), replace(job, logprobs=1000))

    portal.call(scenario)


def test_leaving_a_job_aborts_it_there(portal: BlockingPortal, backend: VllmBackend, elsewhere: str) -> None:
    """The server runs nothing a moment later."""

    async def running() -> float:
        async with httpx.AsyncClient(trust_env=False) as client:
            page = (await client.get(f"{elsewhere}/metrics")).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith("vllm:num_requests_running{")
        )

    async def scenario() -> None:
        async with connected(elsewhere, backend) as model:
            endless = Sampling(logit_bias=tuple((token, -100.0) for token in backend.info.eos))
            job = Job(await prompt_of(backend, QUESTIONS[0]), 900, endless)
            async with model.engine("there").generate(job) as stream:
                await anext(stream)
                assert await running() == 1
            assert stream.generated < 900
            with anyio.fail_after(3):
                while await running():
                    await anyio.sleep(0.02)

    portal.call(scenario)
