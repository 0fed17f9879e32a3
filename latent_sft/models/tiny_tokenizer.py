"""Tokenizers built from the training text, for small models trained from scratch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from latent_sft.config.schema import PromptConfig, TinyModelConfig
from latent_sft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CONTINUES = "##"  # mark of a digit that belongs to the number before it; `#` itself is always a token of its own
# a number (0.5 and 1,000 included), a word, or a run of one symbol such as << or ...
PIECE = r"\d+(?:[.,]\d+)*|[^\W\d]+|#|([^\w\s#])\1*"


def build_tokenizer(texts: Iterable[str], config: TinyModelConfig, prompt: PromptConfig) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose vocabulary comes from `texts`.

    `word`: a token is a number, a word, or a run of one symbol; the most frequent ones are kept, the rest is `<unk>`.
    `digits`: the same, but numbers are written digit by digit, so that no number is unknown. Both drop whitespace and
    decode with single spaces, except beside symbols that stand without one in most of the text (`Tom is here.`,
    `<<16-3=13>>`); decoded text equals its source up to whitespace. `space`: a token is what stands between whitespace;
    decodes with single spaces. `bpe`: byte-level BPE, decodes exactly.

    `<think>`, `</think>` (as `prompt` spells them), `<pad>`, `<eos>` and `<unk>` are reserved tokens.

    Args:
        texts: problems, chains of thought and answers of the training set.
        config: kind of tokenizer and largest vocabulary.
        prompt: spelling of the delimiters.

    Raises:
        ConfigError: the vocabulary is too small for the kind, or the delimiters are no two texts.
    """
    from transformers import PreTrainedTokenizerFast

    delimiters = [prompt.think, prompt.end_think]
    if len({*delimiters, PAD, EOS, UNK, ""}) != 6:
        raise ConfigError(
            f"prompt.think: got {prompt.think!r} and end_think {prompt.end_think!r}, expected two texts that "
            "differ from each other and from the reserved ones."
        )
    reserved = [PAD, EOS, UNK, *delimiters]
    backend = _bpe(texts, config, reserved) if config.tokenizer == "bpe" else _words(texts, config, reserved)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=delimiters,
        clean_up_tokenization_spaces=False,
    )


def _words(texts: Iterable[str], config: TinyModelConfig, reserved: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    spaces = config.tokenizer == "space"
    counts, glue = (Counter(word for text in texts for word in text.split()), "") if spaces else _count(texts)
    vocabulary = [*reserved]
    if config.tokenizer == "digits":
        counts = Counter({piece: n for piece, n in counts.items() if not piece[0].isdecimal()})
        vocabulary += [mark + digit for mark in ("", CONTINUES) for digit in "0123456789"]
        vocabulary += [CONTINUES + ".", CONTINUES + ","]
    room = config.vocab_size - len(vocabulary)
    if room < 1:
        raise ConfigError(
            f"model.tiny.vocab_size: got {config.vocab_size}, expected more than {len(vocabulary)} for tokenizer "
            f"{config.tokenizer!r}, which needs that many reserved tokens."
        )
    frequent = sorted(counts.keys() - set(vocabulary), key=lambda piece: (-counts[piece], piece))
    vocabulary += frequent[:room]
    table = {piece: index for index, piece in enumerate(vocabulary)}
    if config.tokenizer == "digits":
        # greedy longest match: a word is one piece or unknown, a number one digit after another
        model: models.Model = models.WordPiece(
            table, unk_token=UNK, continuing_subword_prefix=CONTINUES, max_input_chars_per_word=10_000
        )
    else:
        model = models.WordLevel(table, unk_token=UNK)
    backend = Tokenizer(model)
    if spaces:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return backend
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    steps = [decoders.WordPiece(prefix=CONTINUES, cleanup=False), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Replace(Regex(glue), "")] if glue else steps)
    return backend


def _count(texts: Iterable[str]) -> tuple[Counter[str], str]:
    # how often each piece occurs, and a pattern of the spaces to drop when decoding: those beside a symbol that in most
    # of its places stands right after (or right before) its neighbour
    pieces: Counter[str] = Counter()
    symbols: Counter[str] = Counter()
    after: Counter[str] = Counter()
    before: Counter[str] = Counter()
    pattern = re.compile(PIECE)
    for text in texts:
        for match in pattern.finditer(text):
            piece = match.group()
            pieces[piece] += 1
            if not piece[0].isalnum() and piece[0] != "_":
                start, end, symbol = match.start(), match.end(), piece[0]
                symbols[symbol] += 1
                after[symbol] += start > 0 and not text[start - 1].isspace()
                before[symbol] += end < len(text) and not text[end].isspace()
    left = "".join(re.escape(s) for s in sorted(symbols) if after[s] > symbols[s] / 2)
    right = "".join(re.escape(s) for s in sorted(symbols) if before[s] > symbols[s] / 2)
    parts = ([f" (?=[{left}])"] if left else []) + ([f"(?<=[{right}]) "] if right else [])
    return pieces, "|".join(parts)


def _bpe(texts: Iterable[str], config: TinyModelConfig, reserved: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.vocab_size < len(alphabet) + len(reserved):
        raise ConfigError(
            f"model.tiny.vocab_size: got {config.vocab_size}, expected at least {len(alphabet) + len(reserved)} for "
            "tokenizer 'bpe' (256 bytes and the reserved tokens)."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=reserved, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend
