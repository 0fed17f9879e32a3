"""Tokenizers built from text: what a token is, reserved tokens, decoding, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from latent_sft.config.schema import PromptConfig, TinyModelConfig
from latent_sft.errors import ConfigError
from latent_sft.models.tiny_tokenizer import build_tokenizer

TEXTS = [
    "Bob's 12 eggs cost $3. He sells 4 of them (or 5)?",
    "<<12-4=8>> <<8*3=24>>",
    "\\boxed{24}",
    "Bob has 0.5 eggs.",
    "5 - 2 = 3 ;",
]
KINDS = ("word", "digits", "space", "bpe")


def build(kind: str, texts: list[str] = TEXTS, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    return build_tokenizer(texts, TinyModelConfig(tokenizer=kind, vocab_size=vocab_size), PromptConfig())  # type: ignore[arg-type]


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_a_word_number_or_run_of_a_symbol_is_one_token() -> None:
    assert pieces(build("word"), "Bob has 12 eggs <<12-4=8>>") == "Bob has 12 eggs << 12 - 4 = 8 >>".split()
    assert pieces(build("word"), "0.5\t12") == ["0.5", "12"]
    assert pieces(build("word"), "unseen 13 Bob") == ["<unk>", "<unk>", "Bob"]


def test_digits_spells_every_number() -> None:
    tokenizer = build("digits")
    assert pieces(tokenizer, "12 eggs, 907.5") == ["1", "##2", "eggs", "<unk>", "9", "##0", "##7", "##.", "##5"]
    assert tokenizer.decode(tokenizer("907.5 eggs 1,000 3 4")["input_ids"]) == "907.5 eggs 1,000 3 4"
    assert "12" not in tokenizer.get_vocab()


def test_space_takes_whatever_stands_between_spaces_for_a_token() -> None:
    tokenizer = build("space", ["D5 D3 S-2", "##1  #### <<1+1=2>>\n"])
    assert pieces(tokenizer, "S-2\tD3\n<<1+1=2>> S2") == ["S-2", "D3", "<<1+1=2>>", "<unk>"]
    assert tokenizer.decode(tokenizer("D5 ##1  S-2 ####")["input_ids"]) == "D5 ##1 S-2 ####"
    assert len(tokenizer.get_vocab()) == 6 + 5  # and the reserved ones


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_text_back(kind: str) -> None:
    tokenizer = build(kind)
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"])
        assert "".join(decoded.split()) == "".join(text.split())
        if kind == "bpe":
            assert decoded == text


def test_spaces_beside_symbols_follow_the_training_text() -> None:
    glued = build("word", ["Is Tom a lempus? Tom is here.", "<<1+1=2>> <<2+1=3>>", "\\boxed{3}"])
    for text in ("Tom is a lempus.", "<<2+2=3>>", "\\boxed{2}"):
        assert glued.decode(glued(text)["input_ids"]).replace("<unk>", "a") == text
    spaced = build("word", ["bob has 1 . how many ?", "1 + 1 = 2 ;"])
    for text in ("bob has 2 . how many ?", "2 + 1 = 1 ;"):
        assert spaced.decode(spaced(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_tokens(kind: str) -> None:
    tokenizer = build(kind)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>", "<think>", "</think>"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("Bob<think></think>")["input_ids"][-2:] == [3, 4]
    assert tokenizer.decode([3, *tokenizer("eggs")["input_ids"], 4, 1], skip_special_tokens=True).strip() == "eggs"


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_with_plain_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = build(kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Bob has 12 eggs. <think> <<12-4=8>> </think> 24"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (loaded.pad_token, loaded.eos_token, len(loaded)) == ("<pad>", "<eos>", len(tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokenizer_within_the_bound(kind: str) -> None:
    first, second = build(kind, vocab_size=262), build(kind, vocab_size=262)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 262


def test_the_most_frequent_words_are_kept() -> None:
    tokenizer = build("word", ["a a a b b c " + " ".join(f"w{chr(97 + i)}" for i in range(20))], vocab_size=16)
    assert len(tokenizer) == 16
    assert {"a", "b", "c"} < set(tokenizer.get_vocab())


def test_too_small_vocabularies_and_equal_delimiters_are_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.tiny\.vocab_size: got 100, expected at least 261 for tokenizer 'bpe'"
    ):
        build("bpe", vocab_size=100)
    with pytest.raises(
        ConfigError, match=r"model\.tiny\.vocab_size: got 20, expected more than 27 for tokenizer 'digits'"
    ):
        build("digits", vocab_size=20)
    with pytest.raises(ConfigError, match=r"prompt\.think: got '<eos>'"):
        build_tokenizer(TEXTS, TinyModelConfig(), PromptConfig(think="<eos>"))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bpe_knows_every_text(text: str) -> None:
    tokenizer = BPE
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


BPE = build("bpe")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["Bob", "eggs", " ", "\n", "12", "0.5", "907", "-", "<<", ">>", "$", "."]), max_size=12)
)
def test_digits_loses_nothing_but_whitespace(parts: list[str]) -> None:
    text = "".join(parts)
    decoded = DIGITS.decode(DIGITS(text)["input_ids"])
    if "<unk>" not in decoded:
        assert "".join(decoded.split()) == "".join(text.split())


DIGITS = build("digits")
