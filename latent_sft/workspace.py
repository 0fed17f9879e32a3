"""What every step of an experiment starts from: tokenizer, base model, LatentSpec, tokenised splits, steps.

Opened once a command; a second opening reads what the first one wrote (`<run>/base`, `<run>/data`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from latent_sft.config.experiment import Config
from latent_sft.config.load import to_yaml
from latent_sft.config.schema import LatentConfig
from latent_sft.data.collate import LabelOf
from latent_sft.data.dataset import tokenized_splits, tokenizer_fingerprint
from latent_sft.data.labels import LabelStore
from latent_sft.data.prompts import build_spec, fix_date
from latent_sft.data.records import Splits, load_splits
from latent_sft.method.types import LatentSpec
from latent_sft.methods import STAGES, method_of
from latent_sft.methods.base import Setup, Store
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
from latent_sft.runs import GivenStep, Step, fingerprint, write_atomically

log = logging.getLogger(__name__)

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
        self.spec: LatentSpec = build_spec(
            self.tokenizer, config.prompt, config.latent, vocabulary_size(self.base, config.model)
        )
        write_atomically(self.directory / "config.yaml", to_yaml(config))

    @cached_property
    def data(self) -> Mapping[str, Dataset]:
        """Tokenised `train`, `validation` and `test` (see `latent_sft.data.dataset`), cached on disk.

        On several processes all have to ask for a split: the first one makes it, the others read it.
        """
        return tokenized_splits(
            self.config.data,
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
            unused = {"micro_batch_size", "global_batch_size"}
        elif train.global_batch_size:
            unused = {"micro_batch_size", "gradient_accumulation_steps", "max_tokens"}
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
        stage, source = STAGES[name], self.source_of(name)
        inputs |= stage.identity(self._settings(name), self._latent())
        inputs["source"] = source.outcome if source else "base"
        if stage.reads is not None and train.start_from:
            inputs["store"] = self.store_step(stage.reads).inputs["encoder"]
        return Step(directory=self.directory / name, inputs=inputs)

    def source_of(self, name: str) -> Step | None:
        """Return the step whose final model a stage starts from, or None where that is the base model.

        Raises:
            ConfigError: `start_from` is not a folder of weights that can take the base model's place.
        """
        if self.config.stage(name).start_from:
            return self._given(name)
        return self._step_of(STAGES[name].source(self._settings(name)))

    def setup(self, name: str) -> Setup:
        """Return what the functions of a stage are given; what it starts from need not be there yet.

        Raises:
            ArtefactError: the latents it reads are not those that it needs.
        """
        stage = STAGES[name]
        latents = None
        if stage.reads is not None and self.store_step(stage.reads).is_finished():
            folder = self.store_step(stage.reads).directory / "store"
            latents = LabelStore(folder, expect=self.store_made_from(stage.reads)).get
        return self._setup(name, self.source_of(name), latents)

    def store_setup(self, store: Store) -> Setup:
        """Return what the function that builds a store's model is given."""
        return self._setup(self._reader(store), self.store_source(store), None)

    def _setup(self, name: str, source: Step | None, latents: LabelOf | None) -> Setup:
        # back through the stages of the method, to what the first of them started from
        first, root = name, source
        while root is not None and root.directory.name in STAGES:
            if method_of(root.directory.name) is not method_of(first):
                break
            root = self.source_of(root.directory.name)
        return Setup(
            settings=self._settings(name),
            train=self.config.stage(name),
            model=self.config.model,
            trained_model=self.config.trained_model,
            spec=self.spec,
            tokenizer=self.tokenizer,
            start=self.base if source is None else source.final,
            source=source.directory.name if source is not None and source.directory.name in STAGES else "",
            base=self.base,
            root=self.base if root is None else root.final,
            latents=latents,
        )

    def _given(self, name: str) -> GivenStep:
        key, given = f"{STAGES[name].section}.start_from", Path(self.config.stage(name).start_from)
        folder = given / "final" if (given / "final").is_dir() else given
        if folder not in self._checked:
            for part in ("encoder", "decoder") if (folder / "decoder").is_dir() else (".",):
                check_start(folder / part, key, self.base, self.config.model, self.tokenizer)
            self._checked[folder] = GivenStep(directory=folder, inputs={"weights": self.weights_of(folder)})
        return self._checked[folder]

    def weights_of(self, folder: Path) -> str:
        """Return the fingerprint of a folder's weights."""
        return weights_fingerprint(folder, self.directory / "weights.json")

    def store_step(self, store: Store) -> Step:
        """Return the step of a store of latents."""
        source = self.store_source(store)
        start = {"base": self._base_identity(), "prompt": self._prompt_identity()}
        inputs = {
            "step": store.name or store.folder,
            "encoder": source.outcome if source else fingerprint(start),
            "data": self._data_identity(),
            "latent": self._store_identity(store),
            "dtype": store.dtype or self.config.labels.dtype,
            "shard_size": self.config.labels.shard_size,
        }
        return Step(directory=self.directory / store.folder, inputs=inputs)

    def store_source(self, store: Store) -> Step | None:
        """Return the step whose model makes a store's latents, or None where that is the base model."""
        reader = self._reader(store)
        if not store.name:  # made by the stage that reads it, of what it starts from
            return self.source_of(reader)
        return self._step_of(store.source(self._settings(reader)))

    def store_made_from(self, store: Store) -> dict[str, str | int | float]:
        """Return what decides the latents, in words that an error can show; the store carries it."""
        return {
            "encoder": self.store_step(store).inputs["encoder"],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **self._store_identity(store),
        }

    def _store_identity(self, store: Store) -> dict[str, Any]:
        return store.identity(self._settings(self._reader(store)), self._latent())

    def _reader(self, store: Store) -> str:
        return next(name for name, stage in STAGES.items() if stage.reads is store)

    def _step_of(self, name: str | None) -> Step | None:
        return None if name is None else self.step(name)

    def _settings(self, name: str) -> Any:
        return self.config.settings(method_of(name).settings)

    def _latent(self) -> LatentConfig:
        return dataclasses.replace(self.config.latent, top_k=self.spec.top_k)

    def _base(self) -> tuple[str, PreTrainedTokenizerBase]:
        model = self.config.model
        if model.name_or_path:
            tokenizer = load_tokenizer(model.name_or_path, model)
            fix_date(tokenizer, self.config.prompt.date)
            return model.name_or_path, tokenizer
        step = Step(directory=self.directory / "base", inputs=self._tiny_inputs())
        if not step.is_finished():
            texts = (t for r in self.splits.train for t in (r.problem, r.cot, r.cot_answer))
            tokenizer = build_tokenizer(chain(texts, self.splits.words), model.tiny, self.config.prompt)
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
