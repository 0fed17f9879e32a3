"""Span term, suffix reconstruction and filler of stage 1 equal their slow definitions, loss and every gradient."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from datasets import Dataset
from models.test_exactness import (
    DEFAULTS,
    EXAMPLES,
    NORMALISATIONS,
    PUBLISHED,
    assert_same,
    gradients,
    random_labels,
    rows_of,
    stage1_model,
)
from reference import Example, Settings
from reference_spans import mux

from latent_sft.config.load import load_config
from latent_sft.data.collate import encoder_batch, stage1_batch, stage1_lengths
from latent_sft.errors import ConfigError
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.compare import jobs_of
from latent_sft.experiment.stores import store_latents
from latent_sft.experiment.workspace import Workspace
from latent_sft.method.spans import span_labels
from latent_sft.method.superposition import entropy
from latent_sft.method.types import Superposition
from latent_sft.methods import STAGES
from latent_sft.methods.latent_sft import LABELS, FadingSpans, Stage1Config
from latent_sft.models.stage1 import Stage1Model
from latent_sft.train.run import train_stage

REPEATS = [*EXAMPLES, Example(prompt=[8, 4], cot=[12, 11, 12, 12, 12], end_think=EXAMPLES[0].end_think, answer=[1])]


def with_filler(examples: list[Example], rate: int) -> list[Example]:
    """The same examples with an empty chunk in front: a marker right behind the prompt."""
    cut = [[0, *(len(piece) for piece in reference.pieces_of(e, rate))] for e in examples]
    return [dataclasses.replace(e, segment_lengths=lengths) for e, lengths in zip(examples, cut, strict=True)]


def drawn_cuts(batch: dict[str, torch.Tensor]) -> list[int]:
    """Latents in the decoder's half of every row."""
    return (batch["kind"] == 2).sum(1).tolist()


# ------------------------------------------------------------------------------------------------------------- filler


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
@pytest.mark.parametrize("settings", [DEFAULTS, PUBLISHED], ids=["defaults", "published"])
def test_a_filler_is_a_latent_of_the_prompt_alone(settings: Settings, loss_reduction: str) -> None:
    settings = dataclasses.replace(settings, rate=3, loss_reduction=loss_reduction)
    model = stage1_model(settings, tied=False)
    twin = copy.deepcopy(model)
    batch = stage1_batch(rows_of(EXAMPLES, 3), model.spec, loss_reduction=loss_reduction, filler=True)
    loss = model(**batch).loss_sums["ce"] / batch["count_ce"]
    loss.backward()
    expected = reference.stage1_loss(twin.encoder.model, twin.marker, twin.decoder, with_filler(EXAMPLES, 3), settings)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(twin))
    told = [[*e.cot, *e.end_think, *e.answer] for e in EXAMPLES]  # now the first chunk too
    assert Counter(batch["targets"].tolist()) == Counter(token for row in told for token in row)


@pytest.mark.parametrize("previous", [False, True])
def test_a_filler_does_not_depend_on_the_cot_and_changes_no_other_latent(previous: bool) -> None:
    model = stage1_model(DEFAULTS, tied=True, marker_input="previous" if previous else "learned")
    other = [dataclasses.replace(e, cot=[t % 7 + 9 for t in e.cot]) for e in EXAMPLES]
    plain = model.encode(encoder_batch(rows_of(EXAMPLES, 2), model.spec))
    ours, theirs = (model.encode(encoder_batch(rows_of(e, 2), model.spec, filler=True)) for e in (EXAMPLES, other))
    for b, example in enumerate(EXAMPLES):
        torch.testing.assert_close(ours.weights[b, 0], theirs.weights[b, 0])
        n = len(reference.pieces_of(example, 2))
        torch.testing.assert_close(ours.weights[b, 1 : n + 1], plain.weights[b, :n])
        assert torch.equal(ours.ids[b, 1 : n + 1], plain.ids[b, :n])


