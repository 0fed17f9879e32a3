"""The chat template of an export: one message of a user becomes the prompt of training, whatever that looked like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latent_sft.data.prompts import CHAT, render_prompt
from latent_sft.method.types import LatentSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("problem", "1 + 2 = ?", "What is 17")  # what a prompt ends with may melt with a delimiter that is no token
ONE_MESSAGE = "This model was trained on single problems: give one message with the role user."


def chat_template(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> str | None:
    """Return a template that renders a message of a user as `render_prompt` does, instruction included.

    It ends with the opening delimiter where the tokenizer then gives the same ids; `generate` adds it otherwise. A chat
    template of the base model goes on to render whole conversations, its answer opened by the delimiter.

    Args:
        tokenizer: of the model.
        spec: settings of the prompt.

    Returns:
        The template; None where none gives the ids of training.
    """
    opened = tokenizer.decode(spec.think_ids).strip()
    think = f"{{%- if add_generation_prompt %}}{{{{- {_literal(opened)} }}}}{{%- endif %}}"
    if spec.prompt_template == CHAT:
        base = f"{_with_system(spec)}{tokenizer.chat_template}"
        text = f"rendered.rstrip().removesuffix({_literal(opened)}) if add_generation_prompt else rendered"
        closed = f"{{%- set rendered %}}{base}{{%- endset %}}{{{{- {text} }}}}"
        candidates = [str(tokenizer.chat_template), base + think, closed + think, base]
    else:
        plain = _plain(tokenizer, spec)
        candidates = [plain + think, plain]
    end = len(spec.think_ids)
    exact = [[render_prompt(tokenizer, spec, probe) for probe in PROBES]]
    exact.append([ids[:-end] for ids in exact[0]])
    rendered = [[_ids(tokenizer, candidate, probe) for probe in PROBES] for candidate in candidates]
    return next((c for want in exact for c, ids in zip(candidates, rendered, strict=True) if ids == want), None)


def _ids(tokenizer: PreTrainedTokenizerBase, template: str, problem: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> str:
    left, _, right = spec.prompt_template.partition("{problem}")
    left += f"{spec.system_prompt}\n" if spec.system_prompt else ""
    bos = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    return (
        "{%- if messages | length != 1 or messages[0].role != 'user' %}"
        f"{{{{- raise_exception({_literal(ONE_MESSAGE)}) }}}}{{%- endif %}}"
        f"{{{{- {_literal((bos or '') + left)} + messages[0].content + {_literal(right)} }}}}"
    )


def _with_system(spec: LatentSpec) -> str:
    """Return what puts the instruction of training in front, where a conversation does not begin with it."""
    if not spec.system_prompt:
        return ""
    if spec.system_placement == "system":
        turn = f'{{"role": "system", "content": {_literal(spec.system_prompt)}}}'
        return f"{{%- if messages[0].role != 'system' %}}{{%- set messages = [{turn}] + messages %}}{{%- endif %}}"
    text = _literal(f"{spec.system_prompt}\n")
    turn = f'{{"role": "user", "content": {text} + messages[0].content}}'
    return (
        f"{{%- if messages[0].role == 'user' and not messages[0].content.startswith({text}) %}}"
        f"{{%- set messages = [{turn}] + messages[1:] %}}{{%- endif %}}"
    )


def _literal(text: str) -> str:
    """Return a Jinja string."""
    escaped = text.encode("unicode_escape").decode().replace('"', '\\"')
    return f'"{escaped}"'
