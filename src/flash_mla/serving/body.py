"""What a request's JSON may say: the fields of OpenAI's API that `transformers serve` obeys, within bounds.

A field that nobody would obey is refused, unless it asks for what happens anyway. So are Transformers' own additions
that hand a client more than a request: `generation_config` (any option of `generate`) and template arguments that are
not the template's. Images and other files are refused: Transformers would fetch their addresses from this machine.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator
from transformers import PreTrainedTokenizerBase

__all__ = ["ChatBody", "CompletionBody"]

Zero = Annotated[float, Field(ge=0, le=0)]
StopString = Annotated[str, Field(min_length=1, max_length=64)]
Stops = StopString | Annotated[list[StopString], Field(max_length=4)]

# Arguments of the call that renders a template, and what it gives the template itself.
NOT_OF_A_TEMPLATE = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "add_generation_prompt",
    "messages",
    "num_frames",
    "load_audio_from_video",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None
    stream: StrictBool = False
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # A repetition penalty of 1 + this, which must be positive.
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    stop: Stops | None = None
    # Only what happens anyway.
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    # Changes nothing that comes back.
    user: Any = None
    stream_options: Any = None

    def asked_tokens(self) -> int | None:
        """The token limit of the request, if it has one."""
        return self.max_tokens

    def for_transformers(self) -> dict[str, Any]:
        """What the handlers of `transformers serve` are given. Seed and limit are obeyed by the turn instead."""
        dropped = {"seed", "max_tokens", "max_completion_tokens", "n", "presence_penalty", "user", "stream_options"}
        given: dict[str, Any] = self.model_dump(exclude=dropped | self._harmless(), exclude_none=True)
        return given

    def _harmless(self) -> set[str]:
        return set()


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[_Text] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tool_call_id: str | None = None


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: Literal[False] | None = None
    response_format: _TextFormat | None = None
    tool_choice: Literal["auto"] | None = None
    metadata: Any = None
    parallel_tool_calls: Any = None
    service_tier: Any = None
    store: Any = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_of_the_template(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        taken = sorted(NOT_OF_A_TEMPLATE.intersection(given or ()))
        if taken:
            raise ValueError(f"must be variables of the chat template, got {', '.join(taken)}")
        return given

    def asked_tokens(self) -> int | None:
        """The token limit of the request, if it has one: the newer name first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _harmless(self) -> set[str]:
        fields = {"logprobs", "response_format", "tool_choice", "metadata", "parallel_tool_calls", "service_tier"}
        return fields | {"store"}


class _TextFormat(BaseModel):
    type: Literal["text"]


class CompletionBody(_Body):
    """Body of `/v1/completions`."""

    prompt: Annotated[str, Field(min_length=1)]
    suffix: str | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: Literal[0] | None = None

    def _harmless(self) -> set[str]:
        return {"echo", "best_of", "logprobs"}


ChatBody.model_rebuild()
