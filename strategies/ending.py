"""Ending a chain's thinking from outside: at the end of a sentence with a lead to its conclusion, or by force.

    mild      ... so 3+4=7.  ⏎⏎ **Final Answer** ⏎⏎ ...        the model concludes and closes its thinking itself
    forced    ... so 3+4=7.  ⏎⏎ I have thought long enough. ⏎ </think>     it can only answer

What is ours follows the sentence in which the decision fell (arXiv:2505.17155, section 3.3, leaves that open), or the
last place from which on the text is held back. What has been handed on is never taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from thinkserve.strategies.engine import Delta, Event, Job, Tokens
from thinkserve.strategies.registry import Options
from thinkserve.strategies.scale import FULL_CONTEXT, scaled
from thinkserve.strategies.sentences import Sentences
from thinkserve.strategies.splice import Modified, Splice
from thinkserve.strategies.text import Phases

# So many tokens tell whether a text ends with a blank line.
LINE_END = 4
SENTENCE = "I have thought about this long enough; I will answer with what I have."


class EndingOptions(Options):
    """How thinking is ended by force."""

    sentence: str | None = Field(
        default=None,
        max_length=400,
        description="What is said before thinking is closed by force; left out, nothing for contexts below 8192.",
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """A decision to end thinking: why, how, and whether now instead of at the next end of a sentence."""

    rule: str
    kind: Literal["mild", "forced"] = "forced"
    at_once: bool = False


class Thought:
    """The thinking of one chain, watched token by token; subclasses look at it in `take` and may call `end`.

    The last `held` tokens are held back. `whole`: the text before the token at hand ended with a whole character.
    """

    def __init__(self, modified: Modified, job: Job, sentence: str | None) -> None:
        self.job, self.info = job, modified.info()
        self._modified = modified
        known = len(modified.task.prompt)
        # What the chain holds already, where a job goes on with it; it may be in its answer.
        self.before = job.prompt[known:] if job.prompt[:known] == modified.task.prompt else ()
        self._stand(self.before)
        self._start = self._phases.length
        small = self.info.context < FULL_CONTEXT
        self._sentence = ("" if small else SENTENCE) if sentence is None else sentence
        self._ending: Ending | None = None
        self._decided, self._longest_sentence = 0, scaled(256, self.info.context)
        self._news: list[Event] = []
        # How long the thinking was when it was led to its conclusion.
        self.began: int | None = None

    def _stand(self, text: Tokens) -> None:
        """Take up where the chain stands: behind this text."""
        self._text, self.held, self.whole = list(text), 0, True
        phase = self._modified.task.phase
        self._phases, self._sentences = Phases(self.info, phase), Sentences(self._modified)
        self._phases.push(text)
        self._sentences.ended(text[-LINE_END:])
        self._tail = self._sentences.text[-2:]
        self.over = self._phases.closed or phase == "answer"

    @property
    def decided(self) -> bool:
        """Whether an ending has been decided on and not yet been carried out."""
        return self._ending is not None

    @property
    def length(self) -> int:
        """Thinking tokens of this job, ours included."""
        return self._phases.length - self._start

    def take(self, token: int, text: str) -> bool:
        """The next token of the thought and the text that it makes certain; whether it is to be held back."""
        return False

    def lead(self) -> str:
        """The words of a mild ending."""
        return ""

    def end(self, ending: Ending) -> None:
        """Decide to end thinking; the first decision counts until it is carried out."""
        if not self.over and self._ending is None:
            self._ending, self._decided = ending, self.length

    def close(self) -> None:
        """Thinking is over, for whatever reason: nothing is looked at any more."""
        self.over, self.held = True, 0

    def tell(self, event: Event) -> None:
        """Something for those who watch."""
        self._news.append(event)

    def news(self) -> list[Event]:
        """What there is to tell since the last call."""
        told, self._news = self._news, []
        return told

    def inject(self, tokens: Tokens) -> None:
        """Tokens that there is nothing to decide about: they count as text and are not looked at."""
        self._text += tokens
        self.held = 0
        self._phases.push(tokens)
        self._sentences.ended(tokens)
        self._tail = (self._tail + self._sentences.text)[-2:]
        if self._phases.closed:
            self.close()

    def drop(self, left: Tokens) -> None:
        """Of what the chain wrote only this is left; its end of thinking may be among what is not."""
        self._stand(self.before + left)

    def push(self, delta: Delta, room: int) -> Splice | None:
        """Look at what the model wrote, and cut in where it is time to."""
        if self.over:
            return None
        if delta.finish is not None:
            # Nothing can be put behind it; but the chain may go on in another segment, perhaps in its answer.
            self.inject(delta.tokens)
            return None
        for at, token in enumerate(delta.tokens):
            self.whole = bool(self._sentences.text)
            ended = self._sentences.ended((token,)) or self.held > 0
            if ended and (ending := self._pending(delta, at)) and (splice := self._splice(ending, at, room)):
                return splice
            self._text.append(token)
            self._phases.push((token,))
            self._tail = (self._tail + self._sentences.text)[-2:]
            if self._phases.closed:
                self.close()
                return None
            if self._phases.phase == "thinking":
                self.held = self.held + 1 if self.take(token, self._sentences.text) else 0
            ending = self._pending(delta, at + 1)
            if ending and self._now(ending) and (splice := self._splice(ending, at + 1, room)):
                return splice
        return None

    def _pending(self, delta: Delta, keep: int) -> Ending | None:
        """The ending that may be carried out behind `keep` tokens; none if a closing tag would be dropped, or begun."""
        if self._ending is None:
            return None
        dropped = (*self._text[len(self._text) - self.held :], *delta.tokens[keep:])
        return None if self.info.think_close[0] in dropped else self._ending

    def _now(self, ending: Ending) -> bool:
        return ending.at_once or self.length - self._decided >= self._longest_sentence

    def _splice(self, ending: Ending, keep: int, room: int) -> Splice | None:
        self._ending = None
        if self.held:
            keep -= self.held
            self._stand(tuple(self._text[: -self.held]))
        bare = self.info.think_close if ending.kind == "forced" else ()
        tokens = next((each for each in (self._words(ending), bare) if each and keep + len(each) < room), ())
        if not tokens:
            # There is no place for it and an answer: let the chain run into its limit.
            self.close()
            return None
        told = {"rule": ending.rule, "ending": ending.kind, "thinking": self.length}
        self.tell(Event("budget.forced", self.job.chain, told))
        self.inject(tokens)
        self.began = self.length
        return Splice(keep, tokens)

    def _words(self, ending: Ending) -> Tokens:
        """Our tokens behind a text that ends as this one does."""
        breaks = len(self._tail) - len(self._tail.rstrip("\n"))
        text = self.lead() if ending.kind == "mild" else self._sentence
        tokens = self._modified.encode("\n" * (2 - breaks) + text) if text else ()
        if ending.kind == "mild":
            return tokens if self._fits(tokens) else ()
        line = self._modified.encode("\n") if text or not breaks else ()
        return (*tokens, *line, *self.info.think_close) if self._fits(tokens + line) else self.info.think_close

    def _fits(self, tokens: Tokens) -> bool:
        budget = self.job.thinking_budget
        return budget is None or self.length + len(tokens) <= budget
