"""Encoding and decoding, against the tokenizers library and over random ids in many scripts."""

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from qwen35_mlx.errors import InputError, ModelError
from qwen35_mlx.tokenizer import BYTES, Tokenizer, token_bytes

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# in the family's order; <tool_call> to </think> are not special, so they reach the parser
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN = [
    f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/")
]
WORDS = [
    "user assistant system describe this picture and this video <0.5 seconds> <10.2 seconds>",
    "Grüße aus Köln, größer! Ça va? Příliš žluťoučký kůň",
    "日本語のテキスト 中文文本 한국어 텍스트",
    "हिन्दी पाठ ภาษาไทย עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 é e\u0301",
]
TEXTS = [
    *WORDS,
    "",
    " leading and trailing ",
    "a\r\n\r\nb\tc",
    "\x00\x7f\u200b\ufeff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀 \U0010ffff",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n",
]


def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE with the family's normaliser, splitting and added tokens; 435 ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=list(BYTES), show_progress=False, special_tokens=[]
    )
    made.train_from_iterator(WORDS * 3, trainer)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return made


def write(folder: Path) -> Path:
    """A model folder with nothing but that tokenizer."""
    backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    return backend()


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert sorted(BYTES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))
    assert BYTES["Ġ"] == 0x20 and BYTES["Ċ"] == 0x0A and BYTES["a"] == 0x61


