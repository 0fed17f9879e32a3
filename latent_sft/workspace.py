"""What every step of an experiment starts from: tokenizer, base model, LatentSpec, tokenised splits, steps.

Opened once a command; a second opening reads what the first one wrote (`<run>/base`, `<run>/data`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from latent_sft.config.load import to_yaml
from latent_sft.config.schema import SECTIONS, Config
from latent_sft.data.dataset import tokenized_splits, tokenizer_fingerprint
from latent_sft.data.prompts import build_spec, fix_date
from latent_sft.data.records import Splits, load_splits
from latent_sft.errors import ConfigError
from latent_sft.method.types import SPEC_FILE, LatentSpec, ThoughtSpec
from latent_sft.models.load import (
    build_tiny,
    check_start,
    load_tokenizer,
    max_positions,
    save_lm,
    vocabulary_size,
    weights_fingerprint,
)
from latent_sft.models.tiny_tokenizer import build_tokenizer
from latent_sft.runs import GivenStep, Step, fingerprint, write_atomically, write_json

log = logging.getLogger(__name__)

STAGE1_PHASES = ("stage1-encoder", "stage1-decoder", "stage1-union")
# what decides the encoder's latents; noise and limits of decoding do not
_ENCODER_SETTINGS = (
    "rate",
    "segmentation",
    "top_k",
    "projection",
    "exclude_end",
    "temperature",
    "marker_positions",
    "marker_input",
)
# settings that say how a stage is watched or run, not what it computes
_WATCHING = ("enabled", "log_every", "num_workers", "save_every", "save_total_limit", "keep_checkpoint")


def processes(timeout_minutes: float = 30.0) -> PartialState:
    """Return accelerate's view of the processes of this job (one, or those torchrun started).

    The first call connects them; how long one waits for another before the job ends is decided there.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=timeout_minutes))


