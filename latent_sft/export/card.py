"""The model card of an exported checkpoint: what it is, how to run it, and what was measured, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from latent_sft import __version__
from latent_sft.config.experiment import Config
from latent_sft.method.types import How, LatentSpec, Mixtures, SpanCode, ThoughtSpec
from latent_sft.methods import method_of
from latent_sft.runs import MANIFEST, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSFORMERS = ">=5.0,<6"  # the versions that exports were run with


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What the checkpoint itself does not say.

    Attributes:
        name: title.
        license: Hub identifier of the licence of the weights.
        base_model: Hub name of the model it was trained from; None for a model trained from scratch.
        training_data: sentences on the data; empty where it is not known.
        results: split -> summary of an evaluation (see `evaluation.score`), and how it decoded as `decoding`.
        method: of `methods.MODELS`; empty where it is not known.
    """

    name: str
    license: str = "other"
    base_model: str | None = None
    training_data: str = ""
    results: Mapping[str, Mapping[str, Any]] | None = None
    method: str = ""


def facts_of_run(config: Config, manifest: Mapping[str, Any], evaluations: Path, method: str) -> CardFacts:
    """Collect the facts of an experiment.

    Args:
        config: the experiment.
        manifest: of the finished stage.
        evaluations: folder of `<split>.json` files; it may be missing. Those of an earlier training are left out.
        method: of CardFacts.

    Raises:
        ArtefactError: a damaged evaluation.
    """
    name = config.model.name_or_path
    local = Path(name).exists()
    return CardFacts(
        name=config.name,
        license=config.export.license,
        base_model=name if name and not local else None,
        training_data=_training_data(config, manifest),
        results=_measured(evaluations, manifest),
        method=method,
    )


def model_card(spec: LatentSpec, tokenizer: PreTrainedTokenizerBase, facts: CardFacts, how: How | None = None) -> str:
    """Return the README of an exported folder: YAML front matter, then Markdown.

    Args:
        spec: settings.
        tokenizer: of the model.
        facts: what the checkpoint does not say.
        how: a model thinks in hidden states, code words of spans or its whole softmax; None is one that thinks in
            latent tokens.
    """
    method = method_of(facts.method) if facts.method else None
    environment = Environment(
        loader=PackageLoader("latent_sft.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    body = environment.get_template("card.md.jinja").render(
        spec=spec,
        thoughts=how if isinstance(how, ThoughtSpec) else None,
        code=how if isinstance(how, SpanCode) else None,
        mixtures=how if isinstance(how, Mixtures) else None,
        facts=facts,
        method=method,
        make_inputs=prompt_code(spec, _opened(spec, tokenizer)),
        transformers=TRANSFORMERS,
        version=__version__,
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=facts.license,
        base_model=facts.base_model,
        tags=["latent-reasoning", *([facts.method] if facts.method else []), "custom_generate"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def prompt_code(spec: LatentSpec, opened: str = "") -> str:
    """Return Python that makes `inputs` from `tokenizer` and `problem`: the same ids as `data.prompts.render_prompt`.

    Args:
        spec: holds the template and the instruction.
        opened: opening delimiter that the chat template writes by itself; it is removed, since `generate` adds it.
    """
    before = f"{spec.system_prompt}\n" if spec.system_prompt else ""
    if spec.prompt_template != "chat":
        left, _, right = spec.prompt_template.partition("{problem}")
        parts = [repr(left + before)] * bool(left + before) + ["problem"] + [repr(right)] * bool(right)
        return f'prompt = {" + ".join(parts)}\ninputs = tokenizer(prompt, return_tensors="pt")'
    turns = []
    if spec.system_prompt and spec.system_placement == "system":
        turns, before = [f'{{"role": "system", "content": {spec.system_prompt!r}}}'], ""
    content = f"{before!r} + problem" if before else "problem"
    turns.append(f'{{"role": "user", "content": {content}}}')
    lines = [f"messages = [{', '.join(turns)}]"]
    lines.append("prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)")
    if opened:
        lines.append(f"prompt = prompt.rstrip().removesuffix({opened!r})")
    return "\n".join([*lines, 'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")'])


def _opened(spec: LatentSpec, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the opening delimiter if the chat template ends a prompt with it, else nothing."""
    if spec.prompt_template != "chat":
        return ""
    turns = [{"role": "user", "content": "problem"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    delimiter = tokenizer.decode(spec.think_ids).strip()
    return delimiter if delimiter and text.rstrip().endswith(delimiter) else ""


def _measured(folder: Path, trained: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    results = {}
    for path in sorted(folder.glob("*.json"), reverse=True):  # validation before test
        inputs = read_json(folder / path.stem / MANIFEST)["inputs"]
        if inputs["model"] != trained["fingerprint"]:
            continue
        used, decoding = inputs["eval"], "greedy"
        if used["sample"]:
            noisy = ", noisy latents" if used.get("latent_noise") else ""
            decoding = f"sampled, temperature {used['temperature']}, top-p {used['top_p']}{noisy}"
        results[path.stem] = {**read_json(path)["summary"], "decoding": decoding}
    return results


def _training_data(config: Config, manifest: Mapping[str, Any]) -> str:
    data, synthetic = config.data, config.data.synthetic
    if data.train == "synthetic":
        kind = f"Generated by latent_sft: task `{synthetic.task}`, generator seed {synthetic.seed}"
    elif isinstance(data.train, tuple):
        parts = (f"`{Path(s.path).name}` (weight {s.weight:g}, as `{s.format or data.format}`)" for s in data.train)
        kind = f"Files {', '.join(parts)}"
    elif data.train.startswith("hub:"):
        kind = f"`{data.train.removeprefix('hub:')}` (dataset:split on the Hub), read as `{data.format}`"
    else:
        kind = f"File `{Path(data.train).name}`, read as `{data.format}`"
    count = manifest.get("train_rows")
    problems = f"; {count:,} training problems with their chains of thought" if count else ""
    return f"{kind}{problems}. Seed {config.seed}."
