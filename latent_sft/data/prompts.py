"""From text to token ids: the one place where prompts, rationales and answers are rendered.

A training row is `prompt + think | cot | end_think | answer + eos`. Rationale and answer are stripped, tokenised by
themselves and put directly after the delimiter, with no whitespace in between; decoding gives the stripped text back.

Text of the user never becomes a control token: wherever it spells one, it is cut in two, and the pieces are tokenised
apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from latent_sft.config.schema import LatentConfig, PromptConfig
from latent_sft.data.formats import Record, split_steps, step_starts
from latent_sft.errors import ConfigError, DataError
from latent_sft.method.layout import fixed_segments
from latent_sft.method.types import LatentSpec

PLAIN_TEMPLATE = "{problem}\n"
CHAT = "chat"
_CONTROL = re.compile(r"<\|\w+\|>")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""")


def build_spec(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, latent: LatentConfig, vocab_size: int
) -> LatentSpec:
    """Return the LatentSpec of a configuration for this tokenizer.

    Args:
        tokenizer: of the base model.
        prompt: how a problem becomes a prompt.
        latent: settings of the latents.
        vocab_size: rows of the embedding table.

    Raises:
        ConfigError: a delimiter that the tokenizer cannot write, a chat template that is missing or refuses the system
            turn, no end-of-sequence token, or a value that LatentSpec refuses.
    """
    template = prompt.template
    if template == "auto":
        template = CHAT if tokenizer.chat_template else PLAIN_TEMPLATE
    foreign = [text for text in _CONTROL.findall(template) if text not in tokenizer.get_added_vocab()]
    if foreign:
        raise ConfigError(
            f"prompt.template: has {foreign[0]!r}, which is no token of this model; expected the control tokens of its "
            "own turns. Set prompt.template=chat to write turns as its chat template does."
        )
    if template == CHAT and not tokenizer.chat_template:
        raise ConfigError(
            "prompt.template: got 'chat', expected 'auto' or a text: this tokenizer has no chat template."
        )
    if prompt.think == prompt.end_think:
        raise ConfigError(f"prompt.end_think: got {prompt.end_think!r}, expected another text than prompt.think.")
    eos_id = _turn_end(tokenizer) if template == CHAT else tokenizer.eos_token_id
    if eos_id is None:
        raise ConfigError("model: this tokenizer has no eos_token; expected one, since it ends every answer.")
    pad_id = tokenizer.pad_token_id
    spec = LatentSpec(
        think_ids=_delimiter(tokenizer, "think", prompt.think),
        end_think_ids=_delimiter(tokenizer, "end_think", prompt.end_think),
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        vocab_size=vocab_size,
        prompt_template=template,
        system_prompt=prompt.system,
        system_placement=prompt.system_placement,
        **{**dataclasses.asdict(latent), "top_k": latent.top_k or vocab_size},
    )
    for name, token_id in (("eos", spec.eos_id), ("pad", spec.pad_id)):
        if token_id >= vocab_size:
            raise ConfigError(f"model: {name} token {token_id} has no row in the embedding table of {vocab_size}.")
    render_prompt(tokenizer, spec, "problem")  # shows here, not at the first row, that a template refuses a system turn
    return spec


