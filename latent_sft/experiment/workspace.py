"""An experiment: its steps with everything that decides their results, and what every one of them starts from.

`Experiment` is what the configuration alone tells; `Workspace` is opened: tokenizer, base model, LatentSpec, tokenised
splits. That happens once a command; a second opening reads what the first one wrote (`<run>/base`, `<run>/data`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
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
from latent_sft.runs import CLAIM, GivenStep, Step, exclusive, fingerprint, write_atomically

# settings that say how a stage is watched or run, not what it computes
_WATCHING = ("enabled", "log_every", "num_workers", "save_every", "save_total_limit", "keep_checkpoint")


def processes(timeout_minutes: float = 30.0) -> PartialState:
    """Return accelerate's view of the processes of this job (one, or those torchrun started).

    The first call connects them; how long one waits for another before the job ends is decided there.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=timeout_minutes))


class Experiment:
    """The steps of an experiment, as its configuration tells: what is equal for two experiments is made alike.

    Args:
        config: the experiment.

    Attributes:
        directory: run directory.
        latent: the `latent` section.
        of_data, of_prompt, of_base, of_spec: what decides the training data, the prompt, the base model, and all that
            is in a LatentSpec. Here these are sections of the configuration.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = Path(config.directory)
        self.latent: LatentConfig = config.latent
        self.of_data: Any = dataclasses.asdict(config.data)
        self.of_prompt: Any = dataclasses.asdict(config.prompt)
        self.of_base: Any = [dataclasses.asdict(config.model)]
        if not config.model.name_or_path:
            self.of_base += [self.of_prompt, self.of_data, config.seed]
        self.of_spec: Any = [self.of_prompt, dataclasses.asdict(config.latent)]

    def of_rows(self) -> Any:
        """Return what decides the tokenised splits."""
        return self.of_data, self.of_base, self.of_spec

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
            "base": self.of_base,
            "data": self.of_data,
            "prompt": self.of_prompt,
            "lora": dataclasses.asdict(self.config.model.lora),
            # beside it, what is trained is float32; a run that is older than that is another one
            "dtype": {"frozen": dtype, "trained": "float32"} if dtype != "float32" else dtype,
            "train": settings,
        }
        stage, source = STAGES[name], self.source_of(name)
        inputs |= stage.identity(self._settings(name), self.latent)
        inputs["source"] = self._outcome(source) if source else "base"
        if stage.reads is not None and train.start_from:
            inputs["store"] = self.store_step(stage.reads).inputs["encoder"]
        return Step(directory=self.directory / name, inputs=inputs)

    def source_of(self, name: str) -> Step | None:
        """Return the step whose final model a stage starts from, or None where that is the base model.

        Raises:
            ConfigError: `start_from` is not a folder of weights that can take the base model's place (once opened).
        """
        return self._given(name) if self.config.stage(name).start_from else self._step_of(self.source_name(name))

    def source_name(self, name: str) -> str | None:
        """Return the stage whose final model a stage starts from, or None where that is none of this experiment."""
        return None if self.config.stage(name).start_from else STAGES[name].source(self._settings(name))

    def store_step(self, store: Store) -> Step:
        """Return the step of a store of latents."""
        source = self.store_source(store)
        start = {"base": self.of_base, "prompt": self.of_prompt}
        inputs = {
            "step": store.name or store.folder,
            "encoder": self._outcome(source) if source else fingerprint(start),
            "data": self.of_data,
            "latent": self.store_identity(store),
            "dtype": store.dtype or self.config.labels.dtype,
            "shard_size": self.config.labels.shard_size,
        }
        return Step(directory=self.directory / store.folder, inputs=inputs)

    def store_source(self, store: Store) -> Step | None:
        """Return the step whose model makes a store's latents, or None where that is the base model."""
        reader = self._reader(store)
        if not store.name:  # made by the stage that reads it, of what it starts from
            return self.source_of(reader)
        return self._step_of(self.store_source_name(store))

    def store_source_name(self, store: Store) -> str | None:
        """Return the stage whose model makes a store that is a step of its own; None where that is the base model."""
        return store.source(self._settings(self._reader(store)))

    def store_identity(self, store: Store) -> dict[str, Any]:
        """Return what decides a store's latents beside the model that makes them."""
        return store.identity(self._settings(self._reader(store)), self.latent)

    def _given(self, name: str) -> GivenStep:
        folder = Path(self.config.stage(name).start_from)
        return GivenStep(directory=folder, inputs={"weights": str(folder)})

    def _outcome(self, source: Step) -> str:
        return source.fingerprint

    def _reader(self, store: Store) -> str:
        return next(name for name, stage in STAGES.items() if stage.reads is store)

    def _step_of(self, name: str | None) -> Step | None:
        return None if name is None else self.step(name)

    def _settings(self, name: str) -> Any:
        return self.config.settings(method_of(name).settings)


