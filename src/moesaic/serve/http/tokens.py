"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field

from moesaic.serve.http.access import ServedModels, Settings
from moesaic.serve.http.bodies import Answer, Body, BodyRoute
from moesaic.serve.http.chat_call import dialogue_of
from moesaic.serve.http.chat_types import ChatBody, ChatMessage, ChatTool
from moesaic.serve.http.declared import ERRORS
from moesaic.serve.http.errors import refused
from moesaic.serve.http.generation import TokenId
from moesaic.serve.http.prompts import known_ids
from moesaic.serve.served import Models, Served

router = APIRouter(route_class=BodyRoute)


class TokenizeBody(Body):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[ChatTool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeAnswer(Answer):
    prompt: str


class TokenizerInfo(Answer):
    """By Hugging Face's names."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


@router.post("/tokenize", response_model=TokenizeAnswer, responses=ERRORS)
def tokenize(body: TokenizeBody, models: ServedModels, settings: Settings) -> dict[str, Any]:
    """The token ids of a text or a conversation. In a thread of its own, as long texts take a while."""
    served = _served(models, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refused("give a prompt or messages, and not both", "prompt")
    ids = served.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    if body.messages is not None:
        ids = _conversation(body, served, settings.template_time_s)
    strings = [served.tokenizer.backend.id_to_token(token_id) or "" for token_id in ids]
    return {
        "count": len(ids),
        "max_model_len": served.max_length,
        "tokens": ids,
        "token_strs": strings if body.return_token_strs else None,
    }


def _conversation(body: TokenizeBody, served: Served, time_s: float) -> list[int]:
    shared = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    chat = ChatBody.model_validate({"model": served.name, **{name: getattr(body, name) for name in shared}})
    return list(served.speaker.prepare(dialogue_of(chat), None, time_s).prompt_ids)


@router.post("/detokenize", response_model=DetokenizeAnswer, responses=ERRORS)
def detokenize(body: DetokenizeBody, models: ServedModels) -> dict[str, Any]:
    """The text of token ids, special tokens with their names."""
    served = _served(models, body.model)
    ids = known_ids(body.tokens, served, "tokens")
    return {"prompt": served.tokenizer.decode(ids, skip_special_tokens=False)}


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=ERRORS)
async def tokenizer_info(models: ServedModels, model: str | None = None) -> dict[str, Any]:
    """What clients need to know that leave the work to /tokenize and /detokenize, as lm-eval does."""
    served = _served(models, model)
    tokenizer = served.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": served.max_length,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": tokenizer.chat_template,
    }


def _served(models: Models, name: str | None) -> Served:
    """The first one where the client names none."""
    return models.find(next(iter(models), "") if name is None else name)
