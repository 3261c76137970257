"""One Backend over several models: every call goes to its role's model, and a lost helper takes only its role along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest

from thinkserve.server.errors import Refused, RoleDown, RoleFailed, from_exception
from thinkserve.server.roles import Roles
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Engine, Job, ModelInfo, Path, Role, Score, Task, Tokens
from thinkserve.strategies.errors import EngineDead, EngineFailed, TooLong, Unsupported
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

pytestmark = pytest.mark.anyio
HELPERS: tuple[Role, ...] = ("guide", "reward", "verifier")


def model(name: str, text: str = "", **more: Any) -> ScriptedBackend:
    """A model of its own name that writes one text; as a reward model it finds every step 3/4 right."""
    info = replace(SCRIPTED, name=name)
    return ScriptedBackend(
        ScriptedEngine([text], info=info, roles=("target", "reward"), rate=lambda steps: 0.75, **more)
    )


class Deployed:
    """A target, a large model as guide and verifier, and a reward model."""

    def __init__(self) -> None:
        self.target, self.large, self.prm = model("small", "from small"), model("large", "from large"), model("prm")
        self.roles = Roles(self.target, {"guide": self.large, "verifier": self.large, "reward": self.prm})


async def written(deployed: Deployed, role: Role) -> str:
    return await written_by(deployed.roles, role)


async def written_by(roles: Roles, role: Role) -> str:
    engine = roles.engine("req")
    async with engine.generate(Job((5,), 50, role=role)) as stream:
        tokens: Tokens = tuple([token async for delta in stream for token in delta.tokens])
    return engine.decode(tokens, role)


async def test_every_call_reaches_the_model_of_its_role() -> None:
    """Streams, chains, facts, prompts and scores."""
    deployed = Deployed()
    engine = deployed.roles.engine("req", "salt")

    names = {role: engine.info(role).name for role in deployed.roles.roles}
    assert {"target": "small", "guide": "large", "verifier": "large", "reward": "prm"} == names
    assert "from small" == await written(deployed, "target")
    assert "from large" == await written(deployed, "guide") == await written(deployed, "verifier")
    async with engine.chain(Job((5,), 50, role="guide")) as chain, chain.segment(4) as segment:
        assert engine.encode("from", "guide") == tuple([t async for delta in segment for t in delta.tokens])
    assert (1, 3) == (len(deployed.target.scripted.history), len(deployed.large.scripted.history))

    scores = await engine.score("1 + 1", [Path(("2",)), Path(("2", "3"))])
    assert [(0.75,), (0.75, 0.75)] == [score.rewards for score in scores]
    assert ([], 1) == (deployed.target.scripted.scored, len(deployed.prm.scripted.scored))
    assert await engine.render([{"role": "user", "content": "x"}], "verifier")
    assert "salt" in deployed.large.salts


async def test_the_models_know_nothing_of_their_roles() -> None:
    """Each is asked as a target is, so one model can serve any role."""
    deployed = Deployed()
    await written(deployed, "verifier")

    assert "target" == deployed.large.scripted.history[0].job.role


async def test_a_role_without_a_model_is_unsupported() -> None:
    """Whatever is asked of it."""
    engine = Roles(model("alone"), {}).engine("req")

    for role in HELPERS:
        with pytest.raises(Unsupported):
            engine.info(role)
        with pytest.raises(Unsupported):
            async with engine.generate(Job((5,), 5, role=role)):
                pass
    with pytest.raises(Unsupported):
        await engine.score("q", [Path(("s",))])


@pytest.mark.parametrize(
    ("role", "code"),
    [("guide", "engine_unavailable"), ("reward", "prm_unavailable"), ("verifier", "engine_unavailable")],
)
async def test_a_helper_that_is_gone_takes_its_role_with_it_and_no_other(role: Role, code: str) -> None:
    """503 with the role's code and a time to come back; the target goes on."""
    deployed = Deployed()
    lost = deployed.prm if role == "reward" else deployed.large
    lost.alive = False
    engine = deployed.roles.engine("req")

    with pytest.raises(RoleDown) as caught:
        await (engine.score("q", [Path(("s",))]) if role == "reward" else written(deployed, role))

    error = from_exception(caught.value, "req")
    assert (503, code) == (error.status, error.code)
    assert int(error.headers["Retry-After"]) > 0
    assert role in error.message
    assert deployed.roles.alive
    assert "from small" == await written(deployed, "target")


