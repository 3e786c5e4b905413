"""Text from token ids as they come, never half a character."""

from collections.abc import Callable, Sequence

CONTEXT_TOKENS = 8  # enough that a character (at most 4 byte tokens) or a word's leading space never starts the window
WINDOW_TOKENS = 16  # the tail that is decoded again for every token; bounds the cost of a token

Decode = Callable[[list[int]], str]


class TextStream:
    """Turns tokens into text and hands every new piece to `emit`.

    A token may end inside a character; such an end decodes to U+FFFD and is held back until the character is whole
    or the stream is closed. Tokens are decoded after those before them (`prompt_ids` at first), since some tokenizers
    drop the leading space of the first token that they see.
    """

    def __init__(self, decode: Decode, emit: Callable[[str], None], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._emit = emit
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._num_shown = len(decode(self._window))
        self.text = ""

    def add(self, token_id: int) -> None:
        """Take one token and emit what it completes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip("�")
        self._show(whole)
        if whole == text and len(self._window) > WINDOW_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._num_shown = len(self._decode(self._window))

    def close(self) -> str:
        """Emit what was held back, and return all text."""
        self._show(self._decode(self._window))
        return self.text

    def _show(self, text: str) -> None:
        new = text[self._num_shown :]
        if new:
            self._num_shown = len(text)
            self.text += new
            self._emit(new)
