"""Models for images and text, say: the text part of their configurations, and what else is in them."""

from typing import Any

TEXT = "text_config"
_NO_PARTS = (TEXT, "quantization_config", "generation_config")
_ALSO = ("thinker_config", "language_config", "llm_config")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_text_part(raw: dict[str, Any]) -> bool:
    """Whether a config.json describes several parts, one of them for text."""
    return isinstance(raw.get(TEXT), dict)


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The text part as a config.json of its own: token ids and a tied head are often stated for the whole model."""
    outer = {name: raw[name] for name in _TOKEN_IDS if raw.get(name) is not None}
    whole = {"tie_word_embeddings": raw.get("tie_word_embeddings"), "model_type": raw.get("model_type")}
    return whole | raw[TEXT] | outer


def as_text(raw: dict[str, Any]) -> dict[str, Any]:
    """The same with its text part where most have it: Qwen's Omni models have it within their thinker."""
    inner = next((raw[name] for name in _ALSO if isinstance(raw.get(name), dict) and TEXT not in raw), None)
    if inner is None:
        return raw
    inner = inner[TEXT] if has_text_part(inner) else inner
    outside = {name: value for name, value in raw.items() if name not in _ALSO}
    return outside | {TEXT: {"model_type": raw.get("model_type")} | inner}


def left_out(raw: dict[str, Any]) -> str:
    """What is not read of such a model, in the words of a message."""
    parts = [name for name in raw if name.endswith("_config") and name not in _NO_PARTS and isinstance(raw[name], dict)]
    kind = raw[TEXT].get("model_type", "unnamed")
    return f"only the text part ({TEXT}, {kind}) is read; left out: {', '.join(parts) or 'all other parts'}"
