"""What /v1/chat/completions takes and gives."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moesaic.serve.http.bodies import Answer, Body
from moesaic.serve.http.generation import MAX_INT, GenerationFields, Unlimited
from moesaic.serve.http.logprobs import ChatLogprobs, PromptLogprob
from moesaic.serve.http.usage import UsageAnswer
from moesaic.serve.request import MAX_TOP_LOGPROBS


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class MediaPart(Body):
    """Taken only to be refused by name."""

    model_config = ConfigDict(extra="allow")

    type: Literal["image_url", "input_audio", "file", "video_url", "audio_url", "image"]


ContentPart = Annotated[TextPart | RefusalPart | MediaPart, Field(discriminator="type")]


class CalledFunction(Body):
    """parsed_arguments: what OpenAI's client adds to answers, and sends on with them."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any] | None = None
    parsed_arguments: Any = None


class ToolCall(Body):
    """extra_content, provider_specific_fields: of other providers, whose answers clients send on."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    extra_content: dict[str, Any] | None = None
    provider_specific_fields: dict[str, Any] | None = None


class ChatMessage(Body):
    """reasoning_content, reasoning: what the assistant had thought. prefix: the answer goes on with this message, as
    DeepSeek and Mistral have it. The last fields come back in answers that clients send on as they are, and say nothing
    here.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool | None = None
    id: str | None = None
    parsed: Any = None
    cache_control: dict[str, Any] | None = None
    provider_specific_fields: dict[str, Any] | None = None
    thinking_blocks: list[Any] | None = None
    reasoning_details: list[Any] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Body):
    type: Literal["function"]
    function: FunctionTool
    cache_control: dict[str, Any] | None = None


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[AllowedTool] = Field(min_length=1, max_length=1024)


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


NewTokens = Annotated[int, Field(ge=1, le=MAX_INT)]


class ChatBody(GenerationFields):
    """prediction and verbosity are taken, and change nothing; the last fields are known, to be refused by name."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: NewTokens | Unlimited | None = None
    max_completion_tokens: NewTokens | Unlimited | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[ChatTool] | None = Field(None, max_length=1024)
    tool_choice: (
        Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedChoice, Field(discriminator="type")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: str | None = None
    store: bool | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    chat_template: None = None
    audio: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


class FunctionAnswer(Answer):
    name: str
    arguments: str


class ToolCallAnswer(Answer):
    id: str
    type: Literal["function"]
    function: FunctionAnswer


class MessageAnswer(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallAnswer] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(Answer):
    index: int
    message: MessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