def test_a_filler_of_a_row_without_cot() -> None:
    row = {**rows_of(EXAMPLES, 2)[0], "cot": [], "segment_lengths": []}
    model = stage1_model(DEFAULTS, tied=True)
    batch = stage1_batch([row], model.spec, loss_reduction="token", filler=True, suffix=True, span_rho=0.7)
    out = model(**batch)
    assert batch["latent_mask"].sum() == 1 and batch["count_span"] == 0 and out.loss_sums["span"] == 0


# ------------------------------------------------------------------------------------------------------------- suffix


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
@pytest.mark.parametrize("filler", [False, True])
def test_suffix_loss_and_gradients(filler: bool, loss_reduction: str) -> None:
    settings = dataclasses.replace(DEFAULTS, loss_reduction=loss_reduction)
    for phase in range(3):
        model = stage1_model(settings, tied=False)
        twin = copy.deepcopy(model)
        rows = [{**row, "phase": phase} for row in rows_of(EXAMPLES, 2)]
        batch = stage1_batch(rows, model.spec, loss_reduction=loss_reduction, suffix=True, filler=filler)
        loss = model(**batch).loss_sums["ce"] / batch["count_ce"]
        loss.backward()
        examples = with_filler(EXAMPLES, 2) if filler else EXAMPLES
        halves = (twin.encoder.model, twin.marker, twin.decoder)
        expected = reference.suffix_loss(*halves, examples, drawn_cuts(batch), settings)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same(gradients(model), gradients(twin))


def suffix_loss_of(model: Stage1Model, row: dict[str, Any], label: Superposition) -> tuple[float, int]:
    batch = stage1_batch([row], model.spec, loss_reduction="sample", suffix=True, label_of=lambda *_: label)
    return model(**batch).loss_sums["ce"].item(), drawn_cuts(batch)[0]


def test_a_cut_leaves_out_what_lies_on_its_other_side() -> None:
    """Changing z_{I+1} or any token of the trace before b_I leaves the loss of cut I as it is; others do not."""
    model = stage1_model(DEFAULTS, tied=False)
    example = EXAMPLES[3]
    row, label = rows_of([example], 2)[0], random_labels([example], 2, 10)[0]
    seen = set()
    for phase in range(20):
        loss, cut = suffix_loss_of(model, {**row, "phase": phase}, label)
        if cut in seen:
            continue
        seen.add(cut)
        for place in range(4):
            weights = label.weights.clone()
            weights[place] = weights[place].flip(0)
            changed, _ = suffix_loss_of(model, {**row, "phase": phase}, Superposition(label.ids, weights))
            assert (changed == loss) == (place >= cut)
        for place in range(7):
            cot = [*row["cot"]]
            cot[place] = 25
            changed, _ = suffix_loss_of(model, {**row, "phase": phase, "cot": cot}, label)
            assert (changed == loss) == (place < 2 * cut)
    assert seen == {1, 2, 3, 4}


def test_the_mean_over_all_cuts_is_the_suffix_loss() -> None:
    """L_rec = (1/N) sum_I l_I, and every cut is as likely as another, whatever the rows beside it."""
    model = stage1_model(DEFAULTS, tied=False)
    row, label = rows_of([EXAMPLES[3]], 2)[0], random_labels([EXAMPLES[3]], 2, 10)[0]
    found = dict(suffix_loss_of(model, {**row, "phase": phase}, label)[::-1] for phase in range(30))
    drawn = Counter(
        drawn_cuts(stage1_batch([{**row, "phase": p}], model.spec, loss_reduction="token", suffix=True))[0]
        for p in range(400)
    )
    assert found.keys() == drawn.keys() == {1, 2, 3, 4}
    assert all(70 <= count <= 130 for count in drawn.values())
    mean = sum(drawn[cut] / 400 * loss for cut, loss in found.items())
    assert mean == pytest.approx(sum(found.values()) / 4, rel=0.05)
    rows = [{**r, "phase": 3} for r in rows_of(EXAMPLES, 2)]
    apart = [drawn_cuts(stage1_batch([r], model.spec, loss_reduction="token", suffix=True))[0] for r in rows]
    assert drawn_cuts(stage1_batch(rows, model.spec, loss_reduction="token", suffix=True)) == apart


