"""Text to token ids and back; ids to text one by one, never half a character."""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from .errors import InputError, ModelError, one_line

FILE_BYTES = 256 * 1024 * 1024  # the family's own file has about 20 MB
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: printable bytes for themselves, the
    others, in order, from U+0100 on (so a space is `Ġ`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTES = _alphabet()


def token_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry stands for. One with a character outside the byte alphabet (an
    added token holding a space, say) stands for its own text.

    Source: tokenizers `pre_tokenizers/byte_level.rs` `decode_chain`.
    """
    values = [BYTES.get(character, -1) for character in token]
    return token.encode("utf-8") if -1 in values else bytes(values)


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """What the library raises about its own file, as a ModelError."""
    try:
        yield
    except BaseException as error:  # a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{where}: {one_line(error)}; expected a tokenizer of the tokenizers library. "
            "Take the file from the model's own repository."
        ) from None


class Tokenizer:
    """The byte-level BPE of a model folder."""

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "tokenizer.json") -> None:
        """Raises: ModelError when `backend` is not byte-level or has no stop token."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ModelError(
                f"{where}: its decoder is {type(backend.decoder).__name__}; a byte-level "
                "tokenizer was expected. Take the file from the model's own repository."
            )
        # a file may ask for both, and a prompt must be neither cut nor filled
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._where = backend, where
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._bytes = lru_cache(maxsize=65_536)(self._read_bytes)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        stops = (self.id_of(token) for token in STOP_TOKENS)
        self.stop_ids: frozenset[int] = frozenset(id for id in stops if id is not None)
        if not self.stop_ids:
            raise ModelError(
                f"{where}: it has neither {' nor '.join(STOP_TOKENS)}; without them no answer "
                "would end. Take the file from the model's own repository."
            )

    @classmethod
    def read(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of `folder`/tokenizer.json. Raises: ModelError: missing or damaged."""
        path = Path(folder) / "tokenizer.json"
        try:
            size = path.stat().st_size
            if not path.is_file():  # a pipe would be waited for
                raise OSError("not a plain file")
            if size > FILE_BYTES:
                raise ModelError(
                    f"{path}: {size:,} bytes; at most {FILE_BYTES:,} are read as a tokenizer. "
                    "Take the file from the model's own repository."
                )
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ModelError(
                f"{path}: missing; a model folder needs its tokenizer. "
                "Copy the file from the model's own repository."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot be read: {one_line(error)}. Copy it anew.") from None
        with _refusals(str(path)):
            backend = tokenizers.Tokenizer.from_str(text)
        return cls(backend, str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: added tokens in it are recognised, nothing is put before it.

        Raises: InputError when `text` holds half a surrogate pair, which no encoding can write;
        ModelError when the file asks for what the library cannot do with `text`.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: U+{ord(text[error.start]):04X} at character {error.start}; half a "
                "surrogate pair is no character. Remove it."
            ) from None
        with _refusals(self._where):
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without the special tokens; bytes that are no UTF-8 become U+FFFD.

        Ids beyond the vocabulary (the padding of the embedding) stand for nothing.
        """
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def bytes_of(self, id: int) -> bytes:
        """What `id` adds to the text: nothing for a special token or one beyond the vocabulary."""
        return self._bytes(int(id))

    def _read_bytes(self, id: int) -> bytes:
        if id < 0 or id in self._special:
            return b""
        token = self._backend.id_to_token(id)
        return b"" if token is None else token_bytes(token)

    def id_of(self, token: str) -> int | None:
        """The id of one token as the vocabulary writes it; None when it has none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def detokenizer(self) -> "Detokenizer":
        """A new stream of text."""
        return Detokenizer(self)


class Detokenizer:
    """Ids in, whole characters out. All pieces together are `decode` of all ids.

    Each step costs what the token's bytes cost: at most three bytes wait for their character, and
    no earlier token is looked at again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        """The characters that `id` completes, often none or several."""
        text: str = self._decoder.decode(self._tokenizer.bytes_of(id))
        return text

    def finish(self) -> str:
        """What is left: U+FFFD for a character whose bytes never came. Starts the stream anew."""
        text: str = self._decoder.decode(b"", True)
        return text
