"""Token ids as the text that parsers read: without special tokens, but for those that mark tool calls and channels."""

from collections.abc import Sequence

from moesaic.data.tokenizer import Tokenizer

# What tool calls and reasoning are written with, where a family made special tokens of it.
MARKS = (
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|python_tag|>",
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
)


class KeptText:
    """Decodes token ids, with the marks that the vocabulary has."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        self._dropped = frozenset(token_id for token_id in special if added[token_id].content not in MARKS)
        self._tokenizer = tokenizer

    def __call__(self, token_ids: Sequence[int]) -> str:
        kept = [token_id for token_id in token_ids if token_id not in self._dropped]
        return self._tokenizer.decode(kept, skip_special_tokens=False)
