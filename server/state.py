"""What the parts of one running server share; it hangs on the app as `app.state.server`."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import time

from thinkserve.server.admission import Admission
from thinkserve.server.metrics import Metrics
from thinkserve.server.plan import Backend
from thinkserve.server.request_log import RequestLog
from thinkserve.server.runner import Runner
from thinkserve.server.settings import Settings


@dataclass(slots=True)
class ServerState:
    """One server. `started` is wall time in seconds; a reader that takes nothing for `send_timeout_s` is given up."""

    settings: Settings
    backend: Backend
    metrics: Metrics
    admission: Admission
    runner: Runner
    send_timeout_s: float = 60.0
    started: float = field(default_factory=time)


def new_state(settings: Settings, backend: Backend) -> ServerState:
    """The state of a server that is about to start."""
    metrics = Metrics()
    admission = Admission(settings.max_inflight, backend.kv_tokens, metrics)
    runner = Runner(backend, metrics, RequestLog(settings.log_json))
    return ServerState(settings, backend, metrics, admission, runner)
