"""What routes have at hand."""

from typing import Annotated

from fastapi import Depends, Request

from moesaic.serve.http.settings import HttpSettings
from moesaic.serve.served import Models


def _models(request: Request) -> Models:
    return request.app.state.models


def _settings(request: Request) -> HttpSettings:
    return request.app.state.settings


ServedModels = Annotated[Models, Depends(_models)]
Settings = Annotated[HttpSettings, Depends(_settings)]
