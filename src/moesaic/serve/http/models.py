"""GET /v1/models: what is served."""

from typing import Any, Literal

from fastapi import APIRouter

from moesaic.serve.http.access import ServedModels
from moesaic.serve.http.bodies import Answer
from moesaic.serve.http.declared import ERRORS
from moesaic.serve.served import Served

router = APIRouter()


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


@router.get("/v1/models/", include_in_schema=False)  # else it would be a model without a name
@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(models: ServedModels) -> dict[str, Any]:
    """Every model that is served."""
    return {"object": "list", "data": [_described(served) for served in models.values()]}


@router.get("/v1/models/{name:path}", response_model=Model, responses=ERRORS)
async def one_model(name: str, models: ServedModels) -> dict[str, Any]:
    """A model by its name."""
    return _described(models.find(name))


def _described(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "moesaic",
        "max_model_len": served.max_length,
    }
