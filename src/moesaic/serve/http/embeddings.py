"""/v1/embeddings: a vector of each text, from a model's hidden states, where its operator says that they are of use."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field

from moesaic.serve.http.access import ServedModels, Settings
from moesaic.serve.http.bodies import Answer, Body, BodyRoute
from moesaic.serve.http.declared import ERRORS
from moesaic.serve.http.errors import refused
from moesaic.serve.http.limits import room
from moesaic.serve.http.prompts import PromptField, prompts_of
from moesaic.serve.http.running import run_all
from moesaic.serve.request import PoolingKind, Request
from moesaic.serve.served import Served

router = APIRouter(route_class=BodyRoute)


class EmbeddingBody(Body):
    model: str
    input: PromptField
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class Embedding(Answer):
    """embedding: numbers, or their fp32 bytes (little-endian) in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingAnswer, responses=ERRORS)
async def embed(body: EmbeddingBody, http: HttpRequest, models: ServedModels, settings: Settings) -> dict[str, Any]:
    """A vector of length 1 for each input."""
    served = models.find(body.model)
    pooling = _pooling(body, served)
    prompts = prompts_of(body.input, served, settings, add_special_tokens=True, param="input")
    for prompt in prompts:
        room(served, settings, len(prompt.token_ids), 0)
    requests = [Request(prompt_ids=prompt.token_ids, max_new_tokens=0, pooling=pooling) for prompt in prompts]
    vectors = [outcome.vector_D for outcome in await run_all(http, served.desk, requests)]
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector_D, body.encoding_format)}
            for index, vector_D in enumerate(vectors)
            if vector_D is not None
        ],
        "model": served.name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _pooling(body: EmbeddingBody, served: Served) -> PoolingKind:
    if served.embeddings is None:
        raise refused(
            f"the model {served.name!r} makes no embeddings: it is served to predict tokens; use another one, or have "
            'it served with embeddings = "mean" (or "last")',
            "model",
            "model_not_supported",
        )
    size = served.config.hidden_size
    if body.dimensions not in (None, size):
        raise refused(f"dimensions={body.dimensions}; vectors of {served.name!r} have {size}", "dimensions")
    return served.embeddings


def _written(vector_D: np.ndarray, encoding: str | None) -> list[float] | str:
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if encoding == "base64" else vector_D.tolist()
