"""The settings that all methods share: frozen dataclasses with defaults, meanings and ranges. Imports nothing heavy.

One YAML holds one experiment; the sections of the methods stand in their modules (`latent_sft.methods`). Constants
shared by stages (rate, top_k, ...) stand once, in `latent`. Ranges that need a tokenizer (ids, vocabulary) are checked
later, by `LatentSpec`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from datetime import date
from typing import Any, Literal

from latent_sft.config.training import TrainDefaults, need

FORMATS = ("auto", "records", "messages", "prompt", "openr1", "numina", "s1k", "gsm8k", "lines", "steps")
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
INTERVENTIONS = ("zero", "mean", "shuffle", "truncate")


@dataclass(frozen=True, kw_only=True)
class FieldsConfig:
    """Names of the fields in a row of the `records` format."""

    id: str = "id"
    """Optional in the file: rows without it are numbered."""
    problem: str = "problem"
    cot: str = "cot"
    cot_answer: str = "cot_answer"
    """Text the model writes after `</think>`; where a row lacks it, `answer` is written."""
    answer: str = "answer"
    """Reference answer for grading; where a row lacks it, the answer in `cot_answer` (its last \\boxed{}, else all)."""
    steps: str = "steps"
    """Optional list of CoT steps; the CoT is split at line breaks where a row lacks it."""
    mixtures: str = "mixtures"
    """Optional, of training rows: for each latent step an object {token: mass}, masses that sum to 1 over texts of one
    token each."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Seeded generators; used for a split whose source is `synthetic`."""

    task: Literal["modular", "arithmetic", "prosqa", "multiplication", "mnns"] = "modular"
    """modular: word problems modulo `modulus`; arithmetic: GSM8K-Aug format; prosqa: graph reachability;
    multiplication: of two numbers of `num_digits` digits, without the pairs of numbers of a split that is read from a
    file; mnns: minimum non-negative sum, all 6,561 problems whatever `num_train`, `num_validation` and `num_test`
    say."""
    num_train: int = 50_000
    num_validation: int = 500
    num_test: int = 1_000
    seed: int = 0
    modulus: int = 11
    min_steps: int = 3
    max_steps: int = 5
    min_nodes: int = 28
    """prosqa: training graphs have this many nodes to `max_nodes`, drawn uniformly; those below `max_nodes` may have
    paths of one step."""
    max_nodes: int = 28
    """prosqa: nodes of the largest training graphs and of all validation and test graphs, before those without edges
    are dropped. 28 resembles the public problems (23 remain); fewer make shorter prompts and less to choose from."""
    num_digits: int = 4
    """multiplication: digits of both numbers."""
    path_budget: int = 0
    """mnns: choices of signs whose running sums are in the `mixtures` of a row, the best ones; 0 all of them."""
    path_order: Literal["beam", "beam_minabs"] = "beam_minabs"
    """mnns: which are best. beam: those with the smallest final sum that is not negative; beam_minabs: with the final
    sum nearest to 0."""

    def __post_init__(self) -> None:
        for key in ("num_train", "num_validation", "num_test"):
            need(getattr(self, key) >= 1, f"data.synthetic.{key}", getattr(self, key), "an integer >= 1")
        need(self.num_digits >= 1, "data.synthetic.num_digits", self.num_digits, "an integer >= 1")
        need(self.path_budget >= 0, "data.synthetic.path_budget", self.path_budget, "0 (all) or a number of choices")
        need(5 <= self.max_nodes <= 28, "data.synthetic.max_nodes", self.max_nodes, "5 to 28")
        smallest = f"5 to max_nodes={self.max_nodes}"
        need(5 <= self.min_nodes <= self.max_nodes, "data.synthetic.min_nodes", self.min_nodes, smallest)
        need(self.modulus >= 2, "data.synthetic.modulus", self.modulus, "an integer >= 2")
        need(
            1 <= self.min_steps <= self.max_steps,
            "data.synthetic.min_steps",
            self.min_steps,
            f"1 to max_steps={self.max_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class ShortenConfig:
    """Shorter chains of thought in all splits, for baselines that compress text; problems and answers stay. For runs
    that train nothing but `no-cot` and `cot`."""

    rule: Literal["none", "drop_left", "every_r", "results"] = "none"
    """drop_left: without the first `steps` steps; every_r: only every `steps`-th step, and the last; results: of each
    step only what stands behind `=`, without << and >>."""
    steps: int = 2
    """Read by drop_left and every_r."""

    def __post_init__(self) -> None:
        least = 2 if self.rule == "every_r" else 1
        need(self.steps >= least, "data.shorten.steps", self.steps, f"an integer >= {least}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of training rows, an entry of the list `data.train`."""

    path: str
    weight: float = 1.0
    """How often an epoch shows each of its rows; of 0.5 one epoch shows half of the rows, the next one the others."""
    format: str = ""
    """Empty: as `data.format`."""
    fields: dict[str, str] = field(default_factory=dict)
    """Those names of `data.fields` that differ in it."""

    def __post_init__(self) -> None:
        need(self.path not in ("", "synthetic"), "data.train", self.path, "a path or hub:NAME:SPLIT in every entry")
        need(self.weight > 0, f"data.train: weight of {self.path}", self.weight, "a number > 0")
        need(self.format in ("", *FORMATS), f"data.train: format of {self.path}", self.format, ", ".join(FORMATS))
        names = [f.name for f in fields(FieldsConfig)]
        need(self.fields.keys() <= {*names}, f"data.train: fields of {self.path}", self.fields, f"any of {names}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where problems come from. A source is a path (JSONL, JSONL.gz, JSON, Parquet, TXT), `synthetic`, or a
    `datasets` name written `hub:NAME[:CONFIG]:SPLIT`."""

    train: Any = "synthetic"
    """A source, or a list of them: `[a.jsonl, b.jsonl]`, or with weights and formats of their own
    `[{path: a.jsonl, weight: 2}, {path: b.jsonl, format: gsm8k}]` (docs/data.md)."""
    validation: str = ""
    """Empty: `validation_size` rows are split off train, seeded by `split_seed`; never taken from test."""
    test: str = "synthetic"
    """Empty: no test set."""
    format: Literal["auto", "records", "messages", "prompt", "openr1", "numina", "s1k", "gsm8k", "lines", "steps"] = (
        "records"
    )
    """auto: by the fields of the first row. records: one JSON object a row, see `fields`; messages: chat rows; prompt:
    prompt/completion; openr1, numina, s1k: rows of these public sets; gsm8k: raw question/answer with ####; lines:
    problem||steps #### answer lines; steps: JSON list with question/steps/answer (docs/data.md has a row of each)."""
    validation_format: str = ""
    """Format of the validation source where it differs (empty: as `format`)."""
    test_format: str = ""
    """Format of the test source where it differs (empty: as `format`)."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    validation_fields: dict[str, str] = field(default_factory=dict)
    """Those names of `fields` that differ in the validation source: `{cot: solution}`."""
    test_fields: dict[str, str] = field(default_factory=dict)
    """Those names of `fields` that differ in the test source."""
    cot_style: Literal["text", "equations"] = "text"
    """gsm8k format: `equations` keeps only the <<...>> steps (GSM8K-Aug style), `text` drops the annotations."""
    think_tags: tuple[str, str] = ("<think>", "</think>")
    """What stands around the thought in the texts of messages, prompt, openr1."""
    answer_style: Literal["text", "boxed"] = "text"
    """What the model writes behind its thought: `text` all that the row has there, `boxed` the content of its last
    \\boxed{}, or where it has none the row's `answer`."""
    on_error: Literal["raise", "skip"] = "raise"
    """skip counts and lists the bad rows in `data/<split>/skipped.jsonl` of the run directory; evaluation shows the
    count beside the accuracy."""
    validation_size: int = 500
    split_seed: int = 0
    limit_train: int = 0
    """Use only the first rows (of each source); 0 uses all. The rest of the file is not read, unless validation is
    split off it."""
    limit_validation: int = 0
    limit_test: int = 0
    step_separator: str = "\n"
    """Where a chain of thought is cut into steps, in rows that do not list them (fields.steps); it stays with the step
    before it. At line breaks, a text of nothing but <<...>> equations is cut into these."""
    max_prompt_tokens: int = 1024
    max_cot_tokens: int = 4096
    """Longer rows are errors (or skipped with on_error=skip), never cut silently. A row of validation or test is not
    left out for its reference CoT: it is evaluated without it."""
    shorten: ShortenConfig = field(default_factory=ShortenConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        names = [f.name for f in fields(FieldsConfig)]
        for split in ("validation", "test"):
            form, other = f"{split}_format", f"{split}_fields"
            need(
                getattr(self, form) in ("", *FORMATS),
                f"data.{form}",
                getattr(self, form),
                f"empty, {', '.join(FORMATS)}",
            )
            need(getattr(self, other).keys() <= {*names}, f"data.{other}", getattr(self, other), f"any of {names}")
        need(self.validation_size >= 1, "data.validation_size", self.validation_size, "an integer >= 1")
        need(all(self.think_tags), "data.think_tags", self.think_tags, "two texts, such as [<think>, </think>]")
        if isinstance(self.train, list | tuple):
            object.__setattr__(self, "train", tuple(map(_source, self.train)))
        one = "a path, `synthetic`, hub:NAME:SPLIT, or a list of sources"
        need(isinstance(self.train, str | tuple) and bool(self.train), "data.train", self.train, one)
        need(bool(self.step_separator), "data.step_separator", self.step_separator, "a text such as a line break or ;")
        for key in ("limit_train", "limit_validation", "limit_test"):
            need(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "an integer >= 0 (0: all rows)")


def _source(given: Any) -> SourceConfig:
    if isinstance(given, SourceConfig | str):
        return SourceConfig(path=given) if isinstance(given, str) else given
    known = [f.name for f in fields(SourceConfig)]
    fits = isinstance(given, dict) and "path" in given and given.keys() <= {*known}
    need(fits, "data.train", given, f"a path, or an object with path and any of {', '.join(known[1:])}")
    try:
        weight = float(given.get("weight", 1.0))
    except (TypeError, ValueError):
        weight = 0.0
    return SourceConfig(**{**given, "weight": weight, "fields": dict(given.get("fields") or {})})


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a problem becomes a prompt; the delimiter `<think>` is always the end of the prompt."""

    template: str = "auto"
    """auto: the tokenizer's chat template if it has one, else plain; chat; or a text with one {problem}."""
    system: str = ""
    system_placement: Literal["system", "user"] = "user"
    """Turn that holds the instruction (published code: user for Llama, system for Qwen)."""
    think: str = "<think>"
    end_think: str = "</think>"
    """May be several ordinary tokens or one reserved token of the tokenizer."""
    date: str = "2024-07-26"
    """What a chat template that asks for today's date (Llama 3) is told, so that no prompt depends on the day; that
    template's own default. Exported models keep it."""

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.date)
        except ValueError:
            need(False, "prompt.date", self.date, "a day, as 2024-07-26")


@dataclass(frozen=True, kw_only=True)
class TinyModelConfig:
    """A small model built from scratch with its own word-level tokenizer, for CPU runs."""

    model_type: str = "llama"
    """Any causal decoder type of transformers; a size that it does not have is refused. Without dropout."""
    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 192
    tie_embeddings: bool = True
    max_positions: int = 1024
    tokenizer: Literal["word", "digits", "space", "bpe"] = "word"
    """word: one token per word, number or symbol of the training text; digits: as word, numbers digit by digit;
    space: whatever stands between spaces; bpe: byte-level BPE trained on the training text, never an unknown token."""
    vocab_size: int = 4096
    """Upper bound of the vocabulary built from the training text."""

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_positions"):
            need(getattr(self, key) >= 1, f"model.tiny.{key}", getattr(self, key), "an integer >= 1")
        need(self.hidden_size % self.num_heads == 0, "model.tiny.num_heads", self.num_heads, "a divisor of hidden_size")
        need(
            self.num_heads % self.num_kv_heads == 0,
            "model.tiny.num_kv_heads",
            self.num_kv_heads,
            "a divisor of num_heads",
        )
        need(self.vocab_size >= 16, "model.tiny.vocab_size", self.vocab_size, "an integer >= 16")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters; rank 0 is full fine-tuning."""

    rank: int = 0
    alpha: float = 0.0
    """Adapters count `alpha / rank` times; 0 is twice the rank."""
    dropout: float = 0.0
    target_modules: str = "all-linear"
    """`all-linear` or comma-separated module names."""

    def __post_init__(self) -> None:
        need(self.rank >= 0, "model.lora.rank", self.rank, "0 (full fine-tuning) or a rank")
        need(self.alpha >= 0, "model.lora.alpha", self.alpha, "0 (twice the rank) or a number > 0")
        object.__setattr__(self, "alpha", self.alpha or 2.0 * self.rank)  # so that both ways to say it are the same run
        need(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 <= dropout < 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a Hugging Face causal decoder, or a tiny one built here."""

    name_or_path: str = ""
    """Empty: build `tiny` from scratch."""
    revision: str = "main"
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of frozen weights and of matrix products. What is trained is float32: adapters, and with `lora.rank=0` the whole
    model, under mixed precision of this type (with ZeRO the weights are bfloat16, with float32 copies in its
    optimizer)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    tiny: TinyModelConfig = field(default_factory=TinyModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Becomes the LatentSpec; see `latent_sft.method.types.LatentSpec` for every meaning."""

    rate: int = 2
    segmentation: Literal["fixed", "step"] = "fixed"
    top_k: int = 10
    """Entries of the vocabulary that a latent mixes; 0 all of them, as the paper defines it. A stored label then takes
    6 bytes times the vocabulary a latent (`labels.dtype=float16`)."""
    projection: Literal["input", "head"] = "input"
    exclude_end: bool = True
    temperature: float = 1.0
    marker_positions: Literal["stretched", "transparent"] = "transparent"
    marker_input: Literal["learned", "previous"] = "learned"
    noise_scale: float = 0.0
    noise_temperature: float = 1.0
    noise_clip: tuple[float, float] = (-1.5, 3.0)
    decode_temperature: float = 1.0
    min_latents: int = 0
    max_latents: int = 128
    max_answer_tokens: int = 64

    def __post_init__(self) -> None:
        need(self.rate >= 1, "latent.rate", self.rate, "an integer >= 1 (CoT tokens per latent)")
        need(self.top_k >= 0, "latent.top_k", self.top_k, "0 (the whole vocabulary) or an integer >= 1")
        need(self.temperature > 0, "latent.temperature", self.temperature, "a number > 0")
        need(self.noise_scale >= 0, "latent.noise_scale", self.noise_scale, "a number >= 0")
        need(self.noise_temperature > 0, "latent.noise_temperature", self.noise_temperature, "a number > 0")
        low, high = self.noise_clip
        need(low < high, "latent.noise_clip", self.noise_clip, "[low, high] with low < high")
        need(self.decode_temperature > 0, "latent.decode_temperature", self.decode_temperature, "a number > 0")
        need(self.max_latents >= 1, "latent.max_latents", self.max_latents, "an integer >= 1")
        need(
            0 <= self.min_latents <= self.max_latents,
            "latent.min_latents",
            self.min_latents,
            f"0 to max_latents={self.max_latents}",
        )
        need(self.max_answer_tokens >= 1, "latent.max_answer_tokens", self.max_answer_tokens, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured after training, with greedy decoding unless `sample`."""

    batch_size: int = 64
    limit: int = 0
    """Problems per split; 0 evaluates all."""
    splits: tuple[str, ...] = ("validation", "test")
    sets: tuple[str, ...] = ()
    """Benchmarks beside the splits, as `[gsm8k, math500]` (docs/benchmarks.md lists them); each has a grader and a
    number of samples of its own. `NAME=SOURCE` reads one from elsewhere."""
    grader: Literal["auto", "numeric", "math", "text"] = "auto"
    """numeric: equal numbers; math: math-verify; text: equal after normalising space, case and LaTeX text; auto: the
    first that can read the reference. Numbers that only space separates, `7 8 0 3`, are a text to all of them."""
    max_cot_tokens: int = 512
    """Explicit thinking is ended after this many tokens."""
    sample: bool = False
    """Answers (and a written CoT) are sampled, with `temperature` and `top_p`."""
    temperature: float = 0.6
    top_p: float = 0.95
    latent_noise: bool = False
    """With `sample`: latents get the Gumbel noise of latent.noise_scale too (published evaluation: no)."""
    num_samples: int = 1
    """Samples per problem, for pass@k."""
    seed: int = 0
    heatmap_problems: int = 4
    """Problems whose latents are drawn in the report, of evaluations done from now on."""
    interventions: tuple[str, ...] = ("zero", "mean", "shuffle", "truncate")
    """Is the reasoning used? The answer is decoded again after all latents (or written tokens) of a problem are set to
    zero, to their mean over problems, exchanged for another problem's, or cut to their first half. Empty: not done."""
    latent_sweep: tuple[int, ...] = ()
    """Numbers of latents, fewer and more than the model would take; problems are solved again with exactly so many."""
    latency_problems: int = 16
    """Problems solved again one at a time, greedily, for the time of one alone; 0 does not measure it."""

    def __post_init__(self) -> None:
        need(self.batch_size >= 1, "eval.batch_size", self.batch_size, "an integer >= 1")
        need(self.max_cot_tokens >= 1, "eval.max_cot_tokens", self.max_cot_tokens, "an integer >= 1")
        need(self.num_samples >= 1, "eval.num_samples", self.num_samples, "an integer >= 1")
        need(self.num_samples == 1 or self.sample, "eval.num_samples", self.num_samples, "1, or eval.sample=true")
        need(self.sample or not self.latent_noise, "eval.latent_noise", True, "false, or eval.sample=true")
        need(0 < self.top_p <= 1, "eval.top_p", self.top_p, "0 < top_p <= 1")
        bad = [s for s in self.splits if s not in ("validation", "test")]
        need(not bad, "eval.splits", bad, "validation and/or test")
        unknown = sorted(set(self.interventions) - set(INTERVENTIONS))
        need(not unknown, "eval.interventions", unknown, ", ".join(INTERVENTIONS))
        counts = self.latent_sweep
        need(all(count >= 1 for count in counts), "eval.latent_sweep", list(counts), "numbers of latents, each >= 1")
        need(self.latency_problems >= 0, "eval.latency_problems", self.latency_problems, "0 or a number of problems")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison of methods: `latent-sft run` then runs every variant with every seed and puts them side by side."""

    variants: dict[str, list[str]] = field(default_factory=dict)
    """Name -> settings `key=value` on top of this file. Each variant and seed is a run of its own, under
    <run>/<variant>/seed-<n>; steps that several of them have are made once."""
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 1
    """Runs at once."""
    bootstrap: int = 10_000
    """Resamples of the problems, for the intervals of differences."""
    lines: dict[str, float] = field(default_factory=dict)
    """Name -> accuracy from 0 to 1 that tables and plots show for reference, as `majority: 0.373`: what guessing gives,
    or a published number."""

    def __post_init__(self) -> None:
        need(len(self.seeds) >= 1, "compare.seeds", self.seeds, "at least one seed")
        need(len(set(self.seeds)) == len(self.seeds), "compare.seeds", self.seeds, "different seeds")
        need(self.jobs >= 1, "compare.jobs", self.jobs, "an integer >= 1")
        need(self.bootstrap >= 100, "compare.bootstrap", self.bootstrap, "an integer >= 100")
        wrong = {name: value for name, value in self.lines.items() if not 0 <= value <= 1}
        need(not wrong, "compare.lines", wrong, "accuracies from 0 to 1")
        bad = [name for name in self.variants if not name or "/" in name or name.startswith(".")]
        need(not bad, "compare.variants", bad, "names without '/'")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the model card of an exported checkpoint says."""

    license: str = "other"
    """Of the weights, as a licence identifier of the Hub (`apache-2.0`, `llama3.2`); the base model's terms apply."""


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Checkpoints on the Hugging Face Hub while stages train, to go on from them elsewhere (docs/distributed.md)."""

    repo: str = ""
    """Repository of this experiment alone, `user/name`; made where it is not there. Empty: nothing is pushed."""
    every: int = 0
    """Optimizer steps between pushes, at the checkpoint that comes next; 0 pushes every checkpoint."""
    private: bool = True
    """Of a repository that is made; one that is there keeps its visibility."""

    def __post_init__(self) -> None:
        good = not self.repo or re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo)
        need(bool(good), "hub.repo", self.repo, "user/name or organisation/name")
        need(self.every >= 0, "hub.every", self.every, "0 (every checkpoint) or a number of steps")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes train a stage; 1 runs in this process."""

    nproc: int = 1
    cpu_threads: int = 0
    """Threads of torch on the CPU; 0 leaves torch's choice. Models of a few million parameters are fastest with 1."""
    concurrent_baseline: bool = False
    """`latent-sft run` trains the first stage that only evaluations need (no-cot) in a process beside the others."""
    zero: int = 0
    """What the processes share out by DeepSpeed ZeRO instead of each holding all: 1 optimizer states, 2 gradients too,
    3 weights too; 0 nothing (plain data parallelism)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """With `zero`, kept in host memory: optimizer states, or with zero=3 the weights too."""
    deepspeed: str = ""
    """JSON file of further DeepSpeed settings (communication, bucket sizes); those decided here are refused there."""
    timeout_minutes: float = 30.0
    """A process that has waited this long for another one ends the job with a message."""

    def __post_init__(self) -> None:
        need(self.nproc >= 1, "launch.nproc", self.nproc, "an integer >= 1")
        need(self.cpu_threads >= 0, "launch.cpu_threads", self.cpu_threads, "0 or a number of threads")
        need(0 <= self.zero <= 3, "launch.zero", self.zero, "0 (no ZeRO), 1, 2 or 3")
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        need(self.zero >= least, "launch.offload", self.offload, f"none, or launch.zero={least} or more")
        need(not self.deepspeed or self.zero > 0, "launch.deepspeed", self.deepspeed, "empty, or launch.zero=1 or more")
        need(self.timeout_minutes > 0, "launch.timeout_minutes", self.timeout_minutes, "a number > 0")

    @property
    def alone(self) -> bool:
        """Whether a stage trains in one process without a launcher."""
        return self.nproc == 1 and self.zero == 0


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """One experiment."""

    name: str = "experiment"
    compat: Literal["none", "published"] = "none"
    """published: the defaults become what the published code computes (`published` of the methods); what the file or
    the command line says still wins."""
    run_dir: str = ""
    """Empty: runs/<name>."""
    seed: int = 0
    report_to: tuple[str, ...] = ()
    """Trackers that get the scalars of docs/metrics.md and these settings, one run a stage: aim, clearml, comet_ml,
    dvclive, mlflow, swanlab, trackio, wandb. TensorBoard files are written in any case."""
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    train: TrainDefaults = field(default_factory=TrainDefaults)
    compare: CompareConfig = field(default_factory=CompareConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        need(bool(self.name) and "/" not in self.name, "name", self.name, "a name without '/'")
        self.train.check("train")
        unknown = sorted(set(self.report_to) - set(TRACKERS))
        need(not unknown, "report_to", unknown, f"some of {', '.join(TRACKERS)}")
        alone = not (self.hub.repo and self.compare.variants)
        need(alone, "hub.repo", self.hub.repo, "empty in a comparison, whose runs would share the repository")
        halves = self.launch.zero and self.model.dtype == "float16"
        need(not halves, "model.dtype", "float16", "bfloat16 or float32, where launch.zero > 0")
        silent = self.eval.latent_noise and not self.latent.noise_scale
        need(not silent, "eval.latent_noise", True, "false, or latent.noise_scale > 0")

    @property
    def directory(self) -> str:
        """Run directory: `run_dir`, or `runs/<name>`."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def trained_model(self) -> ModelConfig:
        """`model` as a stage loads what it trains: all weights in float32, unless ZeRO or adapters see to that."""
        copied = self.model.lora.rank or self.launch.zero
        return self.model if copied else replace(self.model, dtype="float32")
