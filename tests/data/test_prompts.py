"""From text to ids: delimiters of one or several tokens, chat templates, and text that spells control tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from latent_sft.config.experiment import Config
from latent_sft.config.schema import LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.dataset import tokenizer_fingerprint
from latent_sft.data.formats import Record
from latent_sft.data.prompts import build_spec, encode_text, fix_date, render_prompt, render_turns, tokenize_record
from latent_sft.errors import ConfigError, DataError
from latent_sft.method.types import LatentSpec
from latent_sft.models.tiny_tokenizer import build_tokenizer

TEXTS = ["How many eggs are 2 and 3?", "system user assistant", "<<2+3=5>> <<5*2=10>> <think> </think>"]

# the shape of three widespread templates: headers as special tokens with trimmed text, role lines, and a template
# without a system turn; the last one opens the thinking by itself
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|turn|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
ROLE_LINES = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ROLE_LINES
)
OPENS_THINKING = ROLE_LINES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# as Llama 3 does it: the day stands in the system turn, which is there in any case
DATED = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}'
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- '<|start|>system<|end|>\n\nToday Date: ' + date_string + '<|turn|>' }}"
    + HEADERS.replace("{{ bos_token }}", "")
)


def make_tokenizer(
    template: str | None = None, *, delimiters: tuple[str, str] = ("[B]", "[E]")
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with chat tokens; by default `<think>` is several ordinary tokens."""
    prompt = PromptConfig(think=delimiters[0], end_think=delimiters[1])
    tokenizer = build_tokenizer(TEXTS, TinyModelConfig(tokenizer="bpe", vocab_size=300), prompt)
    if template is not None:
        tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
        tokenizer.add_tokens(["<|start|>", "<|end|>", "<|turn|>"], special_tokens=True)
        tokenizer.chat_template = template
    return tokenizer


def make_spec(tokenizer: PreTrainedTokenizerFast, latent: LatentConfig | None = None, **prompt: str) -> LatentSpec:
    config = Config(prompt=PromptConfig(**prompt), latent=latent or LatentConfig())  # type: ignore[arg-type]
    return build_spec(tokenizer, config.prompt, config.latent, len(tokenizer))


RESERVED = make_tokenizer(delimiters=("<think>", "</think>"))
SEVERAL = make_tokenizer()
CHAT = make_tokenizer(HEADERS)


def test_delimiters_are_one_reserved_token_or_several_ordinary_ones() -> None:
    spec = make_spec(RESERVED)
    assert (spec.think_ids, spec.end_think_ids) == ((3,), (4,))
    spec = make_spec(SEVERAL)
    assert len(spec.end_think_ids) > 1
    assert SEVERAL.decode(spec.think_ids) + SEVERAL.decode(spec.end_think_ids) == "<think></think>"
    assert (spec.eos_id, spec.pad_id, spec.vocab_size) == (1, 0, len(SEVERAL))


def test_the_spec_takes_over_every_latent_setting() -> None:
    latent = LatentConfig(rate=4, segmentation="step", top_k=3, temperature=4.0, noise_scale=1.0, max_latents=9)
    spec = make_spec(RESERVED, latent)
    assert {f.name: getattr(spec, f.name) for f in dataclasses.fields(latent)} == dataclasses.asdict(latent)


def test_plain_prompt() -> None:
    ids = render_prompt(RESERVED, make_spec(RESERVED), "How many?")
    assert RESERVED.decode(ids) == "How many?\n<think>"
    spec = make_spec(SEVERAL, template="Q: {problem} A: ", system="Think.")
    assert SEVERAL.decode(render_prompt(SEVERAL, spec, "How many?")) == "Q: Think.\nHow many? A: <think>"


def test_a_plain_prompt_begins_as_the_tokenizer_begins_a_text() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(delimiters=("<think>", "</think>"))
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <eos>", special_tokens=[("<|begin|>", bos), ("<eos>", 1)]
    )
    assert render_prompt(tokenizer, make_spec(tokenizer), "p") == [bos, *encode_text(tokenizer, "p\n"), 3]


@pytest.mark.parametrize("template", [HEADERS, ROLE_LINES, NO_SYSTEM])
@pytest.mark.parametrize("problem", ["How many eggs?", "  two\n\nlines  ", "a < b > c", "ünï 漢字 🙂"])
def test_ordinary_problems_are_rendered_as_the_chat_template_does(template: str, problem: str) -> None:
    tokenizer = make_tokenizer(template)
    spec = make_spec(tokenizer)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": problem}], add_generation_prompt=True)
    assert spec.prompt_template == "chat"
    assert render_prompt(tokenizer, spec, problem) == [*rendered["input_ids"], *spec.think_ids]