class Workspace:
    """An opened experiment.

    Args:
        config: the experiment.

    Attributes:
        directory: run directory.
        base: folder or Hub name of the base model.
        tokenizer: its tokenizer.
        spec: the LatentSpec.
        splits: the records, read where they are asked for.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = Path(config.directory)
        self._checked: dict[Path, GivenStep] = {}
        # on several processes the first one writes what the others then read
        with processes(config.launch.timeout_minutes).main_process_first():
            self._open(config)

    def _open(self, config: Config) -> None:
        if config.launch.cpu_threads:
            torch.set_num_threads(config.launch.cpu_threads)
        if not config.model.name_or_path:
            disable_progress_bar()  # transformers' bars for loading and saving: noise for a model of a megabyte
        self.splits: Splits = load_splits(config.data)
        self.base, self.tokenizer = self._base()
        given = config.model.name_or_path
        self._weights = self.weights_of(Path(given)) if given and Path(given).is_dir() else None
        self.spec: LatentSpec = build_spec(self.tokenizer, config, vocabulary_size(self.base, config.model))
        write_atomically(self.directory / "config.yaml", to_yaml(config))

    @cached_property
    def data(self) -> Mapping[str, Dataset]:
        """Tokenised `train`, `validation` and `test` (see `latent_sft.data.dataset`), cached on disk.

        On several processes all have to ask for a split: the first one makes it, the others read it.
        """
        return tokenized_splits(
            self.config,
            self.tokenizer,
            self.spec,
            self.splits,
            self.directory / "data",
            max_positions(self.base, self.config.model),
            in_turn=processes().main_process_first,
        )

    def step(self, name: str) -> Step:
        """Return the step of a training stage, with everything that decides its result."""
        train, dtype = self.config.stage(name), self.config.model.dtype
        # what does not decide how much a step takes; what it starts from is known by its weights, `source`
        unused = {"max_tokens", "global_batch_size"}
        if train.max_tokens:
            unused = {"batch_size", "global_batch_size"}
        elif train.global_batch_size:
            unused = {"batch_size", "accumulation", "max_tokens"}
        settings = {k: v for k, v in dataclasses.asdict(train).items() if k not in {*_WATCHING, *unused, "start_from"}}
        inputs: dict[str, Any] = {
            "step": name,
            "seed": self.config.seed,
            "base": self._base_identity(),
            "data": self._data_identity(),
            "prompt": self._prompt_identity(),
            "lora": dataclasses.asdict(self.config.model.lora),
            # beside it, what is trained is float32; a run that is older than that is another one
            "dtype": {"frozen": dtype, "trained": "float32"} if dtype != "float32" else dtype,
            "train": settings,
        }
        if name in STAGE1_PHASES:
            inputs["noise"] = [self.config.stage1.noise_scale, self.config.stage1.noise_start]
            if self.config.stage1.share_backbone:
                inputs["share_backbone"] = True
        source = self.source_of(name)
        if name in ("coconut", "codi", "pccot", "kava"):
            method = dataclasses.asdict(getattr(self.config, name))
            inputs["method"] = {k: v for k, v in method.items() if k != "train"}
        elif name not in ("no-cot", "cot"):
            inputs["latent"] = self._latent_settings(name)
        if source or name not in ("no-cot", "cot"):
            inputs["source"] = source.outcome if source else "base"
        if name == "stage2" and train.start_from:
            inputs["labels"] = self.labels_step().inputs["encoder"]
        return Step(directory=self.directory / name, inputs=inputs)

    def source_of(self, name: str) -> Step | None:
        """Return the step whose final model a stage starts from, or None where that is the base model.

        Raises:
            ConfigError: `start_from` is not a folder of weights that can take the base model's place.
        """
        if name in SECTIONS and self.config.stage(name).start_from:
            return self._given(name)
        phases = [p for p in STAGE1_PHASES if self.config.stage(p).enabled]
        if name in STAGE1_PHASES:
            earlier = phases[: phases.index(name)] if name in phases else phases
            if earlier:
                return self.step(earlier[-1])
            return self.step("cot") if self.config.stage1.init == "cot" else None
        if name in ("label", "stage2"):
            if not phases:
                raise ConfigError("stage1: all three phases are disabled, but labels and stage 2 need an encoder.")
            return self.step(phases[-1])
        if name in ("coconut", "codi", "pccot", "kava"):
            return self.step("cot") if getattr(self.config, name).init == "cot" else None
        return None

    def start_of(self, name: str) -> str | Path:
        """Return folder or name of the model that a stage starts from; of two, that is the decoder."""
        source = self.source_of(name)
        if source is None:
            return self.base
        decoder = source.final / "decoder"
        return decoder if decoder.is_dir() else source.final

    def _given(self, name: str) -> GivenStep:
        key, given = f"{SECTIONS[name]}.start_from", Path(self.config.stage(name).start_from)
        folder = given / "final" if (given / "final").is_dir() else given
        if folder not in self._checked:
            for part in ("encoder", "decoder") if (folder / "decoder").is_dir() else (".",):
                check_start(folder / part, key, self.base, self.config.model, self.tokenizer)
            self._checked[folder] = GivenStep(directory=folder, inputs={"weights": self.weights_of(folder)})
        return self._checked[folder]

    def weights_of(self, folder: Path) -> str:
        """Return the fingerprint of a folder's weights."""
        return weights_fingerprint(folder, self.directory / "weights.json")

    def labels_step(self, reader: str = "label") -> Step:
        """Return the step of a store of latents: the labels of stage 2, or what the `stage1-decoder` phase reads.

        That phase reads exact weights, so that it gives what running its frozen encoder would give.
        """
        source = self.source_of(reader)
        stored = {"label": ("labels", self.config.labels.dtype)}
        name, dtype = stored.get(reader, (f"{reader}-latents", "float32"))
        start = {"base": self._base_identity(), "prompt": self._prompt_identity()}
        inputs = {
            "step": "label" if reader == "label" else name,
            "encoder": source.outcome if source else fingerprint(start),
            "data": self._data_identity(),
            "latent": self._latent_settings(reader),
            "dtype": dtype,
            "shard_size": self.config.labels.shard_size,
        }
        return Step(directory=self.directory / name, inputs=inputs)

    def labels_made_from(self, reader: str = "label") -> dict[str, str | int | float]:
        """Return what decides the latents, in words that an error can show; the store carries it."""
        step = self.labels_step(reader)
        return {
            "encoder": step.inputs["encoder"],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **self._latent_settings(reader),
        }

    def _latent_settings(self, name: str) -> dict[str, Any]:
        settings = {**dataclasses.asdict(self.config.latent), "top_k": self.spec.top_k}
        if name == "stage2":
            return {k: v for k, v in settings.items() if k not in ("min_latents", "max_latents", "max_answer_tokens")}
        return {k: settings[k] for k in _ENCODER_SETTINGS}

    def save_spec(self, folder: Path, thinker: str, thoughts: ThoughtSpec | None = None) -> None:
        """Write the spec beside a model, and how it thinks: `latent`, `explicit`, `none`, `continuous` (with M, T)."""
        write_json(folder / SPEC_FILE, self.spec.to_dict())
        how = {} if thoughts is None else {"thoughts": dataclasses.asdict(thoughts)}
        write_json(folder / "thinker.json", {"thinker": thinker, **how})

    def _base(self) -> tuple[str, PreTrainedTokenizerBase]:
        model = self.config.model
        if model.name_or_path:
            tokenizer = load_tokenizer(model.name_or_path, model)
            fix_date(tokenizer, self.config.prompt.date)
            return model.name_or_path, tokenizer
        step = Step(directory=self.directory / "base", inputs=self._tiny_inputs())
        if not step.is_finished():
            texts = (t for r in self.splits.train for t in (r.problem, r.cot, r.cot_answer))
            tokenizer = build_tokenizer(texts, model.tiny, self.config.prompt)
            step.begin(self.config.seed)
            save_lm(build_tiny(model.tiny, tokenizer, self.config.seed), step.final, tokenizer)
            step.finish()
        return str(step.final), load_tokenizer(step.final, model)

    def _tiny_inputs(self) -> dict[str, Any]:
        return {
            "tiny": dataclasses.asdict(self.config.model.tiny),
            "prompt": dataclasses.asdict(self.config.prompt),
            "seed": self.config.seed,
            "data": self._data_identity(),
        }

    def _base_identity(self) -> Any:
        model = self.config.model
        if not model.name_or_path:
            return fingerprint(self._tiny_inputs())
        # a folder is what is in it, wherever it is
        name = {"name": model.name_or_path, "revision": model.revision}
        weights = name if self._weights is None else {"weights": self._weights}
        return {**weights, "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def _data_identity(self) -> Any:
        data = self.config.data
        limits = {"max_prompt_tokens": data.max_prompt_tokens, "max_cot_tokens": data.max_cot_tokens}
        sources = {k: v for k, v in self.splits.sources.items() if k != "test"}
        return {"sources": sources, **limits}

    def _prompt_identity(self) -> dict[str, Any]:
        spec = self.spec.to_dict()
        keys = ("think_ids", "end_think_ids", "eos_id", "prompt_template", "system_prompt", "system_placement")
        return {k: spec[k] for k in keys}
