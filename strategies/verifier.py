"""Yes/no questions to a verifier, read from the log-probabilities of its first word (arXiv:2505.17155, section 3.1).

    log-odds = logsumexp ln p(yes, Yes, " Yes", ...) - logsumexp ln p(no, No, " No", ...)

over the most likely first tokens; where none of a kind is among them, it is at most as likely as the least of these.
One token is generated, so a question costs its prefill; the words that all questions of a request begin with are found
in the prefix cache. The default wordings are plain enough for any instruct model, and the ones that the embedded family
was trained on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from thinkserve.strategies.engine import Engine, Job, Sampling
from thinkserve.strategies.streams import whole

ASK_EXISTS = "Question: {question}\nExcerpt: {excerpt}\nDoes this excerpt state a final result? Answer Yes or No."
ASK_SAME = (
    "Question: {question}\nFirst excerpt: {first}\nSecond excerpt: {second}\n"
    "Do these two excerpts state the same result? Answer Yes or No."
)
ALTERNATIVES = 20
YES, NO = frozenset({"yes", "y"}), frozenset({"no", "n"})


class Verifier:
    """Asks about excerpts of the thinking on one question; the wordings name `{question}` and the excerpts."""

    def __init__(self, engine: Engine, question: str, exists: str = ASK_EXISTS, same: str = ASK_SAME) -> None:
        self._engine, self._question, self._exists, self._same = engine, question, exists, same

    async def states_result(self, excerpt: str) -> float:
        """Log-odds that the excerpt commits to a result; NaN if the verifier said neither. Raises EngineFailed."""
        return await self.ask(filled(self._exists, question=self._question, excerpt=excerpt))

    async def same_result(self, first: str, second: str) -> float:
        """Log-odds that two excerpts commit to the same result; NaN if unknown. Raises EngineFailed."""
        return await self.ask(filled(self._same, question=self._question, first=first, second=second))

    async def ask(self, text: str) -> float:
        """Log-odds of Yes against No in nats. Raises EngineFailed, TooLong, Unsupported."""
        prompt = await self._engine.render([{"role": "user", "content": text}], "verifier")
        greedy = Sampling(temperature=0.0)
        job = Job(prompt, 1, greedy, role="verifier", logprobs=ALTERNATIVES)
        async with self._engine.generate(job) as stream:
            said = await whole(stream)
        listed = said.top[0] if said.top else ()
        return log_odds((self._engine.decode((token,), "verifier"), logprob) for token, logprob in listed)


def log_odds(listed: Iterable[tuple[str, float]]) -> float:
    """Yes against No among alternatives (word, log-probability), whatever their case; NaN if neither is there."""
    words = [(word.strip().strip(".,:*\"'").lower(), logprob) for word, logprob in listed]
    yes = [logprob for word, logprob in words if word in YES]
    no = [logprob for word, logprob in words if word in NO]
    if not yes and not no:
        return math.nan
    least = min(logprob for _, logprob in words)
    return _logsumexp(yes or [least]) - _logsumexp(no or [least])


def filled(wording: str, **parts: str) -> str:
    """The wording with `{name}` replaced by each part, once: braces in a part mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), wording)


def _logsumexp(values: list[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values)) if math.isfinite(most) else most