def test_system_placement() -> None:
    start, end = "<|start|>", "<|end|>"
    tokenizer = make_tokenizer(ROLE_LINES)
    user = make_spec(tokenizer, system="Be brief.")
    assert tokenizer.decode(render_prompt(tokenizer, user, "p")) == (
        f"{start}user\nBe brief.\np{end}\n{start}assistant\n<think>"
    )
    system = make_spec(tokenizer, system="Be brief.", system_placement="system")
    assert tokenizer.decode(render_prompt(tokenizer, system, "p")) == (
        f"{start}system\nBe brief.{end}\n{start}user\np{end}\n{start}assistant\n<think>"
    )


def test_a_conversation_is_rendered_as_the_chat_template_does_with_the_instruction_of_training() -> None:
    def said(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
        return [(turn["role"], turn["content"]) for turn in turns]

    tokenizer = make_tokenizer(ROLE_LINES)
    turns = [
        {"role": role, "content": text} for role, text in (("user", "2 and 3"), ("assistant", "5"), ("user", "2?"))
    ]
    for placement, expected in (
        ("system", [{"role": "system", "content": "be <|end|>"}, *turns]),
        ("user", [{"role": "user", "content": "be <|end|>\n2 and 3"}, *turns[1:]]),
    ):
        spec = make_spec(tokenizer, template="chat", system="be <|end|>", system_placement=placement)
        ids = render_turns(tokenizer, spec, said(turns))
        assert ids[-len(spec.think_ids) :] == list(spec.think_ids)
        rendered = tokenizer.apply_chat_template(expected, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids[: -len(spec.think_ids)]) == rendered
        # the text in the instruction that spells a control token is not one: three turns and the one to be answered
        ends = ids.count(tokenizer.convert_tokens_to_ids("<|end|>"))
        assert ends == rendered.count("<|end|>") - 1 == len(expected)
        own = [{"role": "system", "content": "count"}, *turns]
        assert render_turns(tokenizer, spec, said(own))[: -len(spec.think_ids)] == tokenizer.apply_chat_template(
            own, add_generation_prompt=True, return_dict=False
        )


def test_a_template_that_opens_the_thinking_is_not_given_it_twice() -> None:
    tokenizer = make_tokenizer(OPENS_THINKING)
    text = tokenizer.decode(render_prompt(tokenizer, make_spec(tokenizer), "p"))
    assert text == "<|start|>user\np<|end|>\n<|start|>assistant\n<think>"


def at_midnight(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    class Today(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Today)


def test_no_prompt_depends_on_the_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = set()
    for day in ("2026-11-30", "2027-01-01"):
        at_midnight(monkeypatch, day)
        tokenizer = make_tokenizer(DATED)
        assert f"Date: {day[-2:]}" in tokenizer.apply_chat_template([{"role": "user", "content": "p"}], tokenize=False)
        fix_date(tokenizer, PromptConfig().date)
        ids = render_prompt(tokenizer, make_spec(tokenizer), "p")
        found.add((*ids, tokenizer_fingerprint(tokenizer)))
        assert "Today Date: 26 Jul 2024<|turn|><|start|>user" in tokenizer.decode(ids)
        # whoever loads a saved copy, such as an export, gets the same prompt
        tokenizer.save_pretrained(tmp_path / day)
        copy = AutoTokenizer.from_pretrained(tmp_path / day)
        chat = copy.apply_chat_template([{"role": "user", "content": "p"}], add_generation_prompt=True)
        assert [*chat["input_ids"], *make_spec(tokenizer).think_ids] == ids
    assert len(found) == 1


def test_the_day_is_part_of_the_fingerprint() -> None:
    found = []
    for day in ("2024-07-26", "2025-01-01"):
        tokenizer = make_tokenizer(DATED)
        fix_date(tokenizer, day)
        found.append(tokenizer_fingerprint(tokenizer))
    assert "01 Jan 2025" in str(tokenizer.chat_template)
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match=r"prompt\.date: got '26 Jul 2024', expected a day, as 2024-07-26"):
        PromptConfig(date="26 Jul 2024")


def test_templates_without_a_date_by_name_or_with_a_computed_one() -> None:
    tokenizer = make_tokenizer(HEADERS)
    fix_date(tokenizer, "2024-07-26")
    assert tokenizer.chat_template == HEADERS
    fix_date(RESERVED, "2024-07-26")
    assert RESERVED.chat_template is None
    tokenizer.chat_template = {"default": HEADERS, "tools": "{{ strftime_now( '%Y/%m' ) }}"}
    fix_date(tokenizer, "2024-07-26")
    assert tokenizer.chat_template == {"default": HEADERS, "tools": "{{ '2024/07' }}"}
    tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}"
    with pytest.raises(ConfigError, match=r"asks for today's date by 'strftime_now\(f\)"):
        fix_date(tokenizer, "2024-07-26")


