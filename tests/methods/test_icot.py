"""iCoT against a slow definition: the published training loop, spelled out on single rows with its counters."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from recipe_cases import base_tokenizer, save_base
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import latent_sft.train.loop as loop
from latent_sft import cli
from latent_sft.config.load import load_config
from latent_sft.config.presets import resolve_config
from latent_sft.data.lengths import single
from latent_sft.data.prompts import build_spec, tokenize_record
from latent_sft.data.records import load_splits
from latent_sft.errors import ConfigError
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.graph import graph_of
from latent_sft.experiment.workspace import Experiment, Workspace
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.types import LatentSpec
from latent_sft.methods import MODELS, STAGES
from latent_sft.methods.cot import ExplicitModel
from latent_sft.methods.icot import AtRemoval, ICoTConfig, icot_batch, numbered, removed_at
from latent_sft.train.run import finish_stage, train_stage
from latent_sft.train.sampler import LengthBucketSampler, Phased, TokenBatchSampler

END, EOS = (5, 6), 1
SPEC = LatentSpec(think_ids=(4,), end_think_ids=END, eos_id=EOS, pad_id=0, vocab_size=29, top_k=4, max_answer_tokens=4)
ROWS = [
    {"id": "a", "prompt": [8, 9, 3, 4], "cot": [10, 11, 12, 13, 14], "answer": [20, EOS]},
    {"id": "b", "prompt": [8, 4], "cot": [15, 13], "answer": [21, 22, 23, EOS]},
    {"id": "c", "prompt": [8, 9, 9, 3, 2, 4], "cot": [], "answer": [20, EOS]},
    {"id": "d", "prompt": [9, 3, 4], "cot": [16, 17, 10, 18, 19, 12, 13], "answer": [24, 20, EOS]},
]


# ------------------------------------------------------------------------------------------------ the slow definition


def published(
    epochs: int, steps_per_epoch: int, per_epoch: float, beyond: float, longest: int
) -> Iterator[tuple[float, bool]]:
    """Yield what `src/train.py` does at each batch: tokens it schedules to remove, whether it makes a new optimizer."""
    each, counter, scheduled, gone = round(steps_per_epoch / per_epoch), 0, 0.0, False
    for _ in range(epochs):
        for _ in range(steps_per_epoch):
            before = scheduled
            if counter == each:
                scheduled, counter = scheduled + 1, 0
            counter += 1
            reset = scheduled > before and not gone
            if scheduled >= beyond:
                scheduled = math.inf
            gone = scheduled >= longest
            yield scheduled, reset


def sequence(row: dict, removed: int, side: str) -> tuple[list[int], int]:
    """Return `P, what is left of the CoT, E, A` token by token, and where the first labelled token stands."""
    ids = list(row["prompt"])
    for place, token in enumerate(row["cot"]):
        gone = place < removed if side == "left" else place >= len(row["cot"]) - removed
        if not gone:
            ids.append(token)
    return [*ids, *END, *row["answer"]], len(row["prompt"])


def mean_loss(lm: GPT2LMHeadModel, removed: list[int], side: str) -> torch.Tensor:
    """Return the mean over all labelled tokens of all rows, each row in a pass of its own."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, gone in zip(ROWS, removed, strict=True):
        ids, first = sequence(row, gone, side)
        logits = lm(torch.tensor([ids])).logits[0]
        for t in range(first, len(ids)):
            total = total - logits[t - 1].softmax(-1)[ids[t]].log()
            count += 1
    return total / count