def fix_date(tokenizer: PreTrainedTokenizerBase, day: str) -> None:
    """Write a day into the chat template wherever it asks for today's date, so that no prompt depends on the day.

    The tokenizer keeps it, and so do its fingerprint, its saved copies and whatever is exported with them.

    Args:
        tokenizer: its `chat_template` is replaced.
        day: as `2024-07-26`.

    Raises:
        ConfigError: the template computes the format of its date.
    """

    def dated(template: str) -> str:
        fixed = _TODAY.sub(lambda call: repr(date.fromisoformat(day).strftime(call["format"])), template)
        if left := re.search(r"strftime_now\s*\(.*", fixed):
            raise ConfigError(
                f"prompt.template: the chat template asks for today's date by {left[0]!r:.60}; expected strftime_now "
                "with a plain text, which prompt.date can replace. Give prompt.template as a text."
            )
        return fixed

    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # several by name, for example one for tools
        tokenizer.chat_template = {name: dated(template) for name, template in templates.items()}
    elif templates:
        tokenizer.chat_template = dated(templates)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, problem: str, turns: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Return the prompt's token ids, ending with `spec.think_ids`.

    With a chat template these are the ids of `apply_chat_template(..., add_generation_prompt=True)`. A template that
    opens the thinking by itself is not given a second delimiter.

    Args:
        tokenizer: of the base model.
        spec: settings.
        problem: what is asked.
        turns: role and text of a conversation that ends with the question, which a chat template is given in the
            problem's place. A system turn of its own stands where the configured one would.

    Raises:
        ConfigError: the chat template refuses these turns.
    """
    if spec.prompt_template == CHAT:
        return render_turns(tokenizer, spec, turns or [("user", problem)])
    system = turns[0][1] if [role for role, _ in turns] == ["system", "user"] else spec.system_prompt
    cut = _unused_character(problem + system)
    body = _cut(_instructed(system, problem), _reserved(tokenizer, spec), cut)
    # what the tokenizer itself puts in front of a text (beginning of sequence), without what it puts behind
    bos = tokenizer.bos_token_id
    before = [] if bos is None else [t for t in tokenizer("")["input_ids"][:1] if t == bos]
    text = spec.prompt_template.replace("{problem}", body)
    return before + _encode(tokenizer, text, cut)[0] + list(spec.think_ids)


def render_turns(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Return the prompt of a conversation by the chat template, with the instruction of training if it has none.

    Args:
        tokenizer: of the model.
        spec: settings; its template is the chat template.
        turns: role and text of each.

    Raises:
        ConfigError: the chat template refuses these turns.
    """
    (role, first), *others = turns
    if spec.system_prompt and role != "system":
        inside = spec.system_placement == role == "user"
        asked = _instructed(spec.system_prompt, first)
        turns = [(role, asked), *others] if inside else [("system", spec.system_prompt), *turns]
    cut = _unused_character("".join(text for _, text in turns) + str(tokenizer.chat_template))
    reserved = _reserved(tokenizer, spec)
    said = [{"role": role, "content": _cut(text, reserved, cut)} for role, text in turns]
    text = _render(tokenizer, said, open_reply=True)
    opened = tokenizer.decode(spec.think_ids).strip()
    if opened and text.rstrip().endswith(opened):
        text = text.rstrip().removesuffix(opened)
    return _encode(tokenizer, text, cut)[0] + list(spec.think_ids)


def _instructed(system: str, problem: str) -> str:
    return f"{system}\n{problem}" if system else problem


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, spec: LatentSpec | None = None) -> list[int]:
    """Return the ids of a text: nothing added in front or behind, and no control token even where it spells one.

    Args:
        tokenizer: any tokenizer.
        text: what to encode, as it is.
        spec: its delimiters are cut too; needed where the tokenizer reserves them without calling them special.
    """
    cut = _unused_character(text)
    return _encode(tokenizer, _cut(text, _reserved(tokenizer, spec), cut), cut)[0]


def tokenize_record(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, record: Record) -> dict[str, Any]:
    """Return the tokenised row of a record (columns: `latent_sft.data.dataset.SCHEMA`).

    `segment_lengths` sums to `len(cot)`: `rate, rate, ..., rest` (paper section 3.1), or the tokens of each step.

    Raises:
        DataError: the chain of thought holds the closing delimiter, or its steps are not parts of it in order.
    """
    cot_text, answer_text = record.cot.strip(), record.cot_answer.strip() or record.answer.strip()
    # chains of reasoning models come with the delimiters around them, which stand here in any case
    opening, closing = (tokenizer.decode(ids).strip() for ids in (spec.think_ids, spec.end_think_ids))
    bare = cot_text.removeprefix(opening).removesuffix(closing).strip()
    if bare and bare != cot_text:
        cot_text, record = bare, dataclasses.replace(record, cot=bare, steps=split_steps(bare))
    cut = _unused_character(cot_text)
    cot, ends = _encode(tokenizer, _cut(cot_text, _reserved(tokenizer, spec), cut), cut)
    if (closing and closing in cot_text) or _contains(cot, spec.end_think_ids):
        raise DataError(
            f"row {record.id!r}: field 'cot': contains the closing delimiter {closing!r}; expected a chain of thought "
            "without it. Remove it, or choose another prompt.end_think."
        )
    try:
        step_lengths = _step_lengths(record, cot_text, ends)
    except DataError:
        if spec.segmentation == "step":
            raise
        step_lengths = []  # only methods that replace steps read them, and say so
    segment_lengths = step_lengths if spec.segmentation == "step" else fixed_segments(len(cot), spec.rate)
    prompt = render_prompt(tokenizer, spec, record.problem, record.turns)
    answer = [*encode_text(tokenizer, answer_text, spec), spec.eos_id]
    content = json.dumps([prompt, cot, segment_lengths, answer], separators=(",", ":"))
    return {
        "id": record.id,
        "hash": hashlib.sha256(content.encode()).hexdigest()[:16],
        "prompt": prompt,
        "cot": cot,
        "segment_lengths": segment_lengths,
        "step_lengths": step_lengths,
        "answer": answer,
        "length": len(prompt) + len(cot) + len(spec.end_think_ids) + len(answer),
        "problem": record.problem,
        "reference": record.answer,
        "steps": list(record.steps),
        "mixture_ids": [[_single_token(tokenizer, spec, record, t) for t in step] for step in record.mixtures],
        "mixture_weights": [list(step.values()) for step in record.mixtures],
    }


