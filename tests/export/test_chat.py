"""The exported chat template renders a message as the prompt of training, id by id."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from export.test_card import CHAT, with_chat
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latent_sft.data.prompts import render_prompt
from latent_sft.export.chat import chat_template
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.method.types import LatentSpec

USER = [{"role": "user", "content": "3 + 4"}]


def ids_of(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **how: object) -> list[int]:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **how)


@pytest.mark.parametrize("system", ["", "2 +\n'2' \\ \"½\" 🙂"])
@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("{problem}\n", None),
        ("1 {problem} 2", None),
        ("1 {problem}\n", CHAT),  # the base model has a template that training did not use
        ("chat", CHAT),
        ("chat", CHAT.replace("8 8 ", "8 8 <think>")),
        ("chat", CHAT.replace("8 8 ", "8 8 <think>\n")),
    ],
)
def test_a_message_becomes_the_prompt_of_training(
    tokenizer: PreTrainedTokenizerBase, spec: LatentSpec, template: str, chat: str | None, placement: str, system: str
) -> None:
    if chat is not None:
        tokenizer = with_chat(tokenizer, chat)
    spec = dataclasses.replace(spec, prompt_template=template, system_prompt=system, system_placement=placement)
    expected = render_prompt(tokenizer, spec, "3 + 4")
    made = chat_template(tokenizer, spec)
    assert made is not None
    assert ids_of(tokenizer, USER, chat_template=made) == expected
    exported = with_chat(tokenizer, made)
    assert render_prompt(exported, spec, "3 + 4") == expected  # the package itself reads an export
    assert chat_template(exported, spec) == made


def test_the_exported_tokenizer_has_it(checkpoint: Path, tmp_path: Path, spec: LatentSpec) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert ids_of(tokenizer, USER) == render_prompt(AutoTokenizer.from_pretrained(checkpoint), spec, "3 + 4")
    with pytest.raises(TemplateError, match="trained on single problems: give one message with the role user"):
        ids_of(tokenizer, [{"role": "system", "content": "1"}, *USER])


def test_a_delimiter_that_would_melt_into_the_prompt_is_left_to_generate(
    tokenizer: PreTrainedTokenizerBase, spec: LatentSpec
) -> None:
    spec = dataclasses.replace(spec, think_ids=(7, 5))  # "1 +": its decoded text is tokenised otherwise after a digit
    spec = dataclasses.replace(spec, prompt_template="{problem}", system_prompt="")
    made = chat_template(tokenizer, spec)
    full = render_prompt(tokenizer, spec, "3 + 4")
    assert made is not None and ids_of(tokenizer, USER, chat_template=made) in (full, full[:-2])


def test_whole_conversations_are_rendered_by_the_base_template(
    tokenizer: PreTrainedTokenizerBase, spec: LatentSpec
) -> None:
    spec = dataclasses.replace(spec, prompt_template="chat", system_prompt="2", system_placement="system")
    made = chat_template(with_chat(tokenizer, CHAT), spec)
    turns = [{"role": "system", "content": "1"}, *USER, {"role": "assistant", "content": "7"}]
    texts = [tokenizer.apply_chat_template(turns, chat_template=t, tokenize=False) for t in (made, CHAT)]
    assert texts[0] == texts[1]