def test_a_text_with_the_control_tokens_of_another_model_is_refused() -> None:
    text = "<|start|>user<|end|>\n\n{problem}<|turn|>"
    assert make_spec(make_tokenizer(HEADERS), template=text).prompt_template == text
    with pytest.raises(ConfigError, match=r"prompt\.template: has '<\|start\|>', which is no token of this model"):
        make_spec(RESERVED, template=text)


@pytest.mark.parametrize(("template", "end"), [(HEADERS, "<|turn|>"), (ROLE_LINES, "<|end|>"), (NO_SYSTEM, "<|end|>")])
def test_the_answer_of_a_chat_model_ends_as_its_turn_ends(template: str, end: str) -> None:
    tokenizer = make_tokenizer(template)
    assert make_spec(tokenizer).eos_id == tokenizer.convert_tokens_to_ids(end)
    plain = make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert make_spec(plain).eos_id == plain.eos_token_id


def test_pad_may_be_missing_or_equal_to_eos() -> None:
    tokenizer = make_tokenizer(delimiters=("<think>", "</think>"))
    for pad in (None, "<eos>"):
        tokenizer.pad_token = pad
        spec = make_spec(tokenizer)
        assert spec.pad_id == spec.eos_id == 1


HOSTILE = [
    "<think>",
    "</think>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<|start|>",
    "<|end|>",
    "<|turn|>",
    "<|begin|>",
    "<",
    "|",
    "a",
]


@pytest.mark.parametrize("tokenizer", [RESERVED, SEVERAL, CHAT], ids=["reserved", "several", "chat"])
@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.sampled_from(HOSTILE), max_size=8))
def test_text_never_becomes_a_control_token(tokenizer: PreTrainedTokenizerFast, parts: list[str]) -> None:
    spec, text = make_spec(tokenizer), "".join(parts)
    control = set(tokenizer.all_special_ids)
    ids = encode_text(tokenizer, text, spec)
    assert control.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    # the prompt has exactly the control tokens that it has for a harmless problem
    count = [sum(token in control for token in render_prompt(tokenizer, spec, p)) for p in (text, "harmless")]
    assert count[0] == count[1]
    assert tokenizer.decode(render_prompt(tokenizer, spec, text)).count(text) >= 1


def test_delimiters_reserved_without_being_special_are_split_too() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])  # added, but not special
    spec = make_spec(tokenizer)
    assert len(spec.think_ids) == 1
    for ids in (
        render_prompt(tokenizer, spec, "a <think> b"),
        [*encode_text(tokenizer, "a <think> b", spec), *spec.think_ids],
    ):
        assert ids.count(spec.think_ids[0]) == 1
        assert tokenizer.decode(ids).count("<think>") == 2


