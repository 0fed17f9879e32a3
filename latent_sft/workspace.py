"""What every step of an experiment starts from: tokenizer, base model, LatentSpec, tokenised splits, steps.

Opened once a command; a second opening reads what the first one wrote (`<run>/base`, `<run>/data`).
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from latent_sft.config.experiment import Config
from latent_sft.config.load import to_yaml
from latent_sft.data.dataset import tokenized_splits, tokenizer_fingerprint
from latent_sft.data.labels import LabelStore
from latent_sft.data.prompts import build_spec
from latent_sft.data.records import Splits, load_splits
from latent_sft.method.types import LatentSpec
from latent_sft.methods import STAGES, method_of
from latent_sft.methods.base import Setup, Store
from latent_sft.models.load import build_tiny, load_tokenizer, save_lm, vocabulary_size
from latent_sft.models.tiny_tokenizer import build_tokenizer
from latent_sft.runs import Step, fingerprint, write_atomically

log = logging.getLogger(__name__)

# settings that say how a stage is watched or run, not what it computes
_WATCHING = ("enabled", "log_every", "num_workers", "save_every", "save_total_limit")


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
        splits: the records.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = Path(config.directory)
        # on several processes the first one writes what the others then read
        with processes(config.launch.timeout_minutes).main_process_first():
            self._open(config)

    def _open(self, config: Config) -> None:
        if config.launch.cpu_threads:
            torch.set_num_threads(config.launch.cpu_threads)
        if not config.model.name_or_path:
            disable_progress_bar()  # transformers' bars for loading and saving: noise for a model of a megabyte
        self.splits: Splits = load_splits(config.data, skipped_to=self.directory / "data" / "skipped.jsonl")
        self.base, self.tokenizer = self._base()
        self.spec: LatentSpec = build_spec(
            self.tokenizer, config.prompt, config.latent, vocabulary_size(self.base, config.model)
        )
        write_atomically(self.directory / "config.yaml", to_yaml(config))

    @cached_property
    def data(self) -> dict[str, Dataset]:
        """Tokenised `train`, `validation` and `test` (see `latent_sft.data.dataset`), cached on disk."""
        with processes().main_process_first():
            return self._tokenise()

    def _tokenise(self) -> dict[str, Dataset]:
        return tokenized_splits(self.config.data, self.tokenizer, self.spec, self.splits, self.directory / "data")

    def step(self, name: str) -> Step:
        """Return the step of a training stage, with everything that decides its result."""
        train = self.config.stage(name)
        settings = {k: v for k, v in dataclasses.asdict(train).items() if k not in _WATCHING}
        # one of the two decides what a batch is; runs that are older than max_tokens stay what they are
        del settings["batch_size" if train.max_tokens else "max_tokens"]
        inputs: dict[str, Any] = {
            "step": name,
            "seed": self.config.seed,
            "base": self._base_identity(),
            "data": self._data_identity(),
            "prompt": self._prompt_identity(),
            "lora": dataclasses.asdict(self.config.model.lora),
            "dtype": self.config.model.dtype,
            "train": settings,
        }
        stage = STAGES[name]
        inputs |= stage.identity(self._settings(name), self.config.latent)
        source = self.source_of(name)
        inputs["source"] = source.fingerprint if source else "base"
        return Step(directory=self.directory / name, inputs=inputs)

    def source_of(self, name: str) -> Step | None:
        """Return the step whose final model a stage starts from, or None where that is the base model."""
        return self._step_of(STAGES[name].source(self._settings(name)))

    def setup(self, name: str) -> Setup:
        """Return what the functions of a stage are given; what it starts from need not be there yet.

        Raises:
            ArtefactError: the latents it reads are not finished, or not those that it needs.
        """
        stage, source = STAGES[name], self.source_of(name)
        first = source
        while first is not None and method_of(first.directory.name) is method_of(name):
            first = self.source_of(first.directory.name)
        latents = None
        if stage.reads is not None and self.store_step(stage.reads).is_finished():
            folder = self.store_step(stage.reads).directory / "store"
            latents = LabelStore(folder, expect=self.store_made_from(stage.reads)).get
        return Setup(
            settings=self._settings(name),
            train=self.config.stage(name),
            model=self.config.model,
            spec=self.spec,
            tokenizer=self.tokenizer,
            start=self.base if source is None else source.final,
            source="" if source is None else source.directory.name,
            root=self.base if first is None else first.final,
            latents=latents,
        )

    def store_step(self, store: Store) -> Step:
        """Return the step of a store of latents."""
        reader = self._reader(store)
        source = self._step_of(store.source(self._settings(reader)))
        start = {"base": self._base_identity(), "prompt": self._prompt_identity()}
        inputs = {
            "step": store.name or store.folder,
            "encoder": source.fingerprint if source else fingerprint(start),
            "data": self._data_identity(),
            "latent": store.identity(self.config.latent),
            "dtype": store.dtype or self.config.labels.dtype,
            "shard_size": self.config.labels.shard_size,
        }
        return Step(directory=self.directory / store.folder, inputs=inputs)

    def store_source(self, store: Store) -> Step | None:
        """Return the step whose model makes a store's latents, or None where that is the base model."""
        return self._step_of(store.source(self._settings(self._reader(store))))

    def store_made_from(self, store: Store) -> dict[str, str | int | float]:
        """Return what decides the latents, in words that an error can show; the store carries it."""
        return {
            "encoder": self.store_step(store).inputs["encoder"],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **store.identity(self.config.latent),
        }

    def _reader(self, store: Store) -> str:
        return next(name for name, stage in STAGES.items() if stage.reads is store)

    def _step_of(self, name: str | None) -> Step | None:
        return None if name is None else self.step(name)

    def _settings(self, name: str) -> Any:
        return self.config.settings(method_of(name).settings)

    def _base(self) -> tuple[str, PreTrainedTokenizerBase]:
        model = self.config.model
        if model.name_or_path:
            return model.name_or_path, load_tokenizer(model.name_or_path, model)
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
        if model.name_or_path:
            return {
                "name": model.name_or_path,
                "revision": model.revision,
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
            }
        return fingerprint(self._tiny_inputs())

    def _data_identity(self) -> Any:
        data = self.config.data
        limits = {"max_prompt_tokens": data.max_prompt_tokens, "max_cot_tokens": data.max_cot_tokens}
        sources = {k: v for k, v in self.splits.sources.items() if k != "test"}
        return {"sources": sources, "num_train": len(self.splits.train), **limits}

    def _prompt_identity(self) -> dict[str, Any]:
        spec = self.spec.to_dict()
        keys = ("think_ids", "end_think_ids", "eos_id", "prompt_template", "system_prompt", "system_placement")
        return {k: spec[k] for k in keys}
