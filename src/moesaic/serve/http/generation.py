"""The fields with which OpenAI's clients, and vLLM's, say how a text is to be written."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from moesaic.engine.sampling import Sampling
from moesaic.serve.http.bodies import Body, parse
from moesaic.serve.http.errors import refused
from moesaic.serve.http.neutral import NeutralFields
from moesaic.serve.request import Grammar

MAX_INT = 2**31 - 1
MAX_STOPS = 16
MAX_SCHEMA_DEPTH = 64

StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Unlimited = Literal[-1]  # as clients of llama.cpp's server ask for all that there is room for
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Schema = dict[str, Any] | bool


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers: never added here


class StructuredOutputs(Body):
    """vLLM's: one of these, or none."""

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """schema: where llama.cpp's server, and others, take it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")


class GenerationFields(NeutralFields):
    """How to draw tokens, when to stop, what the text must be; what several protocols share. A field that is null says
    as much as one that is left out: many clients send all that they know.
    """

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    stop: StopText | list[StopText] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Count = 0
    n: int | None = Field(None, ge=1, le=MAX_INT)
    priority: int = Field(0, ge=-MAX_INT, le=MAX_INT)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    experts: bool = False

    @field_validator("*", mode="before")
    @classmethod
    def _left_out(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return field.get_default() if value is None and not field.is_required() else value

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise refused(f"{len(stops)} stop texts; use at most {MAX_STOPS}", "stop")
        return tuple(stops)

    def ends(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end the text. eos_token_ids: the model's own."""
        return (frozenset() if self.ignore_eos else eos_token_ids) | frozenset(self.stop_token_ids or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, vocab_size: int) -> Sampling:
        """Raises ApiError for a bias of tokens that there are not."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            **likeliest(self.top_k, self.top_p),
            min_p=self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={_token_id(name, vocab_size): bias for name, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
        )

    def grammar(self) -> Grammar | None:
        """What the text must be. Raises ApiError where two things are asked for."""
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        found = [_of_format(self.response_format), _of_outputs(self.structured_outputs), _of_outputs(guided)]
        wanted = [grammar for each in found for grammar in each]
        if len(wanted) > 1:
            raise refused("more than one format is asked for; send one", "structured_outputs")
        return wanted[0] if wanted else None


def likeliest(top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """top_k and top_p as Sampling takes them. Of no probability at all the protocols keep the likeliest token."""
    if top_p == 0:
        return {"top_k": 1, "top_p": None}
    return {"top_k": top_k if top_k and top_k > 0 else None, "top_p": top_p}


def _token_id(name: str, vocab_size: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", name) or int(name) >= vocab_size:
        raise refused(f"logit_bias of {name!r}; use token ids from 0 to {vocab_size - 1}", "logit_bias")
    return int(name)


def _of_format(wanted: ResponseFormat | None) -> list[Grammar]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [Grammar("json_object") if wanted.schema_ is None else schema_grammar(wanted.schema_)]
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        if wanted.schema_ is not None:
            return [schema_grammar(wanted.schema_)]
        raise refused(
            "Missing required parameter: 'response_format.json_schema.schema'.", "response_format.json_schema"
        )
    return [schema_grammar(wanted.json_schema.schema_)]


def _of_outputs(wanted: StructuredOutputs | None) -> list[Grammar]:
    if wanted is None:
        return []
    found = []
    if wanted.json_ is not None:
        found.append(schema_grammar(_schema(wanted.json_)))
    if wanted.regex is not None:
        found.append(Grammar("regex", wanted.regex))
    if wanted.choice is not None:
        found.append(Grammar("regex", "|".join(re.escape(choice) for choice in wanted.choice)))
    if wanted.grammar is not None:
        found.append(Grammar("lark", wanted.grammar))
    if wanted.json_object:
        found.append(Grammar("json_object"))
    return found


def _schema(given: Schema | str) -> Schema:
    """Schemas that come as text are JSON, as bodies are."""
    return parse(given.encode(), MAX_SCHEMA_DEPTH) if isinstance(given, str) else given


def schema_grammar(schema: Schema) -> Grammar:
    """A JSON schema as what a text must be."""
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
