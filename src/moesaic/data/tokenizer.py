"""Text to token ids and back: byte-level BPE, trained here, read from a folder or from a GGUF file's metadata."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

# The library warns when a process that has used its threads forks, unless it has been told what to do. Threads are for
# our own batch calls (see `_threads`), so that a child process never inherits a thread pool that is gone.
_USER_CHOSE_THREADS = "TOKENIZERS_PARALLELISM" in os.environ
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from moesaic.data.special_tokens import language_token, sentinel  # noqa: E402
from moesaic.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from moesaic.registry import Registry  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
TRAINING_BYTES = 8_000_000  # more changes few merges of a small vocabulary and costs seconds

_TOKEN_TYPE_CONTROL, _TOKEN_TYPE_USER_DEFINED = 3, 4  # gguf's TokenType

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Splitting(NamedTuple):
    """What happens to text before BPE merges: how it is normalised and cut into words."""

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer


SPLITTINGS: Registry[Splitting] = Registry("tokenizer.ggml.pre")
SPLITTINGS.register("gpt-2")(Splitting(None, pre_tokenizers.ByteLevel(add_prefix_space=False)))
SPLITTINGS.register("smollm")(
    Splitting(
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    )
)
SPLITTINGS.register("qwen2")(
    Splitting(
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    )
)


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    `backend` is the `tokenizers.Tokenizer` underneath. Special tokens are given as text and must be in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.eos_token, self.bos_token, self.pad_token = eos_token, bos_token, pad_token
        self.chat_template = chat_template
        self.eos_id = self._special_id("eos_token", eos_token)
        self.bos_id = self._special_id("bos_token", bos_token)
        self.pad_id = self._special_id("pad_token", pad_token)

    def _special_id(self, role: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(
                f"{role} {token!r} is not in the vocabulary; fix tokenizer_config.json or tokenizer.json"
            )
        return token_id

    @classmethod
    def train(
        cls,
        documents: Iterable[str] | Mapping[str, Iterable[str]],
        vocab_size: int,
        *,
        max_bytes: int = TRAINING_BYTES,
        extra_tokens: Sequence[str] = (),
    ) -> "Tokenizer":
        """Learn a byte-level BPE vocabulary that splits numbers into digits; the same documents give the same one.

        A mapping is domain -> documents, gone through twice, of which equal bytes are used, `max_bytes` altogether.
        Little text can give fewer tokens than `vocab_size`. extra_tokens: more special tokens, the last ids of the
        vocabulary. Raises ConfigError when the 256 bytes and the special tokens do not fit.
        """
        smallest = 256 + len(SPECIAL_TOKENS) + len(extra_tokens)
        if vocab_size < smallest:
            raise ConfigError(f"vocab_size={vocab_size} is too small; 256 bytes and the special tokens need {smallest}")
        domains = documents if isinstance(documents, Mapping) else {"": list(documents)}
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = SPLITTINGS["smollm"].pre_tokenizer
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(extra_tokens),
            min_frequency=2,
            show_progress=False,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        with _threads():
            backend.train_from_iterator(_sample(domains, max_bytes), trainer)
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra_tokens])
        return cls(backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows an embedding table needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids of <extra_id_0>, <extra_id_1>, ..., as far as there are any: T5's name for what stands for a span."""
        found = []
        for number in itertools.count():
            token_id = self.backend.token_to_id(sentinel(number))
            if token_id is None:
                break
            found.append(token_id)
        return tuple(found)

    def language_id(self, language: str) -> int | None:
        """The id of the special token that names a language: `<|fr|>`, or the name itself (`fra_Latn` in NLLB)."""
        for token in (language_token(language), language):
            token_id = self.backend.token_to_id(token)
            if token_id is not None and token_id in self.backend.get_added_tokens_decoder():
                return token_id
        return None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        add_special_tokens lets the tokenizer put its own around it (a leading bos for Llama and Mixtral).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as plain text: a special token written in it is only its letters."""
        self.backend.encode_special_tokens = True
        try:
            with _threads():
                return [
                    encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
                ]
        finally:
            self.backend.encode_special_tokens = False

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for (int64); special tokens stand for none.

        Raises DataError when the vocabulary is not byte-level, where a token's bytes depend on its neighbours.
        """
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            raise DataError(
                "this tokenizer is not byte-level BPE; bits per byte can be measured with byte-level BPE only"
            )
        lengths_V = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            lengths_V[token_id] = len(token)  # byte-level vocabularies write each byte as one character
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            lengths_V[token_id] = 0 if added.special else len(added.content.encode())
        return lengths_V

    @cached_property
    def digest(self) -> str:
        """sha256 of the vocabulary and its rules, and of the token put between documents."""
        return hashlib.sha256(f"{self.eos_token}\0{self.backend.to_str()}".encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # backend.save would report a full disk as a bare Exception.
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8", newline="\n")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder with tokenizer.json, and tokenizer_config.json and chat_template.jinja where they are.

        Raises CheckpointError for files that are missing or broken.
        """
        folder = Path(folder)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_config(folder / "tokenizer_config.json")
        return cls(
            backend,
            eos_token=_token_text(config.get("eos_token")),
            bos_token=_token_text(config.get("bos_token")),
            pad_token=_token_text(config.get("pad_token")),
            chat_template=_read_chat_template(folder, config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describes (keys "tokenizer.ggml.*").

        Raises CheckpointError for tokenizers that are not byte-level BPE or are cut in a way we do not know.
        """
        tokens = _gguf_field(metadata, "tokenizer.ggml.tokens")
        token_types = _gguf_field(metadata, "tokenizer.ggml.token_type")
        if len(tokens) != len(token_types):
            raise CheckpointError(
                f"this GGUF file has {len(tokens)} tokens but {len(token_types)} token types; download it again"
            )
        backend = tokenizers.Tokenizer(_gguf_model(metadata, tokens))
        splitting = _gguf_splitting(metadata)
        if splitting.normalizer is not None:
            backend.normalizer = splitting.normalizer
        backend.pre_tokenizer = splitting.pre_tokenizer
        backend.decoder = decoders.ByteLevel()
        for token, token_type in zip(tokens, token_types, strict=True):
            if token_type in (_TOKEN_TYPE_CONTROL, _TOKEN_TYPE_USER_DEFINED):
                special = token_type == _TOKEN_TYPE_CONTROL
                backend.add_tokens([AddedToken(token, special=special, normalized=False)])
        names = {role: _gguf_special(metadata, tokens, role) for role in ("bos", "eos", "padding")}
        return cls(
            backend,
            eos_token=names["eos"],
            bos_token=names["bos"],
            pad_token=names["padding"],
            chat_template=metadata.get("tokenizer.chat_template"),
        )


@contextmanager
def _threads() -> Iterator[None]:
    """Let the library use its threads inside; a choice that the user made in the environment stands."""
    if _USER_CHOSE_THREADS:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _sample(domains: Mapping[str, Iterable[str]], max_bytes: int) -> Iterator[str]:
    """Documents spread evenly over each domain, up to an equal share of `max_bytes` from every one."""
    share = max_bytes // max(1, len(domains))
    for name in sorted(domains):
        documents = domains[name]
        total = sum(len(text.encode()) for text in documents)
        taken, kept = 0.0, min(1.0, share / max(1, total))
        for index, text in enumerate(documents):
            if int((index + 1) * kept) > taken:
                taken += 1
                yield text


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise CheckpointError(
            f"no {path}; only tokenizers in that format can be read: convert others with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_truncation()  # settings of whoever saved the file last, which would cut and pad documents
        backend.no_padding()
        return backend
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object; copy it again")
    return config


def _token_text(entry: Any) -> str | None:
    return entry.get("content") if isinstance(entry, dict) else entry


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: [{"name": "default", "template": "..."}]
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _gguf_field(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise CheckpointError(f"this GGUF file has no {key}; use one that carries its tokenizer")
    return metadata[key]


def _gguf_model(metadata: Mapping[str, Any], tokens: Sequence[str]) -> models.BPE:
    kind = _gguf_field(metadata, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(
            f"tokenizer.ggml.model {kind!r} in this GGUF file; only 'gpt2' (byte-level BPE) can be read"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _gguf_field(metadata, "tokenizer.ggml.merges")]
    return models.BPE({token: index for index, token in enumerate(tokens)}, cast("list[tuple[str, str]]", merges))


def _gguf_splitting(metadata: Mapping[str, Any]) -> Splitting:
    name = metadata.get("tokenizer.ggml.pre", "default")
    known = sorted(SPLITTINGS)
    if name not in known:
        raise CheckpointError(
            f"tokenizer.ggml.pre {name!r} in this GGUF file; known: {', '.join(known)}. "
            "Use the model's safetensors folder, which has a tokenizer.json"
        )
    return SPLITTINGS[name]


def _gguf_special(metadata: Mapping[str, Any], tokens: Sequence[str], role: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{role}_token_id {index} in this GGUF file, which has {len(tokens)} tokens; download it again"
        )
    return str(tokens[index])