def test_labels_begin_right_behind_the_last_latent() -> None:
    row = {**rows_of([EXAMPLES[3]], 2)[0], "phase": 1}
    batch = stage1_batch([row], stage1_model(DEFAULTS, tied=True).spec, loss_reduction="token", suffix=True)
    cut = drawn_cuts(batch)[0]
    assert batch["target_index"].tolist() == list(range(len(row["prompt"]) + cut - 1, batch["ids"].shape[1]))
    assert batch["targets"].tolist() == [*row["cot"][2 * cut :], *EXAMPLES[3].end_think, *EXAMPLES[3].answer]
    assert batch["position"].tolist() == [[*range(batch["ids"].shape[1])]]


@pytest.mark.parametrize("filler", [False, True])
@pytest.mark.parametrize("suffix", [False, True])
def test_no_batch_is_longer_than_its_lengths_say(suffix: bool, filler: bool) -> None:
    rows, spec, widest = rows_of(EXAMPLES, 2), stage1_model(DEFAULTS, tied=True).spec, 0
    lengths = stage1_lengths(Dataset.from_list(rows), spec, suffix, filler)
    for phase in range(30):
        shown = [{**row, "phase": phase} for row in rows]
        batch = stage1_batch(shown, spec, loss_reduction="token", suffix=suffix, filler=filler)
        widest = max(widest, batch["ids"].shape[1], batch["encoder_ids"].shape[1])
    assert widest == lengths.width(lengths.parts.amax(0)).item()


# ---------------------------------------------------------------------------------------------------------- span term