def _single_token(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, record: Record, text: str) -> int:
    ids = encode_text(tokenizer, text, spec)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        found = f"{len(ids)} tokens" if len(ids) != 1 else "unknown to this tokenizer"
        raise DataError(f"row {record.id!r}: field 'mixtures': {text!r} is {found}; expected a single token.")
    return ids[0]


def _step_lengths(record: Record, cot: str, ends: list[int]) -> list[int]:
    # a token belongs to the step in which its last character stands, so the text is tokenised as in `fixed`
    try:
        starts = step_starts(cot, record.steps or split_steps(cot))
    except DataError as error:
        raise DataError(f"row {record.id!r}: {error} (latent.segmentation=step needs them).") from error
    lengths = [0] * len(starts)
    for end in ends:
        lengths[max(0, bisect_right(starts, end - 1) - 1)] += 1
    return [length for length in lengths if length]


def _delimiter(tokenizer: PreTrainedTokenizerBase, key: str, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids or tokenizer.unk_token_id in ids:
        raise ConfigError(f"prompt.{key}: got {text!r}, which this tokenizer cannot write; expected a text it knows.")
    return ids


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    # what the template itself writes right after an assistant's text, if that is a token of its own
    text = _render(tokenizer, [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}])
    tail = text.rpartition("reply")[2].lstrip()
    ends = [(len(token), token_id) for token, token_id in tokenizer.get_added_vocab().items() if tail.startswith(token)]
    return max(ends)[1] if ends else tokenizer.eos_token_id


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, open_reply: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConfigError(
            f"prompt.template: the chat template refuses the turns {roles} ({error}); expected a template that takes "
            "them. Set prompt.system_placement=user, or give prompt.template as a text."
        ) from error


@lru_cache(maxsize=16)
def _reserved_of(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, delimiters: tuple[int, ...]
) -> re.Pattern[str] | None:
    # num_tokens only makes the cache notice a token that was added later
    added = tokenizer.added_tokens_decoder
    words = {token.content for token_id, token in added.items() if token.special or token_id in delimiters}
    words |= {str(token) for token in tokenizer.all_special_tokens}
    longest_first = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _reserved(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec | None) -> re.Pattern[str] | None:
    delimiters = () if spec is None else spec.think_ids + spec.end_think_ids
    return _reserved_of(tokenizer, len(tokenizer), delimiters)


def _cut(text: str, reserved: re.Pattern[str] | None, cut: str) -> str:
    # after the first character of each occurrence; the search goes on from there, since occurrences may overlap
    position = 0
    while reserved is not None and (match := reserved.search(text, position)):
        position = match.start() + 1
        text = f"{text[:position]}{cut}{text[position:]}"
    return text


def _unused_character(text: str) -> str:
    # of the private use area, which carries no meaning in any text; beyond it where a text holds all of that
    return next(chr(code) for code in range(0xE000, 0x110000) if chr(code) not in text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, cut: str) -> tuple[list[int], list[int]]:
    # ids, and for each the end of its characters in the text without cuts
    ids: list[int] = []
    ends: list[int] = []
    offset = 0
    for piece in text.split(cut):
        if not tokenizer.is_fast:
            piece_ids = tokenizer.encode(piece, add_special_tokens=False)
            spans = [(0, len(piece))] * len(piece_ids)
        else:
            backend = tokenizer.backend_tokenizer  # several times faster than the wrapper, for short texts
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            encoding = backend.encode(piece, add_special_tokens=False)
            piece_ids, spans = encoding.ids, encoding.offsets
        ids += piece_ids
        ends += [offset + end for _, end in spans]
        offset += len(piece)
    return ids, ends


def _contains(ids: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == part for i in range(len(ids) - len(part) + 1))
