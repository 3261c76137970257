"""vLLM's schedulers with what the worker has to say: reports of a step travel with the tokens of that step.

The worker puts its report, by request id, on the runner's output (vllm_worker). Here it joins the request's own output,
in `kv_transfer_params`, the one free dictionary that vLLM carries to the front end; no request of ours has any of its
own. A request that drew no token in the step (a prompt in pieces, an abort meanwhile) has no output: its report ends.
"""

from __future__ import annotations

from typing import Any

from thinkserve.server.vllm_cache_key import forget_close, install
from thinkserve.server.vllm_worker import KEY


def deliver(outputs: Any, report: dict[str, Any]) -> None:
    """Join each request's report to its output of this step; `outputs` is what `update_from_output` returns."""
    for of_client in outputs.values():
        for output in of_client.outputs:
            said = report.get(output.request_id)
            if said is not None and output.new_token_ids:
                own = output.kv_transfer_params
                output.kv_transfer_params = {**own, KEY: said} if own else {KEY: said}


def said_of(output: Any) -> dict[str, Any]:
    """What the worker reported of a request, from vLLM's RequestOutput; empty when nothing was."""
    found: dict[str, Any] = (output.kv_transfer_params or {}).get(KEY) or {}
    return found


def _reporting(base: type) -> type:
    class Reporting(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            install()

        def _update_request_as_session(self, session: Any, update: Any) -> None:
            # vLLM hashes the new tokens' blocks before it takes the parameters that they are computed under.
            session.sampling_params = update.sampling_params
            forget_close(session)
            super()._update_request_as_session(session, update)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            report = getattr(model_runner_output, KEY, None)
            if report:
                deliver(outputs, report)
            return outputs

    return Reporting


def scheduler_name(overlapped: bool) -> str:
    """What vLLM's `scheduler_cls` takes; `overlapped` is its `async_scheduling`."""
    return f"{__name__}.{'AsyncScheduler' if overlapped else 'Scheduler'}"


def __getattr__(name: str) -> Any:
    # vLLM resolves `scheduler_cls` by name in the engine core; this module stays cheap to import elsewhere.
    if name == "Scheduler":
        from vllm.v1.core.sched.scheduler import Scheduler

        return _reporting(Scheduler)
    if name == "AsyncScheduler":
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return _reporting(AsyncScheduler)
    raise AttributeError(name)
