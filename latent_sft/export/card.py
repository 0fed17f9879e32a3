"""The model card of an exported checkpoint: what it is, how to run it, and what was measured, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_sft import __version__
from latent_sft.config.experiment import Config
from latent_sft.export import card_thoughts
from latent_sft.method.types import LatentSpec, ThoughtSpec
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


def model_card(
    spec: LatentSpec, tokenizer: PreTrainedTokenizerBase, facts: CardFacts, thoughts: ThoughtSpec | None = None
) -> str:
    """Return the README of an exported folder: YAML front matter, then Markdown.

    Args:
        spec: settings.
        tokenizer: of the model.
        facts: what the checkpoint does not say.
        thoughts: of a model that thinks in hidden states; None is one that thinks in superpositions.
    """
    prompt = prompt_code(spec, _opened(spec, tokenizer))
    if thoughts is None:
        what, arguments, settings = _method(spec, facts), LATENT_ARGUMENTS, _latent_settings(spec)
        limits = _limitations(spec)
    else:
        what = card_thoughts.method(thoughts, facts.method, _origin(facts))
        arguments, settings = card_thoughts.ARGUMENTS, card_thoughts.settings(thoughts)
        limits = card_thoughts.limitations(spec, thoughts)
    sections = [
        _front_matter(facts, thoughts),
        f"# {facts.name}\n\n{what}",
        f"## How to run\n\n{_usage(prompt, arguments)}",
        f"## Training data\n\n{facts.training_data or 'Not recorded with this checkpoint.'}",
        f"## Settings of the latents\n\n{_settings(spec, settings, thoughts)}",
        f"## Results\n\n{_results(facts)}",
        f"## Limitations\n\n{limits}",
        f"## Citation\n\n{card_thoughts.citation(facts.method)}\n\nWritten by latent_sft {__version__}.",
    ]
    return "\n\n".join(sections) + "\n"


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


def _front_matter(facts: CardFacts, thoughts: ThoughtSpec | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"license: {facts.license}"]
    if facts.base_model:
        lines.append(f"base_model: {facts.base_model}")
    tags = ["latent-reasoning", *([facts.method] if facts.method else []), "custom_generate"]
    return "\n".join([*lines, "tags:", *(f"  - {tag}" for tag in tags), "---"])


def _origin(facts: CardFacts) -> str:
    if not facts.base_model:
        return ""
    return f" from [{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _method(spec: LatentSpec, facts: CardFacts) -> str:
    story = method_of(facts.method).story if facts.method else ""
    chunk = "one reasoning step" if spec.segmentation == "step" else f"{spec.rate} tokens of written reasoning"
    return (
        f"A reasoner {card_thoughts.trained_with(facts.method)}{_origin(facts)}.\n"
        f"Before it answers it thinks in latent tokens: each is a mix of {spec.top_k} vocabulary entries, stands for "
        f"{chunk} and is fed back as the next input embedding.\n{story}"
    )


LATENT_ARGUMENTS = (
    "`min_latents`, `max_latents`, `noise_scale`, `do_sample`, `temperature`, `top_p`, `max_new_tokens`\n"
)


def _usage(make_inputs: str, arguments: str) -> str:
    return f"""It needs `transformers{TRANSFORMERS}` and `torch`, nothing else. The decoding code is in
`custom_generate/generate.py`; read it before you trust it with `trust_remote_code=True`. Without that the model is not
loaded, since it would write plain tokens, which it was not trained for. `folder` is this repository's name or a local
copy of it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
problem = "..."
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

{make_inputs}
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))
```

With the latents:

```python
output = model.generate(**inputs, return_latents=True)
for ids, weights in zip(output.latent_ids[0], output.latent_weights[0]):
    print([(tokenizer.decode([i]), round(w, 3)) for i, w in zip(ids[:3].tolist(), weights[:3].tolist())])
```

Further arguments: {arguments}(of the answer). Batches work with padding on either side. What else `generate` takes
applies to the answer: settings of a `GenerationConfig`, logits processors, stopping criteria, `stop_strings`, a
`streamer`, `num_return_sequences`, `return_dict_in_generate`. `save_pretrained` keeps all of this."""


def _latent_settings(spec: LatentSpec) -> list[tuple[str, Any]]:
    return [
        ("CoT per latent", "one step" if spec.segmentation == "step" else f"{spec.rate} tokens"),
        ("vocabulary entries per latent", spec.top_k),
        ("table of the latents", {"input": "input embeddings", "head": "LM head"}[spec.projection]),
        ("temperature of the labels", spec.temperature),
        ("temperature while thinking", spec.decode_temperature),
        ("noise in training (scale, temperature)", f"{spec.noise_scale}, {spec.noise_temperature}"),
        ("latents (least, most)", f"{spec.min_latents}, {spec.max_latents}"),
    ]


def _settings(spec: LatentSpec, own: list[tuple[str, Any]], thoughts: ThoughtSpec | None) -> str:
    think, end_think = (", ".join(map(str, ids)) for ids in (spec.think_ids, spec.end_think_ids))
    shown = [
        *own,
        ("answer tokens (most)", spec.max_answer_tokens),
        ("token ids that open and close thinking", f"{think} and {end_think}"),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown)
    files = "`latent_spec.json`" if thoughts is None else "`thinker.json` and `latent_spec.json`"
    return f"| setting | value |\n|---|---|\n{rows}\n\nAll of them are in {files}."


def _results(facts: CardFacts) -> str:
    if not facts.results:
        return "No evaluation was recorded with this checkpoint."
    rows = []
    for split, result in facts.results.items():
        error = result.get("accuracy_se")
        accuracy = f"{100 * result['accuracy']:.1f} %" + (f" ± {100 * error:.1f}" if error is not None else "")
        steps, n = f"{result['reasoning_steps_mean']:.1f}", result["num_examples"]
        rows.append(f"| {split} | {accuracy} | {n} | {steps} | {result['grader']} | {result['decoding']} |")
    head = (
        "| split | accuracy ± s.e. | problems | latent steps (mean) | grader | decoding |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n\nThe validation split was used to choose the checkpoint."


def _limitations(spec: LatentSpec) -> str:
    return (
        "- The latents are not an explanation: their top tokens are a view of what is fed back, no written argument.\n"
        "- Trained on problems like those named above; nothing is claimed about others.\n"
        f"- Thinking ends after {spec.max_latents} latents and answers after {spec.max_answer_tokens} tokens.\n"
        "- Beam search, assisted generation and other servers than `transformers` are not supported by the enclosed "
        "code."
    )


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
    elif data.train.startswith("hub:"):
        kind = f"`{data.train.removeprefix('hub:')}` (dataset:split on the Hub), read as `{data.format}`"
    else:
        kind = f"File `{Path(data.train).name}`, read as `{data.format}`"
    count = manifest.get("train_rows")
    problems = f"; {count:,} training problems with their chains of thought" if count else ""
    return f"{kind}{problems}. Seed {config.seed}."
