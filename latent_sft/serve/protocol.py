"""What clients may ask for: the bodies of OpenAI's two routes, with the extras of latents, and the shape of errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# fields that change nothing here
IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "reasoning_effort", "verbosity",
)  # fmt: skip
# settings that there are not, and the values besides null that do not ask for them
NOT_AVAILABLE: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "repetition_penalty": [1],
    "min_p": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
}
MOST_CHOICES, MOST_STOPS = 128, 16
MOST_ALTERNATIVES = 20
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is answered by an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the error."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """Refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


class Extras(Strict):
    """What is asked of latents.

    Attributes:
        latents: return them, with ids, tokens and weights.
        top: tokens of each, in `reasoning_content` too.
        min_latents: thinking does not stop before; as trained by default.
        max_latents: thinking ends after; as trained by default, and then at most.
    """

    latents: bool = False
    top: int = Field(5, ge=1, le=1000)
    min_latents: int | None = Field(None, ge=0)
    max_latents: int | None = Field(None, ge=0)


class StreamOptions(Strict):
    """What a stream has besides."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Settings(Strict):
    """What both routes know; null is the default everywhere."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    latent_sft: Extras = Extras()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in NOT_AVAILABLE.items():
            if values.get(name) is not None and values[name] not in neutral:
                raise ValueError(f"{name} is not available here; leave it out")
        known = {name: value for name, value in values.items() if name not in (*IGNORED, *NOT_AVAILABLE)}
        if known.get("latent_sft", 0) is None:
            del known["latent_sft"]
        return known

    @property
    def stops(self) -> list[str]:
        """Return the strings that end an answer."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation; what else clients put into turns (`name`, `reasoning_content`) is not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def turn(self) -> tuple[str, str]:
        """Return its role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return "system" if self.role == "developer" else self.role, text


class ChatRequest(Settings):
    """The body of `/v1/chat/completions`; `max_completion_tokens` counts the thought, `max_tokens` does not."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def alternatives(self) -> int | None:
        """Return the tokens that are listed beside each token of the answer; None where none is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Settings):
    """The body of `/v1/completions`: prompts as they are, texts or token ids."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    max_completion_tokens: None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def alternatives(self) -> int | None:
        """See `ChatRequest`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt  # type: ignore


def read(kind: type[Settings], body: bytes) -> Any:
    """Return the request in a body.

    Raises:
        Refused: no JSON, or not of this shape.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # where several shapes are allowed, the one that went furthest is meant
        every = error.errors(include_url=False, include_input=False)
        first = max(every, key=lambda one: (len(one["loc"]), one["loc"][-1:] != ("str",)))
        param = ".".join(str(part) for part in first["loc"] if part != "str" and "[" not in str(part)) or None
        message = first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{param}: {message}." if param else f"{message}.", param=param) from None
