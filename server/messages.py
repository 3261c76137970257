"""The messages of a chat request: text in, under every name that clients use, and out again as templates expect it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

OwnCode = Literal["missing_field", "value_out_of_range", "unsupported_parameter"]


def kind(value: object) -> str | None:
    """Which branch of a union a raw value belongs to."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        return "list"
    return "object" if isinstance(value, dict | BaseModel) else None


Text = Annotated[str, Tag("string")]


class Wire(BaseModel):
    """Base of the request's objects: no coercion of types; names we do not know are kept aside."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Part(Wire):
    """A piece of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _text_only(cls, value: object) -> object:
        if isinstance(value, str) and value != "text":
            raise PydanticCustomError("unsupported_parameter", "Only text content is supported.")
        return value


class FunctionCall(Wire):
    """The function of a past tool call; `arguments` is JSON text."""

    name: str
    arguments: str = ""


class ToolCall(Wire):
    """A tool call in the history of the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    """One turn. `reasoning` and `reasoning_content` are two names of one thing, for assistant turns."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[Text | Annotated[list[Part], Tag("list")], Discriminator(kind)] | None = None
    name: str | None = Field(None, max_length=256)
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.reasoning is not None and self.reasoning_content not in (None, self.reasoning):
            raise complaint("value_out_of_range", "reasoning and reasoning_content differ", "reasoning")
        says_otherwise = self.role == "assistant" and (self.tool_calls or self.thought is not None)
        if self.content is None and not says_otherwise:
            raise complaint("missing_field", "the message has no content", "content")
        return self

    @property
    def thought(self) -> str | None:
        """The reasoning that the client sends back, under either name."""
        return self.reasoning if self.reasoning is not None else self.reasoning_content

    @property
    def text(self) -> str:
        """The content as one string; parts are joined by newlines, as vLLM does."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def template(self) -> dict[str, Any]:
        """The message as chat templates expect it: `developer` is `system`, thoughts under both names."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": self.text}
        if self.role == "assistant" and self.thought is not None:
            turn |= {"reasoning": self.thought, "reasoning_content": self.thought}
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in self.tool_calls]
        return turn | {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}


def parts_in(message: object) -> int:
    """How many parts and tool calls an unvalidated message holds."""
    if not isinstance(message, dict):
        return 0
    lists = (message.get("content"), message.get("tool_calls"))
    return sum(len(each) for each in lists if isinstance(each, list))


def complaint(code: OwnCode, message: str, field: str) -> PydanticCustomError:
    """A validator's error about one field of its object."""
    return PydanticCustomError(code, message, {"field": field})