@pytest.mark.parametrize("filler", [False, True])
@pytest.mark.parametrize("change", [{}, {"projection": "head"}, {"temperature": 4.0}, {"rate": 3}], ids=str)
def test_span_term_and_gradients(change: dict[str, Any], filler: bool) -> None:
    settings = dataclasses.replace(DEFAULTS, **change)
    model = stage1_model(settings, tied=False)
    twin = copy.deepcopy(model)
    rows = rows_of(REPEATS, settings.rate)
    batch = stage1_batch(rows, model.spec, loss_reduction="token", span_rho=0.7, filler=filler)
    out = model(**batch)
    loss = out.loss_sums["span"] / batch["count_span"]
    loss.backward()
    examples = with_filler(REPEATS, settings.rate) if filler else REPEATS
    halves = (twin.encoder.model, twin.marker, twin.decoder)
    expected = reference.span_loss(*halves, examples, lambda piece: mux(piece, 0.7), settings)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(twin))
    told, count = out.observed["span_kl"]
    assert (told / count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_span_term_is_never_negative_and_leaves_cross_entropy_alone() -> None:
    words = span_labels([[3, 4, 3, 3], [5], [6, 6]], 0.9, 4)
    masses = [mux([3, 4, 3, 3], 0.9), {5: 1.0}, {6: 1.0}]
    expected = [-sum(m * torch.tensor(float(m)).log().item() for m in word.values()) for word in masses]
    assert entropy(words).tolist() == pytest.approx(expected, abs=1e-6)
    model = stage1_model(DEFAULTS, tied=True)
    rows = rows_of(EXAMPLES, 2)
    plain = model(**stage1_batch(rows, model.spec, loss_reduction="token"))
    drawn = model(**stage1_batch(rows, model.spec, loss_reduction="token", span_rho=0.5))
    assert torch.equal(plain.loss_sums["ce"], drawn.loss_sums["ce"]) and set(plain.loss_sums) == {"ce"}
    assert drawn.loss_sums["span"] > 0


def test_the_span_term_fades() -> None:
    model = stage1_model(DEFAULTS, tied=True)
    batch = stage1_batch(rows_of(EXAMPLES, 2), model.spec, loss_reduction="token", span_rho=0.7)
    whole = model(**batch)
    callback = FadingSpans(model, 0.5)
    shares = []
    for step in (0, 25, 49, 50, 99):
        callback.on_step(SimpleNamespace(global_step=step, max_steps=100), None)
        shares.append(model.span_share)
    assert shares == pytest.approx([1.0, 0.5, 0.02, 0.0, 0.0])
    gone = model(**batch)
    assert gone.loss_sums["span"] == 0 and gone.observed["span_kl"][0] == whole.observed["span_kl"][0]


def test_options_are_off_by_default() -> None:
    config = Stage1Config()
    assert config.layout == {"suffix": False, "filler": False} and config.span_weight == 0


# --------------------------------------------------------------------------------------------------------- experiment

ALL = ["stage1.first_chunk=filler", "stage1.reconstruct=suffix", "stage1.span_weight=0.5", "stage1.span_until=0.5"]
UNION = ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def test_how_a_step_is_cut_up_changes_nothing(tiny_config, tmp_path) -> None:
    found = {}
    for way, size, accumulation in (("whole", 8, 1), ("cut", 2, 4)):
        config = tiny_config(
            *ALL, *UNION, f"run_dir={tmp_path / way}", f"stage1.union.micro_batch_size={size}",
            f"stage1.union.gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        folder = train_stage(config, "stage1-union").directory
        found[way] = [logged(folder, f"train/{name}") for name in ("loss", "loss_ce", "loss_span", "span_kl")]
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4) and len(ours) == 4
    loss, ce, span, kl = found["whole"]
    assert loss == pytest.approx([c + 0.5 * s for c, s in zip(ce, span, strict=True)], rel=1e-5)
    assert span == pytest.approx([share * value for share, value in zip([1, 0.5, 0, 0], kl, strict=True)], rel=1e-5)


def test_a_run_with_all_of_it(tiny_config) -> None:
    """Three phases, labels and student: a latent more than chunks, and no span term where the encoder is frozen."""
    config = tiny_config(*ALL, "eval.splits=[test]")
    work = Workspace(config)
    for name in ("stage1-encoder", "stage1-decoder", "stage1-union"):
        folder = train_stage(config, name, work).directory
        assert bool(logged(folder, "train/loss_span")) == (name != "stage1-decoder")
    store_latents(work, "stage2")
    label_of = work.setup("stage2").latents
    assert label_of is not None
    rows = work.data["train"].select(range(10)).to_list()
    assert [len(label_of(r["id"], r["hash"]).ids) for r in rows] == [len(r["segment_lengths"]) + 1 for r in rows]
    lengths = STAGES["stage2"].lengths(work.data["train"].select(range(10)), work.setup("stage2"))
    collate = STAGES["stage2"].batch(work.setup("stage2"))
    assert [collate([row])["ids"].shape[1] for row in rows] == lengths.width(lengths.parts).tolist()
    train_stage(config, "stage2", work)
    found = evaluate(config, models=["stage1", "latent-sft"])
    assert found["stage1"]["test"]["num_examples"] == 12


def test_what_is_off_leaves_a_run_what_it_was(tiny_config) -> None:
    plain = Workspace(tiny_config()).step("stage1-union").inputs
    assert not {"reconstruct", "span"} & plain.keys() and "first_chunk" not in plain["latent"]
    same = tiny_config("stage1.span_rho=0.5", "stage1.span_until=0.5")  # nothing is drawn to a code word
    assert Workspace(same).step("stage1-union").inputs == plain
    steps = [Workspace(tiny_config(option)) for option in ALL[:3]]
    assert len({work.step("stage1-union").fingerprint for work in steps}) == 3
    assert "first_chunk" in steps[0].store_step(LABELS).inputs["latent"]


@pytest.mark.parametrize("setting", ["span_weight=-1", "span_rho=0", "span_until=0"])
def test_settings_out_of_range(setting: str, tiny_config) -> None:
    with pytest.raises(ConfigError, match=f"stage1.{setting.split('=')[0]}: got"):
        tiny_config(f"stage1.{setting}")


@pytest.mark.parametrize("name", ["rates_arithmetic", "compare_high_rates"])
def test_a_rate_starts_from_the_student_of_the_one_before(name: str, tmp_path: Path) -> None:
    jobs = jobs_of(name, [f"run_dir={tmp_path}", "seed=3", "compare.seeds=[3]"])
    chained = [job for job in jobs if job.config.stage1.union.start_from]
    assert len(chained) >= 2 and load_config(name).compare.jobs == 1  # or they would not run in order
    for job in chained:
        before = jobs[jobs.index(job) - 1]
        assert job.config.stage1.union.start_from == str(before.directory / "stage2")