# -------------------------------------------------------------------------------------------------------- the method


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, bos_token_id=1,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).double()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("removed", [[0, 0, 0, 0], [1, 1, 1, 1], [3, 2, 1, 6], [5, 50, 1, 1 << 20]])
def test_loss_and_gradients_equal_the_slow_definition(side, removed):
    rows = [{**row, "phase": gone} for row, gone in zip(ROWS, removed, strict=True)]
    model, lm = ExplicitModel(gpt2()), gpt2()
    batch = icot_batch(rows, SPEC, ICoTConfig(removal_side=side), loss_reduction="token")
    loss = model(**batch).loss_sums["ce"] / batch["count_ce"]
    expected = mean_loss(lm, removed, side)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.lm.named_parameters(), lm.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_a_row_without_a_phase_has_its_whole_cot():
    batch = icot_batch(ROWS, SPEC, ICoTConfig(), loss_reduction="token")
    assert batch["ids"][0].tolist()[:13] == [8, 9, 3, 4, 10, 11, 12, 13, 14, 5, 6, 20, EOS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_removal_touches_nothing_but_the_cot(side):
    for removed in range(12):
        rows = [{**row, "phase": removed} for row in ROWS]
        batch = icot_batch(rows, SPEC, ICoTConfig(removal_side=side), loss_reduction="token")
        for row, ids, kind in zip(ROWS, batch["ids"].tolist(), batch["kind"], strict=True):
            length = int((kind > 0).sum())
            tail = [*END, *row["answer"]]
            assert ids[: len(row["prompt"])] == row["prompt"]
            assert ids[length - len(tail) : length] == tail
            assert length == len(row["prompt"]) + max(0, len(row["cot"]) - removed) + len(tail)


# ------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("steps_per_epoch", "settings"),
    [
        (16, {"remove_per_epoch": 8}),
        (21, {"remove_per_epoch": 8}),  # a token every 3 steps: 2.6, rounded
        (10, {"remove_per_epoch": 0.5}),  # a token every other epoch
        (16, {"remove_per_epoch": 8, "remove_all_from": 5}),
        (6, {"remove_per_epoch": 6, "remove_all_from": 1}),
    ],
)
def test_the_schedule_and_its_resets_are_the_published_ones(steps_per_epoch, settings):
    config, longest, epochs = ICoTConfig(**settings), 11, 6
    callback = AtRemoval(steps_per_epoch, config)
    loader = SimpleNamespace(dataset=Phased(Dataset.from_list([{"cot": [1] * n} for n in (3, longest, 1)])))
    callback.on_begin(None, loader.dataset)
    beyond = config.remove_all_from or math.inf
    resets = 0
    for step, (scheduled, reset) in enumerate(
        published(epochs, steps_per_epoch, config.remove_per_epoch, beyond, longest)
    ):
        removed = removed_at(step, steps_per_epoch, config)
        assert (math.inf if removed == 1 << 20 else removed) == scheduled
        state = SimpleNamespace(global_step=step, best_metric=0.5, best_global_step=1, best_model_checkpoint="x")
        optimizer = SimpleNamespace(state={"moments": 1})
        callback.on_step(state, optimizer)
        assert (not optimizer.state, state.best_metric is None, state.best_global_step is None) == (reset,) * 3
        resets += reset
    assert 0 < resets <= longest


def test_the_published_settings_remove_eight_tokens_an_epoch():
    """808,000 rows, batch 32: a token every 3,156 steps; 46 tokens are gone in the sixth epoch."""
    config = ICoTConfig()
    assert [removed_at(epoch * 25_250, 25_250, config) for epoch in range(5)] == [0, 8, 16, 24, 32]
    assert (removed_at(3_155, 25_250, config), removed_at(3_156, 25_250, config)) == (0, 1)
    assert (removed_at(46 * 3_156 - 1, 25_250, config), removed_at(46 * 3_156, 25_250, config)) == (45, 46)


