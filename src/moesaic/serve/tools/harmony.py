"""gpt-oss's channels: what it thinks, what it says, and the tools it calls."""

import re
from collections.abc import Sequence

from moesaic.serve.tools.parts import CallArguments, CallBegun, Parts, Said, Thought, Tool
from moesaic.serve.tools.source import Source, each_as

ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def harmony(source: Source, tools: Sequence[Tool]) -> Parts:
    """Messages of a header, <|message|>, words, and a mark at their end. The first may lack its header."""
    while True:
        source_is_open = yield from source.spaces()
        if not source_is_open:
            return
        header, mark = yield from source.all_until("<|message|>")
        if not mark:
            yield Said(header)
            return
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient:
            yield CallBegun(recipient[1].removeprefix("functions."))
            kind = CallArguments
        else:
            kind = Thought if channel is not None and channel[1] == "analysis" else Said
        mark = yield from each_as(kind, source.until(*ENDS))
        if not mark:
            return