class Workspace(Experiment):
    """An opened experiment.

    Args:
        config: the experiment.

    Attributes:
        base: folder or Hub name of the base model.
        tokenizer: its tokenizer.
        spec: the LatentSpec.
        splits: the records, read where they are asked for.
        of_data, of_prompt, of_base, of_spec: as in `Experiment`, by the content of files; fingerprints are made of it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._checked: dict[Path, GivenStep] = {}
        # on several processes the first one writes what the others then read
        with processes(config.launch.timeout_minutes).main_process_first():
            self._open()

    def _open(self) -> None:
        config, model = self.config, self.config.model
        if config.launch.cpu_threads:
            torch.set_num_threads(config.launch.cpu_threads)
        if not model.name_or_path:
            disable_progress_bar()  # transformers' bars for loading and saving: noise for a model of a megabyte
        self.splits: Splits = load_splits(config.data)
        limits = {"max_prompt_tokens": config.data.max_prompt_tokens, "max_cot_tokens": config.data.max_cot_tokens}
        self.of_data = {"sources": {k: v for k, v in self.splits.sources.items() if k != "test"}, **limits}
        self.base, self.tokenizer = self._given_base() if model.name_or_path else self._tiny_base()
        self.spec: LatentSpec = build_spec(
            self.tokenizer, config.prompt, config.latent, vocabulary_size(self.base, model)
        )
        self.latent = dataclasses.replace(config.latent, top_k=self.spec.top_k)
        self.of_spec = self.spec.to_dict()
        keys = ("think_ids", "end_think_ids", "eos_id", "prompt_template", "system_prompt", "system_placement")
        self.of_prompt = {k: self.of_spec[k] for k in keys}
        write_atomically(self.directory / "config.yaml", to_yaml(config))

    def _given_base(self) -> tuple[str, PreTrainedTokenizerBase]:
        model = self.config.model
        tokenizer = load_tokenizer(model.name_or_path, model)
        fix_date(tokenizer, self.config.prompt.date)
        # a folder is what is in it, wherever it is
        here = Path(model.name_or_path).is_dir()
        name = {"name": model.name_or_path, "revision": model.revision}
        weights = {"weights": self.weights_of(Path(model.name_or_path))} if here else name
        self.of_base = {**weights, "tokenizer": tokenizer_fingerprint(tokenizer)}
        return model.name_or_path, tokenizer

    def _tiny_base(self) -> tuple[str, PreTrainedTokenizerBase]:
        model, seed = self.config.model, self.config.seed
        prompt = dataclasses.asdict(self.config.prompt)
        inputs = {"tiny": dataclasses.asdict(model.tiny), "prompt": prompt, "seed": seed, "data": self.of_data}
        step = Step(directory=self.directory / "base", inputs=inputs)
        self.of_base = step.fingerprint
        with exclusive(step.directory, CLAIM, wait=math.inf):  # runs of a comparison share it
            if not step.is_finished():
                texts = (t for r in self.splits.train for t in (r.problem, r.cot, r.cot_answer))
                tokenizer = build_tokenizer(chain(texts, self.splits.words), model.tiny, self.config.prompt)
                step.begin(seed)
                save_lm(build_tiny(model.tiny, tokenizer, seed), step.final, tokenizer)
                step.finish()
        return str(step.final), load_tokenizer(step.final, model)

    @cached_property
    def data(self) -> Mapping[str, Dataset]:
        """Tokenised `train`, `validation` and `test` (see `latent_sft.data.dataset`), cached on disk.

        On several processes all have to ask for a split: the first one makes it, the others read it.
        """
        folder, longest = self.directory / "data", max_positions(self.base, self.config.model)
        made_from = (self.config.data, self.tokenizer, self.spec, self.splits)
        return tokenized_splits(*made_from, folder, longest, in_turn=self._in_turn)

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        # one process of this job after the other, and one job that shares the folder after the other
        with processes().main_process_first(), exclusive(self.directory / "data", CLAIM, wait=math.inf):
            yield

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

    def store_made_from(self, store: Store) -> dict[str, str | int | float]:
        """Return what decides the latents, in words that an error can show; the store carries it."""
        return {
            "encoder": self.store_step(store).inputs["encoder"],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **self.store_identity(store),
        }

    def weights_of(self, folder: Path) -> str:
        """Return the fingerprint of a folder's weights."""
        return weights_fingerprint(folder, self.directory / "weights.json")

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

    def _outcome(self, source: Step) -> str:
        return source.outcome