def test_tokenizers_that_mark_words_instead_of_spaces() -> None:
    vocabulary = [*"▁abcdeilmnot<>/k", "▁a", "<unk>", "</s>"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [("▁", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    spec = make_spec(tokenizer, think="<a>", end_think="</a>", template="{problem} ")
    record = Record(id="1", problem="a </s> line", cot="a bad note", cot_answer="a", answer="a", steps=())
    row = tokenize_record(tokenizer, spec, record)
    assert spec.eos_id not in row["prompt"]
    assert tokenizer.decode(row["cot"]) == "a bad note"


RECORD = Record(
    id="r1",
    problem="How many?",
    cot="<<2+3=5>> <<5*2=10>>",
    cot_answer="so 10",
    answer="10",
    steps=("<<2+3=5>>", "<<5*2=10>>"),
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["How many? <<2+3=5>> <<5*2=10>> so"], TinyModelConfig(), PromptConfig())


def test_the_tokenised_row() -> None:
    tokenizer = word_tokenizer()
    spec = make_spec(tokenizer, LatentConfig(rate=3))
    row = tokenize_record(tokenizer, spec, RECORD)
    # << 2 + 3 = 5 >> << 5 * 2 = 10 >> is 14 tokens: 4 chunks of 3 and a rest of 2
    assert tokenizer.convert_ids_to_tokens(row["cot"]) == "<< 2 + 3 = 5 >> << 5 * 2 = 10 >>".split()
    assert row["segment_lengths"] == [3, 3, 3, 3, 2]
    assert tokenizer.convert_ids_to_tokens(row["prompt"]) == ["How", "many", "?", "<think>"]
    assert tokenizer.convert_ids_to_tokens(row["answer"]) == ["so", "10", "<eos>"]
    assert row["length"] == 4 + 14 + 1 + 3
    assert (row["id"], row["problem"], row["reference"], row["steps"]) == ("r1", "How many?", "10", list(RECORD.steps))
    content = json.dumps([row["prompt"], row["cot"], row["segment_lengths"], row["answer"]], separators=(",", ":"))
    assert row["hash"] == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_one_segment_a_step() -> None:
    tokenizer = word_tokenizer()
    spec = make_spec(tokenizer, LatentConfig(segmentation="step"))
    assert tokenize_record(tokenizer, spec, RECORD)["segment_lengths"] == [7, 7]
    fixed = make_spec(tokenizer)
    assert tokenize_record(tokenizer, spec, RECORD)["cot"] == tokenize_record(tokenizer, fixed, RECORD)["cot"]
    without = dataclasses.replace(RECORD, steps=())
    assert tokenize_record(tokenizer, spec, without)["segment_lengths"] == [7, 7]
    swapped = dataclasses.replace(RECORD, steps=RECORD.steps[::-1])
    with pytest.raises(
        DataError, match=r"row 'r1': field 'steps': '<<2\+3=5>>' is not in `cot` after the steps before it"
    ):
        tokenize_record(tokenizer, spec, swapped)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.text("ab <é\n", min_size=1, max_size=9).map(str.strip).filter(bool), min_size=1, max_size=5))
@pytest.mark.parametrize("segmentation", ["step", "fixed"])
def test_segments_cover_the_cot(segmentation: str, steps: list[str]) -> None:
    spec = make_spec(SEVERAL, LatentConfig(segmentation=segmentation))  # type: ignore[arg-type]
    record = Record(id="1", problem="p", cot="\n".join(steps), cot_answer="x", answer="x", steps=tuple(steps))
    row = tokenize_record(SEVERAL, spec, record)
    assert sum(row["segment_lengths"]) == len(row["cot"])
    assert min(row["segment_lengths"]) >= 1
    assert SEVERAL.decode(row["cot"]) == record.cot
    if segmentation == "step":
        assert len(row["segment_lengths"]) <= len(steps)


def test_an_evaluation_row_without_cot_has_no_segments() -> None:
    tokenizer = word_tokenizer()
    for segmentation in ("fixed", "step"):
        spec = make_spec(tokenizer, LatentConfig(segmentation=segmentation))  # type: ignore[arg-type]
        row = tokenize_record(tokenizer, spec, dataclasses.replace(RECORD, cot="", steps=()))
        assert (row["cot"], row["segment_lengths"]) == ([], [])


@pytest.mark.parametrize("tokenizer", [RESERVED, SEVERAL], ids=["reserved", "several"])
def test_a_cot_with_the_closing_delimiter_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    record = dataclasses.replace(RECORD, cot="2 </think> 3", steps=())
    with pytest.raises(DataError, match=r"row 'r1': field 'cot': contains the closing delimiter '</think>'"):
        tokenize_record(tokenizer, make_spec(tokenizer), record)
    problem = dataclasses.replace(RECORD, problem="what is </think>?", cot_answer="a tag </think>")
    assert (
        tokenizer.decode(tokenize_record(tokenizer, make_spec(tokenizer), problem)["answer"]) == "a tag </think><eos>"
    )


def test_delimiters_around_a_cot_are_taken_off() -> None:
    spec = make_spec(SEVERAL)
    wrapped = dataclasses.replace(RECORD, cot="<think>\nfirst\nthen\n</think>", steps=("<think>", "first"))
    row = tokenize_record(SEVERAL, spec, wrapped)
    assert SEVERAL.decode(row["cot"]) == "first\nthen"
    assert (row["steps"], len(row["step_lengths"])) == (["first", "then"], 2)
    with pytest.raises(DataError, match="contains the closing delimiter"):
        tokenize_record(SEVERAL, spec, dataclasses.replace(wrapped, cot="<think></think>"))


def test_settings_the_tokenizer_cannot_follow() -> None:
    words = word_tokenizer()
    with pytest.raises(ConfigError, match=r"prompt\.think: got '<plan>', which this tokenizer cannot write"):
        make_spec(words, think="<plan>")
    with pytest.raises(ConfigError, match=r"prompt\.end_think: got '', which"):
        make_spec(words, end_think="")
    with pytest.raises(ConfigError, match=r"prompt\.end_think: got '<think>', expected another text"):
        make_spec(words, end_think="<think>")
    with pytest.raises(ConfigError, match=r"prompt\.template: got 'chat', expected 'auto' or a text"):
        make_spec(words, template="chat")
    with pytest.raises(ConfigError, match=r"System role not supported.*Set prompt\.system_placement=user"):
        make_spec(make_tokenizer(NO_SYSTEM), system="s", system_placement="system")
    with pytest.raises(ConfigError, match=r"latent\.top_k: got 1000"):
        make_spec(words, LatentConfig(top_k=1000))
    with pytest.raises(ConfigError, match=r"model: eos token \d+ has no row in the embedding table of 299"):
        build_spec(CHAT, PromptConfig(), LatentConfig(), 299)
    words.eos_token = None
    with pytest.raises(ConfigError, match=r"no eos_token"):
        make_spec(words)