def test_a_token_outside_the_alphabet_stands_for_its_text() -> None:
    assert token_bytes("Ġab") == b" ab"
    assert token_bytes("a b") == b"a b"
    assert token_bytes("日") == "日".encode()


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_is_the_librarys_and_decoding_inverts_it(
    tokenizer: Tokenizer, reference: tokenizers.Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    if "<|" not in text:
        assert tokenizer.decode(ids) == normalizers.NFC().normalize_str(text)


def test_special_tokens_vanish_and_the_other_added_ones_stay(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>a<think>b</think><tool_call>c<|im_end|>")
    assert ids[0] == tokenizer.id_of("<|im_start|>") and ids[-1] == tokenizer.id_of("<|im_end|>")
    assert tokenizer.decode(ids) == "a<think>b</think><tool_call>c"
    for token in (*SPECIAL, *PLAIN):
        assert tokenizer.encode(token) == [tokenizer.id_of(token)]


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    words = tokenizer.detokenizer()
    size = tokenizer.vocab_size
    assert tokenizer.decode([size, size + 3, 10**9, -1]) == ""
    assert [words.add(size), words.add(size + 1000), words.finish()] == ["", "", ""]
    assert tokenizer.id_of("<no such token>") is None


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Whole texts, their halves, and anything at all of the vocabulary and beyond, mixed."""
    ids: list[int] = []
    for _ in range(rng.randrange(1, 6)):
        kind = rng.randrange(3)
        if kind == 0:
            ids += tokenizer.encode(rng.choice(TEXTS))
        elif kind == 1:
            some = tokenizer.encode(rng.choice(TEXTS))
            ids += some[rng.randrange(len(some) + 1) :][: rng.randrange(7)]
        else:
            ids += [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randrange(9))]
    return ids


def test_the_pieces_together_are_the_decoded_text(
    tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    rng = random.Random(7)
    for _ in range(4000):
        ids = random_ids(tokenizer, rng)
        words = tokenizer.detokenizer()
        text = "".join(words.add(id) for id in ids) + words.finish()
        assert text == tokenizer.decode(ids)
        assert text == reference.decode(ids, skip_special_tokens=True), ids


def test_random_bytes_group_into_replacement_characters_as_the_library_does(
    tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    ids = [tokenizer.id_of(character) for character in sorted(BYTES, key=BYTES.__getitem__)]
    starts = [0xC3, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xC0, 0x80, 0x9F, 0xA0, 0xBF, 0x41]
    rng = random.Random(3)
    for _ in range(4000):
        some = [ids[rng.choice(starts)] for _ in range(rng.randrange(1, 9))]
        known = [id for id in some if id is not None]
        assert len(known) == len(some)
        words = tokenizer.detokenizer()
        text = "".join(map(words.add, known)) + words.finish()
        assert text == tokenizer.decode(known) == reference.decode(known)


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        plain = normalizers.NFC().normalize_str(text)
        for data in (plain.encode(), *[c.encode() for c in plain]):
            words = tokenizer.detokenizer()
            by_byte = {byte: tokenizer.id_of(character) for character, byte in BYTES.items()}
            out = [words.add(by_byte[byte] or 0) for byte in data]
            assert words.finish() == ""
            assert "\ufffd" not in "".join(out)
            assert all(len(piece) <= 1 for piece in out)
            assert "".join(out) == data.decode()


def test_a_broken_character_shows_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    ids = {byte: tokenizer.id_of(character) or 0 for character, byte in BYTES.items()}
    words = tokenizer.detokenizer()
    assert [words.add(ids[b]) for b in b"\xe2\x82A"] == ["", "", "\ufffdA"]
    assert [words.add(ids[b]) for b in b"\xf0\x9f\x91"] == ["", "", ""]
    assert words.finish() == "\ufffd"
    assert words.add(ids[0x41]) + words.finish() == "A"


def test_a_special_token_inside_a_character_does_not_break_it(tokenizer: Tokenizer) -> None:
    ids = {byte: tokenizer.id_of(character) or 0 for character, byte in BYTES.items()}
    stop = tokenizer.id_of("<|im_start|>")
    assert stop is not None
    words = tokenizer.detokenizer()
    assert [words.add(id) for id in (ids[0xC3], stop, ids[0xA9])] == ["", "", "é"]


def test_a_step_reads_one_token_and_keeps_at_most_three_bytes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    bytes_of = tokenizer.bytes_of

    def counted(id: int) -> bytes:
        read.append(id)
        return bytes_of(id)

    monkeypatch.setattr(tokenizer, "bytes_of", counted)
    ids = random_ids(tokenizer, random.Random(11)) * 50
    words = tokenizer.detokenizer()
    for step, id in enumerate(ids, 1):
        words.add(id)
        assert len(read) == step
        assert len(words._decoder.getstate()[0]) <= 3


def test_stop_ids_are_the_folders_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids == {tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")}
    other = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    other.decoder = decoders.ByteLevel()
    other.add_special_tokens(["<|im_end|>"])
    assert Tokenizer(other).stop_ids == {2}


def test_a_file_that_asks_for_truncation_and_padding_gets_neither(tmp_path: Path) -> None:
    made = backend()
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer.read(tmp_path)
    assert read.encode(WORDS[0]) == backend().encode(WORDS[0]).ids


def test_half_a_surrogate_pair_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"^text: U\+D83D at character 2; .*Remove it\.$"):
        tokenizer.encode("ab" + json.loads('"\\ud83d"'))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        Tokenizer.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'}: missing;")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"model": {"type": "BPE"}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"^\S+tokenizer.json: .*; expected a tokenizer") as error:
        Tokenizer.read(tmp_path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="tokenizer.json: cannot be read"):
        Tokenizer.read(tmp_path)


def test_a_pipe_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")  # opening it would wait for ever
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read: not a plain file\."):
        Tokenizer.read(tmp_path)


def test_a_text_the_library_fails_at_is_a_model_error() -> None:
    lost = tokenizers.Tokenizer(models.WordLevel({"<|im_end|>": 0}, unk_token="<unk>"))
    lost.decoder = decoders.ByteLevel()
    panics = backend()
    panics.normalizer = normalizers.Replace(Regex("(a|aa)+$"), "b")
    for made, text in ((lost, "hello"), (panics, "a" * 100_000 + "!")):
        with pytest.raises(ModelError, match=r"^x/tokenizer\.json: .*; expected a") as error:
            Tokenizer(made, "x/tokenizer.json").encode(text)
        assert "\n" not in str(error.value)


def test_too_large_a_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    size = (tmp_path / "tokenizer.json").stat().st_size
    monkeypatch.setattr("qwen35_mlx.tokenizer.FILE_BYTES", size - 1)
    with pytest.raises(ModelError, match=f"{size:,} bytes; at most {size - 1:,}"):
        Tokenizer.read(tmp_path)
    monkeypatch.setattr("qwen35_mlx.tokenizer.FILE_BYTES", size)
    assert Tokenizer.read(tmp_path).vocab_size > 0


def test_another_kind_of_tokenizer_is_refused() -> None:
    other = tokenizers.Tokenizer(models.WordLevel({"<|im_end|>": 0}, unk_token="<|im_end|>"))
    other.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="decoder is WordPiece; a byte-level tokenizer was"):
        Tokenizer(other, "x/tokenizer.json")


def test_a_tokenizer_without_stop_tokens_is_refused() -> None:
    other = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    other.decoder = decoders.ByteLevel()
    with pytest.raises(ModelError, match=r"neither <\|im_end\|> nor <\|endoftext\|>"):
        Tokenizer(other)