async def test_a_helper_that_goes_while_it_writes_is_the_loss_of_its_role() -> None:
    """What the stream raises then is told the same way."""
    deployed = Deployed()
    deployed.large = model("large", "abcdef", fail={0: (2, EngineDead("gone"))})
    deployed.roles.add("guide", deployed.large)

    async def follow() -> None:
        async with deployed.roles.engine("req").generate(Job((5,), 50, role="guide")) as stream:
            async for delta in stream:
                deployed.large.alive = not delta.tokens

    with pytest.raises(RoleDown):
        await follow()


@pytest.mark.parametrize("role", HELPERS)
async def test_a_helper_that_gives_up_is_told_from_a_target_that_does(
    role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    """502 with the role's code: nothing is wrong with this server's own engine. The helper's own words are logged."""
    deployed = Deployed()
    lame = model("lame", "abcdef", fail={0: (2, EngineFailed("half-way"))})
    lame.scripted.score = _gives_up  # type: ignore[method-assign]
    deployed.roles.add(role, lame)

    with pytest.raises(RoleFailed) as caught:
        await (deployed.roles.engine("req").score("q", []) if role == "reward" else written(deployed, role))

    told = from_exception(caught.value, "req")
    assert (502, "api_error") == (told.status, told.type)
    assert "half-way" not in str(caught.value)
    assert [f"request req: the model of the role {role} failed: half-way"] == [each.message for each in caplog.records]
    with pytest.raises(EngineFailed) as other:
        async with deployed.roles.engine("req").generate(Job((5,), 50, role="guide")):
            raise EngineFailed("the target's")
    assert not isinstance(other.value, RoleFailed)


class Elsewhere(ScriptedEngine):
    """A model on another server, which does whatever it is asked in its own way: by raising this."""

    def __init__(self, error: Exception) -> None:
        super().__init__([], roles=("target", "reward"))
        self._error = error

    def _script(self, job: Job, index: int) -> Tokens:
        raise self._error

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        raise self._error

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        raise self._error


async def ask_everything(engine: Engine, role: Role, error: type[Exception]) -> None:
    """Every question to a role ends with this error."""
    with pytest.raises(error):
        await engine.render([{"role": "user", "content": "x"}], role)
    with pytest.raises(error):
        await engine.score("q", [Path(("s",))], role)
    with pytest.raises(error):
        async with engine.generate(Job((5,), 5, role=role)):
            pass
    with pytest.raises(error):
        async with engine.chain(Job((5,), 5, role=role)) as chain, chain.segment(5):
            pass


@pytest.mark.parametrize("error", [Refused("too many words"), EngineFailed("too many words"), TooLong(9, 8)])
async def test_whatever_a_helper_refuses_or_fails_at_is_its_roles_failure_and_logged_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A search may ask it a hundred times; another request gets a line of its own."""
    roles = Roles(model("small"), {"verifier": ScriptedBackend(Elsewhere(error))})
    await ask_everything(roles.engine("one"), "verifier", RoleFailed)
    await ask_everything(roles.engine("two"), "verifier", RoleFailed)

    said = f"the model of the role verifier failed: {error}"
    assert [f"request one: {said}", f"request two: {said}"] == [each.message for each in caplog.records]


async def test_a_helper_that_is_gone_is_so_whatever_it_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    """Before it hears of it; why is logged once."""
    deployed = Deployed()
    deployed.large.alive = False
    await ask_everything(deployed.roles.engine("req"), "verifier", RoleDown)

    assert ["request req: the model of the role verifier failed: The engine is gone."] == [
        each.message for each in caplog.records
    ]


async def test_what_a_helper_can_never_do_is_told_to_who_asked_for_it() -> None:
    """Those are our words, and a 400."""
    roles = Roles(model("small"), {"guide": ScriptedBackend(Elsewhere(Unsupported("takes no controls", "strategy")))})

    with pytest.raises(Unsupported, match="takes no controls"):
        await written_by(roles, "guide")


async def _gives_up(question: str, paths: Sequence[Path], role: Role = "reward") -> NoReturn:
    raise EngineFailed("half-way")


async def test_the_end_of_the_target_inside_a_helpers_block_stays_the_targets() -> None:
    """A strategy that reads both must not blame the one that is well."""
    deployed = Deployed()

    with pytest.raises(EngineDead) as caught:
        async with deployed.roles.engine("req").generate(Job((5,), 50, role="guide")):
            raise EngineDead("the target is gone")

    assert not isinstance(caught.value, RoleDown)


async def test_the_backend_is_as_well_as_its_target() -> None:
    """Facts and health are the target's; closing closes every model once."""
    deployed = Deployed()
    roles = deployed.roles
    closed = list[str]()
    for each in (deployed.target, deployed.large, deployed.prm):
        each.aclose = lambda name=each.info.name: _note(closed, name)  # type: ignore[method-assign,misc]

    assert deployed.target.info == roles.info
    await roles.check()
    deployed.target.alive = False
    with pytest.raises(EngineDead):
        await roles.check()
    await roles.aclose()

    assert not roles.alive
    assert ["large", "prm", "small"] == sorted(closed)


async def _note(closed: list[str], name: str) -> None:
    closed.append(name)


def test_usage_tells_what_the_helpers_did(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion tokens are everybody's, chains the target's, and the reward model's tokens stand apart."""
    single, real = registry.get("single"), registry.get

    async def run(task: Task, engine: Any, emit: Any, options: Any) -> Any:
        """A peek of the guide, a word of the verifier and two paths for the reward model before the answer."""
        peeks: dict[Role, int] = {"guide": 4, "verifier": 1}
        for role, tokens in peeks.items():
            async with engine.generate(Job(task.prompt, tokens, role=role)) as stream:
                async for _ in stream:
                    pass
        await engine.score(task.question, [Path(("from",)), Path(("from", "large"))])
        return await single.run(task, engine, emit, options)

    helped = replace(single, roles=("target", *HELPERS), run=run)
    monkeypatch.setattr(registry, "get", lambda name: helped if name == "single" else real(name))
    target, large, prm = model("m", "<think>a</think>b"), model("large", "from large"), model("prm")
    server = serve(target.scripted, _Closing(Roles(target, {"guide": large, "verifier": large, "reward": prm})))
    reply = server.chat(strategy="single").json()

    spent, generated = reply["usage"]["strategy"], target.scripted.generated + large.scripted.generated
    assert generated == reply["usage"]["completion_tokens"]
    assert (4, 1, 1) == (spent["draft_tokens"], spent["verifier_tokens"], spent["verifier_calls"])
    assert (2, len("from") + len("fromlarge")) == (spent["prm_passes"], spent["prm_tokens"])
    assert {"started": 1, "finished": 1, "aborted": 0} == spent["chains"]
    assert 0.0 == spent["cache_hit_ratio"]
    assert 4 == server.metric("helper_tokens_total", strategy="single", role="guide")


class _Closing:
    """A backend that remembers having been closed."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._roles, name)

    async def aclose(self) -> None:
        await self._roles.aclose()
        self.closed = True


def test_readiness_tells_of_every_role(serve: Callable[..., Any], until: Callable[..., float]) -> None:
    """Ready without a helper, with the role it leaves open; not without the target."""
    deployed = Deployed()
    server = serve(deployed.target.scripted, _Closing(deployed.roles))
    deployed.prm.alive = False

    ready = server.client.get("/readyz")
    assert (200, "ok", "unavailable") == (ready.status_code, ready.json()["status"], ready.json()["models"]["reward"])
    assert 200 == server.client.get("/health").status_code
    card = {each["id"]: each for each in server.client.get("/v1/strategies").json()["data"]}
    lacking = [each for each in card.values() if "prm" in each["requires"]]
    assert all(not each["available"] and "reward" in each["unavailable_reason"] for each in lacking)

    deployed.target.alive = False
    until(lambda: server.exit is not None)
    assert 1 == server.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_reward_model_is_told_before_anything_is_written(serve: Callable[..., Any], stream: bool) -> None:
    """With a status, in a stream too; chains that nobody can rank are not begun."""
    deployed = Deployed()
    server = serve(deployed.target.scripted, _Closing(deployed.roles))
    deployed.prm.alive = False

    answer = server.client.post(
        "/v1/chat/completions",
        json={"model": "m", "stream": stream, "strategy": "best-of-n", "messages": [{"role": "user", "content": "x"}]},
    )

    assert (503, "prm_unavailable") == (answer.status_code, answer.json()["error"]["code"])
    assert [] == deployed.target.scripted.history
    outcomes = [server.metric("requests_total", strategy="none", outcome=name) for name in ("error", "overload")]
    assert [1, 0] == outcomes


@pytest.mark.parametrize("policy", ["continue", "fail"])
def test_a_reward_model_that_fails_on_the_way_costs_a_warning_or_what_the_request_says(
    serve: Callable[..., Any], policy: str
) -> None:
    """The chains are not lost with it; its own words reach nobody but the log."""
    target, prm = model("small", "t</think>7"), model("prm")
    prm.scripted.score = _gives_up  # type: ignore[method-assign]
    server = serve(target.scripted, _Closing(Roles(target, {"reward": prm})))

    answer = server.chat(max_tokens=60, strategy={"name": "best-of-n", "params": {"k": 2, "on_reward_error": policy}})

    if policy == "fail":
        assert (502, "prm_unavailable") == (answer.status_code, answer.json()["error"]["code"])
    else:
        told = "the reward model failed: The model that serves the role 'reward' could not do its part."
        assert [told] == answer.json()["strategy"]["warnings"]
    assert 2 == len(target.scripted.history)
    assert "half-way" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("weights", "status"), [("odds", 503), ("softmax", 503), ("self", 200), (None, 200)])
def test_particles_that_are_to_be_rewarded_need_their_reward_model(
    serve: Callable[..., Any], weights: str | None, status: int, stream: bool
) -> None:
    """Lost, it is told before anything is written; who did not ask for it is served without."""
    deployed = Deployed()
    server = serve(deployed.target.scripted, _Closing(deployed.roles))
    deployed.prm.alive = False
    params = {"n": 2} | ({"weights": weights} if weights else {})

    answer = server.chat(stream=stream, max_tokens=60, strategy={"name": "particle", "params": params})

    assert status == answer.status_code
    if status == 503:
        assert "prm_unavailable" == answer.json()["error"]["code"]
        assert [] == deployed.target.scripted.history
    else:
        assert (weights is None) == ("the reward model is not available" in answer.text)


def test_facts_of_a_model_are_its_own() -> None:
    """Guide and target may differ in what they can hold."""
    small = ScriptedBackend(ScriptedEngine([], info=ModelInfo("s", 100, 512, (0,))))
    large = ScriptedBackend(ScriptedEngine([], info=ModelInfo("l", 900, 512, (0,))))
    engine = Roles(small, {"guide": large}).engine("req")

    assert (100, 900) == (engine.info().context, engine.info("guide").context)
