"""No host synchronisation: in a training step of every stage, and in the decoding step of every way of thinking.

Where the host may wait: `stop_unless_finite`, once in a step, so that a gradient that is not finite changes no weight;
`prepare`, which decodes before a step; admitting prompts and looking for finished rows, every few steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import torch

from eval.gpu.parts import Case, Result, Settings
from eval.gpu.waits import NoWaits, Watch, on_fake_gpu
from eval.speed.cases import TINY, build_lm, spec_of
from latent_sft.config.load import load_config
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.inference import advance
from latent_sft.inference.engine import Engine
from latent_sft.inference.generate import generate
from latent_sft.inference.noise import Sampling
from latent_sft.inference.slots import Slots
from latent_sft.inference.solve import Thinker
from latent_sft.method import spans
from latent_sft.method.types import LatentSpec
from latent_sft.methods import SECTIONS, STAGES
from latent_sft.models import attention
from latent_sft.train import loop
from latent_sft.train.metrics import Meter
from latent_sft.train.run import train_stage

# a model of 32 dimensions, two steps of a stage, one problem solved
SHORT = [
    *("data.synthetic.num_train=64", "data.synthetic.num_validation=8", "data.synthetic.num_test=8"),
    *(f"model.tiny.{size}" for size in ("hidden_size=32", "intermediate_size=64", "num_layers=2", "num_heads=2")),
    *("model.tiny.num_kv_heads=1", "latent.top_k=5", "latent.max_latents=8", "latent.max_answer_tokens=4"),
    *("latent.noise_scale=0.5", "eval.max_cot_tokens=8"),
    *(f"{s}.{setting}" for s in SECTIONS.values() for setting in ("max_steps=2", "eval_every=2", "eval_examples=1")),
    *(f"{s}.{setting}" for s in SECTIONS.values() for setting in ("micro_batch_size=8", "log_every=2")),
]
# stages whose rows need what those of the others lack
OWN_DATA = {"cot2": ("data.synthetic.task=mnns", "model.tiny.tokenizer=space", "data.limit_train=64")}


@lru_cache(maxsize=4)
def opened(folder: Path, *more: str) -> Workspace:
    """Return the experiment of two steps with these settings, opened once."""
    return Workspace(load_config(None, [*SHORT, *more, f"run_dir={folder}"]))


def train(folder: Path, stage: str, *more: str) -> Workspace:
    """Train a stage for two steps, after making the latents it reads; return its experiment."""
    own, reads = OWN_DATA.get(stage, ()), STAGES[stage].reads
    work = opened(folder / ("own" if own else "run"), *own, *more)
    if reads is not None and reads.name:
        make_labels(work.config, work)
    train_stage(work.config, stage, work)
    return work


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Watch the steps of training and decoding."""
    regions = [(loop.TrainingLoop, "_step"), (Slots, "step")]
    allowed = [(loop.TrainingLoop, "_prepared"), (loop, "stop_unless_finite")]
    if not watch.cuda:  # they look at values on a CPU only, where that is for nothing
        allowed += [(attention, "induction_tracks"), (advance, "_written")]
    with ExitStack() as stack:
        for owner, name in regions:
            stack.enter_context(patch.object(owner, name, watch.inside(getattr(owner, name))))
        for owner, name in allowed:
            stack.enter_context(patch.object(owner, name, watch.outside(getattr(owner, name))))
        yield


def cases(settings: Settings) -> Sequence[Case]:
    """Return a case for every stage; a later one may start from an earlier one's model, so all are in one folder."""
    folder = settings.out / "sync"
    found = [Case(stage, partial(_stage, settings, folder, stage), 0.25) for stage in STAGES]
    sampled = Sampling(temperature=1.0, latent_noise=True)
    found.append(Case("decoding, sampled and noisy", partial(_decoding, settings, sampled), 0.25))
    found.append(Case("decoding, greedy", partial(_decoding, settings, None), 0.25))
    return found


def _stage(settings: Settings, folder: Path, stage: str) -> Result:
    watch = Watch(settings.device)
    with watched(watch):
        work = train(folder, stage)
    if settings.device == "cpu":
        pretend(work, stage)
    return {"same": True, "regions": watch.entered}


def _decoding(settings: Settings, sampling: Sampling | None) -> Result:
    """Decode with samples and noise, which the stages' validation has not; on a real device and a fake one."""
    watch, lm = Watch(settings.device), build_lm(TINY, 0, settings.device)
    spec = spec_of(TINY, max_latents=8, max_answer_tokens=4, noise_scale=1.0)
    prompts = [[9] * length + list(spec.think_ids) for length in (3, 5)]
    with watched(watch):
        for kind in ("latent", "explicit"):
            generate(lm, spec, prompts, thinker=kind, sampling=sampling, max_cot_tokens=8)
    if settings.device == "cpu":
        with on_fake_gpu(lm):
            for kind in ("latent", "explicit"):
                _decoding_steps(Thinker(kind, lm), spec, sampling)
    return {"same": True, "regions": watch.entered}


def pretend(work: Workspace, stage: str) -> None:
    """Run a stage's forward pass, what is logged of it, and a decoding step on a fake GPU."""
    setup = work.setup(stage)
    model = STAGES[stage].model(setup).train()
    batch = STAGES[stage].batch(setup)(work.data["train"].select(range(4)).to_list())
    with on_fake_gpu(model) as fake:
        fakes = {name: fake(value) for name, value in batch.items()}
        meter = Meter(model)
        meter.restart(0)
        meter.peak = 1.0  # or the operations are not counted
        with NoWaits():
            out = model(**fakes)
            losses = {name: total.float() / fakes[f"count_{name}"] for name, total in out.loss_sums.items()}
            meter.add(fakes, losses, out.observed)
        words = spans._code_words  # made once in a process, so that here they are real
        with patch.object(spans, "_code_words", lambda code: tuple(map(fake, words(code)))):
            _decoding_steps(STAGES[stage].thinker(model), work.spec, None)


@torch.inference_mode()
def _decoding_steps(thinker: Thinker, spec: LatentSpec, sampling: Sampling | None) -> None:
    # slots of which none is in work: the same operations, and nothing that has a length
    how = {"thoughts": thinker.thoughts, "mixture": thinker.mixture, "sampling": sampling, "max_cot_tokens": 8}
    for static in (False, True):
        engine = Engine(thinker.lm, spec, thinker=thinker.kind, longest=8, batch_size=3, static=static, **how)
        with engine, NoWaits():
            for _ in range(2):
                engine.slots.step()
