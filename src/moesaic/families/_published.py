"""What makers say of their models' sizes (model cards, papers), beside which our counts are shown.

There is no common rule: some count both tables of the vocabulary as active (Mixtral, Qwen3, OLMoE, Phi, DBRX, Llama 4),
some the head only (gpt-oss, DeepSeek, Granite), some neither (GLM-4.5, which adds its layer for further tokens).
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Parameters in total and active for a token, in the maker's own words; nothing where none are stated."""

    total: str
    active: str = ""


PUBLISHED = {
    "mixtral-8x7b": Published("46.7B", "12.9B"),
    "mixtral-8x22b": Published("141B", "39B"),
    "deepseek-v2": Published("236B", "21B"),
    "deepseek-v2-lite": Published("15.7B", "2.4B"),
    "deepseek-v3": Published("671B", "37B"),
    "deepseek-r1": Published("671B", "37B"),
    "deepseek-v3.1": Published("671B", "37B"),
    "deepseek-v3.2": Published("671B", "37B"),
    "kimi-k2": Published("1.04T", "32B"),
    "deepseek-v4-flash": Published("284B", "13B"),
    "deepseek-v4-pro": Published("1.6T", "49B"),
    "qwen1.5-moe-a2.7b": Published("14.3B", "2.7B"),
    "qwen2-57b-a14b": Published("57.4B", "14B"),
    "qwen3-30b-a3b": Published("30.5B", "3.3B"),
    "qwen3-235b-a22b": Published("235B", "22B"),
    "qwen3-coder-480b-a35b": Published("480B", "35B"),
    "qwen3-next-80b-a3b": Published("80B", "3B"),
    "qwen3.5-35b-a3b": Published("35B", "3B"),
    "llama-4-scout": Published("109B with images", "17B"),
    "llama-4-maverick": Published("400B", "17B"),
    "granite-3.0-1b-a400m": Published("1.3B", "0.4B"),
    "granite-3.0-3b-a800m": Published("3.3B", "0.8B"),
    "granite-4.0-h-small": Published("32B", "9B"),
    "granite-4.0-h-tiny": Published("7B", "1B"),
    "ernie-4.5-21b-a3b": Published("21B", "3B"),
    "jamba-v0.1": Published("52B", "12B"),
    "gpt-oss-120b": Published("116.83B", "5.13B"),
    "gpt-oss-20b": Published("20.91B", "3.61B"),
    "olmoe-1b-7b": Published("6.92B", "1.28B"),
    "phi-3.5-moe": Published("41.9B", "6.6B"),
    "dbrx": Published("132B", "36B"),
    "glm-4.5": Published("355B", "32B"),
    "glm-4.5-air": Published("106B", "12B"),
    "switch-c-2048": Published("1571B"),
    "switch-xxl-128": Published("395B"),
    "nllb-moe-54b": Published("54.5B"),
}
