"""What Anthropic's /v1/messages takes and gives."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moesaic.serve.http.bodies import Answer, Body
from moesaic.serve.http.generation import MAX_INT, Count, StopText


class CacheControl(Body):
    """Taken and not needed: every prefix is cached."""

    type: Literal["ephemeral"]
    ttl: str | None = None
    scope: str | None = None


class Block(Body):
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class HiddenBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class OtherBlock(Body):
    """Taken only to be refused by name."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "image",
        "document",
        "search_result",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "tool_reference",
        "container_upload",
        "mcp_tool_use",
        "mcp_tool_result",
    ]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | OtherBlock, Field(discriminator="type")]] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


AnyBlock = Annotated[
    TextBlock | ThinkingBlock | HiddenBlock | ToolUseBlock | ToolResultBlock | OtherBlock, Field(discriminator="type")
]


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class MessageTool(Body):
    """A function; the fields behind its type say how Anthropic's own machines treat it. Those that Anthropic runs, of
    other types, are taken only to be refused by name.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class MessageToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    display: str | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: str | None = None
    format: OutputFormat | None = None


class Thread(Body):
    """Of a conversation that the server keeps: refused so that Anthropic's clients send all of it instead."""

    model_config = ConfigDict(extra="allow")

    type: str


class Metadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """What a prompt is made of."""

    model: str
    messages: list[Message] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[MessageTool] | None = Field(None, max_length=1024)
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # an older place of output_config's
    cache_control: CacheControl | None = None
    context_management: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = Field(None, max_length=0)
    speed: str | None = None


class MessagesBody(CountBody):
    """experts: ours, as in OpenAI's protocol. The fields of the last block are taken, and change nothing."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)]
    stop_sequences: list[StopText] | None = Field(None, max_length=16)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Count | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    thread: Thread | None = None
    experts: bool = False

    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None
    container: None = None


class ContentAnswer(Answer):
    """One of: text; thinking and signature; id, name and input."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(Answer):
    """input_tokens: of the prompt, those that were not in the cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    expert_activation: dict[str, dict[str, int]] | None = None


class MessageAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentAnswer]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage


class CountAnswer(Answer):
    input_tokens: int
