"""Single tokens as bytes and as text: what log probabilities are shown with."""

from tokenizers import decoders

from moesaic.data.tokenizer import Tokenizer


class TokenTexts:
    """The bytes of each token of a vocabulary; special tokens are their own names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._added = tokenizer.backend.get_added_tokens_decoder()
        self._byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel) or _spells_bytes(tokenizer)

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for an id that the vocabulary does not have (rows that an embedding table is padded with)."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_BYTES[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def text_of(self, token_id: int) -> str:
        """The text, or, where a token is part of a character, "bytes:\\xe2\\x80" as OpenAI writes it."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _spells_bytes(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary writes each byte as one character, though its decoder is made of several."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    return "Ġ" in vocabulary and "Ċ" in vocabulary


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable character of each byte: itself where it can be printed, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
