"""What /v1/responses takes and gives."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from moesaic.serve.http.bodies import Answer, Body
from moesaic.serve.http.generation import MAX_INT, Schema, StreamOptions, Unlimited
from moesaic.serve.request import MAX_TOP_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    # of what no model here makes; clients ask for them in any case
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ItemText(Body):
    """annotations and logprobs come back in answers that clients send on as they are."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class ItemRefusal(Body):
    type: Literal["refusal"]
    refusal: str


class ItemMedia(Body):
    """Taken only to be refused by name."""

    model_config = ConfigDict(extra="allow")

    type: Literal["input_image", "input_file", "input_audio"]


ItemContent = Annotated[ItemText | ItemRefusal | ItemMedia, Field(discriminator="type")]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ItemContent]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class Called(Body):
    """What else OpenAI's own calls say."""

    caller: dict[str, Any] | None = None
    namespace: str | None = None


class FunctionCall(Called):
    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1, max_length=256)
    arguments: str
    async_: bool | None = Field(None, alias="async")
    id: str | None = None
    status: str | None = None


class FunctionOutput(Called):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ItemContent]
    name: str | None = None
    id: str | None = None
    status: str | None = None


class ReasoningText(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class Reasoning(Body):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: str | None = None


def _item_type(item: Any) -> Any:
    """Messages need not say that they are."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _item_type,
        custom_error_type="unknown_item",
        custom_error_message=f"items here are of the types {', '.join(_ITEMS)}",
    ),
]


class ResponseTool(Body):
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: dict[str, Any] | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class ResponseNamedTool(Body):
    type: Literal["function"]
    name: str


class ResponseAllowedTools(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ResponseNamedTool] = Field(min_length=1, max_length=1024)


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class PromptFields(Body):
    """What a prompt is made of."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=1024)
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ResponseNamedTool | ResponseAllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    previous_response_id: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: None = None


class CountInputBody(PromptFields):
    """What /v1/responses/input_tokens takes."""


class InputTokens(Answer):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseBody(PromptFields):
    """The fields of the last block are taken, and change nothing."""

    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | Unlimited | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[Includable] | None = None
    metadata: dict[str, str] | None = None
    experts: bool = False

    background: Literal[False] | None = None
    max_tool_calls: int | None = None  # of tools that OpenAI runs
    prompt: None = None
    moderation: None = None
    context_management: list[Any] | None = Field(None, max_length=0)
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    user: str | None = None


class ResponseAnswer(Answer):
    """output: messages, calls and reasoning, as OpenAI's clients read them."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Deleted(Answer):
    id: str
    object: Literal["response"]
    deleted: bool
