"""A checkpoint as a model of lm-evaluation-harness, decoded by the engine of this package: `latent-sft lm-eval`.

lm-eval knows a model from the moment that its class is registered, and has no entry points for that. So there is a
command here that registers one and hands over to lm-eval's own, with all its options.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from accelerate.utils import gather
from jinja2 import TemplateError
from tqdm import tqdm

from latent_sft.data.prompts import render_prompt
from latent_sft.errors import ConfigError, did_you_mean
from latent_sft.evaluation.answers import answer_text
from latent_sft.experiment.workspace import processes
from latent_sft.inference.engine import Engine
from latent_sft.inference.generate import Sampling
from latent_sft.inference.show import load

NAME = "latent-sft"  # for lm-eval's --model
AUTO_BATCH = 64
SAMPLING = ("do_sample", "temperature", "top_p")

log = logging.getLogger(__name__)


def run(checkpoint: str, options: Sequence[str]) -> None:
    """Run lm-eval's command on a checkpoint; it prints its table and writes its files as always.

    Args:
        checkpoint: exported folder, `final` folder of a stage, or Hub name.
        options: of `lm-eval run`; `--model_args` are those of the class in `model_class`.

    Raises:
        ConfigError: lm-eval is not installed, or the tasks ask for what a thinking model does not have.
    """
    model_class()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    model = ["--model", NAME, "--model_args", json.dumps({"pretrained": checkpoint})]
    given, sys.argv = sys.argv, ["lm-eval", "run", "--batch_size", "auto", *model, *options]
    try:
        setup_logging()
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = given


@cache
def model_class() -> type:
    """Return the class of the model, registered with lm-eval as `latent-sft`.

    For `lm_eval.simple_evaluate`: give its name, or an object of it, as `model`.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs
    except ImportError as error:
        raise ConfigError(f"lm-eval cannot be imported ({error}); pip install 'latent_sft[lm-eval]'.") from error

    @register_model(NAME)
    class LatentLM(LM):
        """A checkpoint that thinks, and then answers; lm-eval sees the answer alone.

        Args:
            pretrained: the checkpoint.
            thinker: as trained by default; `none` answers at once.
            min_latents: thinking does not stop before; as trained by default.
            max_latents: thinking ends after; as trained by default.
            max_answer_tokens: answers end after, or earlier where a task says so; as trained by default.
            max_cot_tokens: written reasoning ends after.
            batch_size: problems decoded together; `auto` is 64.
            max_batch_size: what lm-eval always gives; not needed.
            device: the first GPU by default, where there is one; of several processes each has its own.
        """

        def __init__(
            self,
            pretrained: str,
            thinker: str | None = None,
            min_latents: int | None = None,
            max_latents: int | None = None,
            max_answer_tokens: int | None = None,
            max_cot_tokens: int = 512,
            batch_size: int | str = AUTO_BATCH,
            max_batch_size: int | None = None,
            device: str | None = None,
            **unknown: Any,
        ) -> None:
            super().__init__()
            given = {"min_latents": min_latents, "max_latents": max_latents, "max_answer_tokens": max_answer_tokens}
            for name in unknown:
                known = ("thinker", "max_cot_tokens", "batch_size", "device", *given)
                raise ConfigError(f"--model_args: unknown argument {name!r}.{did_you_mean(name, known)}")
            state = processes()
            self._rank, self._world_size, self._device = state.process_index, state.num_processes, state.device
            changes = {name: value for name, value in given.items() if value is not None}
            self.reasoner = load(pretrained).adjusted(thinker, **changes)
            if device and self.world_size == 1 and torch.cuda.is_available():  # without one lm-eval says cuda:0 as well
                for part in (self.reasoner.thinker.lm, self.reasoner.thinker.thoughts):
                    _ = part and part.to(device)
            self.max_cot_tokens, auto = max_cot_tokens, str(batch_size).startswith("auto")
            self.batch_size = AUTO_BATCH if auto else int(batch_size)
            config = self.reasoner.thinker.lm.config.get_text_config()
            self.positions = getattr(config, "max_position_embeddings", None)
            self._templated = False

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for place, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
            quiet = disable_tqdm or self.rank != 0
            with tqdm(total=len(requests), desc="generate_until", unit="request", disable=quiet) as bar:
                for places in groups.values():
                    self._answer(requests, places, answers, bar)
            self._templated = False
            return answers

        def _answer(self, requests: list[Any], places: list[int], answers: list[str], bar: Any) -> None:
            most = self.reasoner.spec.max_answer_tokens
            asked = normalize_gen_kwargs(requests[places[0]].args[1], most)
            if asked["do_sample"] and (ignored := asked.keys() - {"until", "max_gen_toks", *SAMPLING}):
                log.warning("generation_kwargs: %s mean nothing to this model", ", ".join(sorted(ignored)))
            reasoner = self.reasoner.adjusted(max_answer_tokens=min(most, asked["max_gen_toks"]))
            sampling = Sampling(
                temperature=asked.get("temperature", 1.0) if asked["do_sample"] else 0.0,
                top_p=asked.get("top_p", 1.0) if asked["do_sample"] else 1.0,
                seed=torch.initial_seed() % 2**31,  # lm-eval sets it from --seed
            )
            prompts = {place: self._prompt(requests[place].args[0]) for place in places}
            too_long = [p for p in places if self.positions is not None and len(prompts[p]) >= self.positions]
            if too_long:
                log.warning(
                    "%d of %d prompts are longer than the %d positions of the model and count as answered by nothing",
                    *(len(too_long), len(places), self.positions),
                )
            places = [place for place in places if place not in set(too_long)]
            bar.update(len(too_long))
            if not places:
                return
            how = reasoner.thinker
            with Engine(
                how.lm,
                reasoner.spec,
                thinker=how.kind,
                longest=max(len(prompts[place]) for place in places),
                batch_size=min(self.batch_size, len(places)),
                sampling=sampling,
                max_cot_tokens=self.max_cot_tokens,
                thoughts=how.thoughts,
                mixture=how.mixture,
            ) as engine:
                for place in sorted(places, key=lambda place: -len(prompts[place])):
                    # with the seed the number decides what is drawn: another one on every process
                    engine.add(prompts[place], number=place * self.world_size + self.rank)
                while engine.busy():
                    for number, decoded in engine.step(more=False).items():
                        place = number // self.world_size
                        text = answer_text(reasoner.tokenizer, decoded.answer_ids).lstrip()
                        for stop in filter(None, asked["until"]):
                            text = text.split(stop)[0]
                        answers[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                        bar.update()

        def _prompt(self, context: str) -> list[int]:
            tokenizer, spec = self.reasoner.tokenizer, self.reasoner.spec
            if not self._templated:
                return render_prompt(tokenizer, spec, context)
            ids, think = list(tokenizer(context, add_special_tokens=False)["input_ids"]), list(spec.think_ids)
            return ids if ids[-len(think) :] == think else ids + think

        def chat_template(self, chat_template: bool | str = False) -> str:
            """Return the template; lm-eval asks for it where prompts are to be made by it (--apply_chat_template)."""
            self._templated = bool(chat_template)
            return str(self.reasoner.tokenizer.chat_template or "") if chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            tokenizer = self.reasoner.tokenizer
            if not add_generation_prompt:
                raise ConfigError("gen_prefix: this model thinks before it answers, so its answer cannot be begun.")
            if not tokenizer.chat_template:
                raise ConfigError(
                    f"--apply_chat_template: {self.reasoner.checkpoint} has no chat template; leave that option out: "
                    "contexts are put into the prompt of training in any case."
                )
            try:
                return str(tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:
                raise ConfigError(f"--apply_chat_template: {self.reasoner.checkpoint}: {error}") from error

        @property
        def tokenizer_name(self) -> str:
            return self.reasoner.checkpoint.replace("/", "__")

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise _no_probabilities(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise _no_probabilities(requests)

        # what lm-eval needs where each of several processes has a part of the requests

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return gather(tensor)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            if self.world_size == 1:
                return [obj]
            found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
            torch.distributed.gather_object(obj, found, dst)
            return found

        def barrier(self) -> None:
            processes().wait_for_everyone()

    return LatentLM


def _no_probabilities(requests: Sequence[Any]) -> ConfigError:
    tasks = ", ".join(dict.fromkeys(str(request.task_name) for request in requests))
    return ConfigError(
        f"{tasks}: compares log-likelihoods, but a model that thinks before it answers gives no probability of a "
        "given text; use tasks with output_type generate_until, such as gsm8k_cot, minerva_math or bbh."
    )
