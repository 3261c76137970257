"""Where log lines go: stderr, as text for people or one JSON object a line; requests log themselves."""

from __future__ import annotations

import json
import logging
import sys

OWN = "thinkserve"


class JsonLines(logging.Formatter):
    """One JSON object per record; a message that already is one stays as it is, with the time added."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        message = record.getMessage()
        fields = json.loads(message) if message.startswith('{"event"') else {"event": "log", "message": message}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        head = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        return json.dumps(head | fields)


def set_up(as_json: bool) -> None:
    """Our lines from INFO on; of libraries, warnings and worse."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if as_json else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(OWN).setLevel(logging.INFO)
    hush_vllm()


def hush_vllm() -> None:
    """Errors of vLLM only, until it sets up its own logger, which VLLM_LOGGING_LEVEL rules."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
