"""The model that a configuration describes, of whichever kind."""

import torch

from moesaic.config import ModelConfig
from moesaic.models.base import LanguageModel
from moesaic.models.decoder import Decoder
from moesaic.models.encoder_decoder import EncoderDecoder

Model = Decoder | EncoderDecoder


def build(config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
    """A Decoder, or an EncoderDecoder where the configuration has an encoder; weights are left unset."""
    return (Decoder if config.encoder is None else EncoderDecoder)(config, device, dtype)


def decoder_only(model: LanguageModel, what: str) -> Decoder:
    """The model, as `what` needs it. Raises ConfigError for one with an encoder."""
    model.config.check_decoder_only(what)
    assert isinstance(model, Decoder)
    return model