def test_examples_lack_further_tokens_geometrically():
    """P(0) = .982 at lambda 4; other draws at another step, row or seed, and no draw at all at infinity."""
    further = Counter(
        numbered(1 << 20, 10, 0, steps_per_epoch=10**9, config=ICoTConfig())(3, row) >> 20 for row in range(40_000)
    )
    for o in range(3):
        expected = 40_000 * (1 - math.exp(-4)) * math.exp(-4 * o)
        assert abs(further[o] - expected) < 4 * math.sqrt(expected * (1 - expected / 40_000)) + 1
    assert further[0] / 40_000 == pytest.approx(0.982, abs=0.003)

    def drawn(seed: int, step: int) -> list[int]:
        number = numbered(100, 10, seed, steps_per_epoch=10**9, config=ICoTConfig(removal_smoothing_lambda=0.1))
        return [number(step, row) for row in range(100)]

    assert drawn(0, 3) == drawn(0, 3) != drawn(0, 4) != drawn(1, 4)
    assert [number % 100 for number in drawn(0, 3)] == [*range(100)]
    assert len({number // 100 for number in drawn(0, 3)}) > 10
    plain = numbered(100, 10, 0, steps_per_epoch=8, config=ICoTConfig(removal_smoothing_lambda=math.inf))
    assert [plain(step, 7) for step in range(4)] == [7, 107, 207, 307]


@pytest.mark.parametrize(
    ("key", "value"),
    [("remove_per_epoch", 0.0), ("remove_all_from", -1), ("removal_smoothing_lambda", 0.0)],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"icot\.{key}"):
        ICoTConfig(**{key: value})


def test_training_cannot_stop_while_the_cot_is_still_written():
    train = dataclasses.replace(ICoTConfig().train, stop_at_accuracy=0.9)
    with pytest.raises(ConfigError, match=r"icot\.train\.stop_at_accuracy: got 0\.9, expected 0"):
        ICoTConfig(train=train)


# ------------------------------------------------------------------------------------------------------- in training

# 15 steps per epoch, a token every other step
SETTINGS = [
    "icot.train.enabled=true", "icot.train.max_steps=8", "icot.train.eval_every=4", "icot.train.save_every=2",
    "icot.train.eval_examples=2",
    "icot.removal_smoothing_lambda=0.5",
]  # fmt: skip


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def watched(patch: pytest.MonkeyPatch, act) -> None:
    """Call `act` with the examples of every batch that is made."""
    original = loop.with_ids

    def collate(rows, collate):
        act(rows)
        return original(rows, collate=collate)

    patch.setattr(loop, "with_ids", collate)


def test_a_killed_stage_goes_on_to_the_same_weights(tiny_config, tmp_path):
    """Killed in its sixth step, after the checkpoint of the fourth, both behind a removal."""

    class Killed(BaseException):
        pass

    def killed(self, batches):
        if self.state.global_step == 5:
            raise Killed
        return batches

    whole = train_stage(tiny_config(*SETTINGS, f"run_dir={tmp_path / 'whole'}"), "icot")
    config = tiny_config(*SETTINGS, f"run_dir={tmp_path / 'killed'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_prepared", killed)
        with pytest.raises(Killed):
            train_stage(config, "icot")
    step = train_stage(config, "icot")
    assert all(torch.equal(final(whole.directory)[name], value) for name, value in final(step.directory).items())
    assert logged(step.directory, "train/loss") == logged(whole.directory, "train/loss")
    assert step.results()["best_step"] == whole.results()["best_step"]


def test_how_a_step_is_cut_up_decides_nothing_that_is_removed(tiny_config, tmp_path):
    """The same examples, with the same tokens left out, at every step, in one micro-batch or in four."""
    found, losses = {}, {}
    for way, size, accumulation in (("whole", 8, 1), ("cut", 2, 4)):
        shown: list[tuple[str, int]] = []
        settings = [f"icot.train.micro_batch_size={size}", f"icot.train.gradient_accumulation_steps={accumulation}"]
        with pytest.MonkeyPatch.context() as patch:
            watched(patch, lambda rows, shown=shown: shown.extend((r["id"], r["phase"]) for r in rows))
            config = tiny_config(*SETTINGS, *settings, f"run_dir={tmp_path / way}")
            losses[way] = logged(train_stage(config, "icot").directory, "train/loss")
        found[way] = shown[: 8 * 8]  # the loader is a micro-batch ahead
    assert found["whole"] == found["cut"] and len({phase for _, phase in found["whole"]}) > 4
    assert losses["cut"] == pytest.approx(losses["whole"], rel=2e-4)


def test_processes_share_out_the_same_numbers():
    """Both samplers number the micro-batches of a step by the step, whoever takes them."""
    config = ICoTConfig(remove_per_epoch=5, removal_smoothing_lambda=math.inf)
    for sampler in (LengthBucketSampler([5] * 20, 4, 0), TokenBatchSampler(single(torch.full((20,), 5)), 5, 4, 0, "x")):
        sampler.number = numbered(20, 10, 0, steps_per_epoch=sampler.steps_per_epoch(), config=config)
        seen = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            seen += [n // 20 for item in sampler for n in (item if isinstance(item, list) else [item])]
        assert seen == [step for step in range(10) for _ in range(4)]


def test_a_longer_training_goes_on_with_the_same_schedule(tiny_config, tmp_path):
    short = [*SETTINGS, "icot.train.schedule=constant", "icot.train.max_tokens=400"]
    straight = train_stage(tiny_config(*short, f"run_dir={tmp_path / 'straight'}"), "icot")
    train_stage(tiny_config(*short, "icot.train.max_steps=5"), "icot")
    longer = train_stage(tiny_config(*short), "icot")
    assert logged(longer.directory, "train/loss") == logged(straight.directory, "train/loss")


def test_the_model_is_the_best_of_those_with_as_much_left_out(tiny_config, monkeypatch):
    """Accuracy falls as the CoT goes; a score from before the last removal does not count."""
    accuracies = iter([1.0, 0.75, 0.5, 0.25])
    monkeypatch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": next(accuracies)})
    step = train_stage(tiny_config(*SETTINGS, "icot.train.eval_every=2", "icot.train.micro_batch_size=4"), "icot")
    # 30 steps an epoch, a token every 4: steps 4 to 7 lack one token
    assert (step.results()["best_step"], step.results()["validation_accuracy"]) == (6, 0.5)


def test_nothing_is_left_out_of_a_slow_enough_schedule_which_is_cot_fine_tuning(tiny_config, tmp_path):
    slow = ["icot.remove_per_epoch=1e-6", "icot.removal_smoothing_lambda=.inf"]
    ours = train_stage(tiny_config(*slow, "icot.train.max_steps=4"), "icot").directory
    theirs = train_stage(tiny_config(), "cot").directory
    assert logged(ours, "train/loss") == logged(theirs, "train/loss")
    assert all(torch.equal(final(theirs)[name], value) for name, value in final(ours).items())


def test_it_starts_from_the_cot_stage_or_from_the_base_model(tiny_config):
    with pytest.raises(ConfigError, match=r"icot\.init: got 'cot', expected cot\.enabled=true"):
        tiny_config("icot.train.enabled=true", "icot.init=cot", "cot.enabled=false")
    work = Workspace(tiny_config("icot.init=cot"))
    assert work.source_of("icot").directory.name == "cot"
    assert Workspace(tiny_config()).source_of("icot") is None


def test_it_is_planned_evaluated_and_kept_out_of_exports(tiny_config):
    config = tiny_config(*SETTINGS, "icot.train.max_steps=4")
    assert "icot" in config.models() and "icot" not in config.exports()
    assert "icot" in graph_of(Experiment(config))
    train_stage(config, "icot")
    found = evaluate(config, ["icot"], ["test"])
    assert found["icot"]["test"]["num_examples"] == 12
    assert STAGES["icot"].thinker(SimpleNamespace(lm=None)).kind == "explicit" and not MODELS["icot"].reasons


def test_a_stopped_stage_can_be_ended_where_it_stands(tiny_config):
    config = tiny_config(*SETTINGS)
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, batches):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return batches

        patch.setattr(loop.TrainingLoop, "_prepared", stop)
        with pytest.raises(KeyboardInterrupt):
            train_stage(config, "icot")
    assert finish_stage(config, "icot").results()["ended_early"]


def test_an_empty_thought_ends_at_once():
    """A model that has learned to write `</think>` first writes no CoT, and thinks for no step."""
    lm, spec = gpt2(), dataclasses.replace(SPEC, end_think_ids=END[:1])
    with torch.no_grad():
        lm.transformer.ln_f.weight.zero_()
        lm.transformer.ln_f.bias.copy_(lm.lm_head.weight[END[0]])
        lm.lm_head.weight[END[0]] *= 9
    (decoded,) = solve(Thinker("explicit", lm), spec, ROWS[:1], batch_size=1, max_cot_tokens=9)
    assert (decoded.num_steps, decoded.thought_ids) == (0, [])


LINE = (
    "9 1 7 3 * 9 4 3 3||1 7 4 3 3 + 0 6 7 8 4 1 ( 1 3 2 2 8 1 ) + 0 0 7 5 1 1 1 ( 1 3 9 7 9 2 1 ) + 0 0 0 7 5 1 1 1"
    " #### 1 3 9 4 5 4 2 1"
)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Settings of the method's page: public files to evaluate on, generated problems to train on."""
    public = (Path(__file__).parents[1] / "fixtures/mult_4x4_valid_10.txt").read_text().splitlines(keepends=True)
    (tmp_path / "validation.txt").write_text("".join(public[:4]))
    (tmp_path / "test.txt").write_text(LINE + "\n")
    train = ["data.train=synthetic", "data.synthetic.task=multiplication", "data.synthetic.num_train=8"]
    return [*train, *(f"data.{split}={tmp_path / split}.txt" for split in ("validation", "test"))]


def test_the_recipe_writes_published_lines_as_published(files):
    """`Q <eos> CoT <eos> #### A <eos>`, with other delimiters."""
    config = load_config(resolve_config("icot_mult4"), files)
    tokenizer = base_tokenizer("gpt2")
    spec = build_spec(tokenizer, config.prompt, config.latent, len(tokenizer))
    splits = load_splits(config.data)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 4, 1)
    row = tokenize_record(tokenizer, spec, splits.test[0])
    assert tokenizer.decode(row["prompt"]) == "9 1 7 3 * 9 4 3 3<think>"
    cot = LINE.partition("||")[2].partition(" ####")[0]
    assert tokenizer.decode(row["cot"]) == cot and len(cot.split()) == 46  # a token each with GPT-2's merges
    assert tokenizer.decode(row["answer"]) == "1 3 9 4 5 4 2 1<|endoftext|>"
    assert [step for step in graph_of(Experiment(config)) if step in STAGES] == ["icot"]


@pytest.mark.slow
def test_the_recipe_runs_to_its_report(files, tmp_path):
    """On a GPT-2 of two layers: four steps per epoch, so that two epochs leave out eight tokens."""
    base = save_base("gpt2", tmp_path / "base")
    settings = [
        "icot.remove_per_epoch=4", "icot.train.epochs=2", "icot.train.micro_batch_size=2",
        "icot.train.global_batch_size=2",
        f"run_dir={tmp_path / 'run'}", f"model.name_or_path={base}",
    ]  # fmt: skip
    assert not cli.main(["run", "icot_mult4", *files, *settings])
    assert (tmp_path / "run/report/report.html").exists()
