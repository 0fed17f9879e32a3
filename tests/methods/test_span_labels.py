"""Span labels as a method: cuts, batches, training, decoding and export, against the slow definitions."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import reference
import torch
from models.test_exactness import END, EOS, EXAMPLES, VOCAB, assert_same, gradients, llama, make_spec
from reference import PUBLISHED
from reference_spans import mux

from latent_sft import cli
from latent_sft.data.collate import stage1_batch
from latent_sft.data.lengths import count_tokens
from latent_sft.errors import ConfigError, DataError
from latent_sft.evaluation.agreement import span_agreement
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.workspace import Workspace
from latent_sft.export.checkpoint import export_run
from latent_sft.inference.generate import Decoded, generate
from latent_sft.inference.show import as_table, load
from latent_sft.inference.solve import Policy, Thinker
from latent_sft.method.spans import SpanThinking
from latent_sft.method.types import LatentSpec, SpanCode
from latent_sft.methods import STAGES
from latent_sft.methods.common import drawn_anew
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.methods.span_labels import (
    SpansConfig,
    boundary_of,
    span_lengths,
    spans_batch,
    spans_lengths,
    with_own_latents,
)
from latent_sft.models.stage2 import Stage2Model
from latent_sft.train.run import train_stage

SPEC = make_spec(PUBLISHED)
NEVER = lambda before, after: (True, False)  # noqa: E731
ROWS = [
    {
        "id": str(number),
        "hash": f"{number:016x}",
        "prompt": example.prompt,
        "cot": example.cot,
        "step_lengths": [3, len(example.cot) - 3] if len(example.cot) > 3 else [len(example.cot)],
        "answer": example.answer,
    }
    for number, example in enumerate(EXAMPLES)
]


def lengths_of(row: dict, config: SpansConfig, phase: int = 0) -> list[int]:
    return span_lengths(row, config, NEVER, random.Random(f"{phase}/{row['id']}"))


# --------------------------------------------------------------------------------------------------------------- cuts


def test_cuts_by_count_and_by_step():
    row = {"id": "x", "cot": list(range(11)), "step_lengths": [2, 9]}
    assert lengths_of(row, SpansConfig(cuts="fixed", rate=4)) == [4, 4, 3]
    assert lengths_of(row, SpansConfig(cuts="step", longest=9)) == [2, 9]
    assert lengths_of(row, SpansConfig(cuts="step", longest=4)) == [2, 3, 3, 3]  # 9 tokens in equal parts
    with pytest.raises(DataError, match="row x: its steps are not parts of its CoT"):
        lengths_of({**row, "step_lengths": []}, SpansConfig(cuts="step"))
    assert lengths_of({**row, "step_lengths": []}, SpansConfig(cuts="fixed", rate=8)) == [8, 3]


def test_random_cuts_depend_on_seed_step_and_row_alone():
    config = SpansConfig(cuts="random", num_spans=3, longest=8)
    row = {"id": "x", "cot": list(range(12)), "step_lengths": []}
    found = [tuple(lengths_of(row, config, phase)) for phase in range(30)]
    assert len(set(found)) > 10 and all(sum(cut) == 12 and max(cut) <= 8 for cut in found)
    assert found == [tuple(lengths_of(row, config, phase)) for phase in range(30)]
    number = drawn_anew(100, 10, seed=7)
    assert number(3, 42) % 100 == 42 and number(3, 42) == drawn_anew(100, 999, seed=7)(3, 42)
    assert len({number(step, 42) for step in range(20)} | {drawn_anew(100, 10, seed=8)(3, 42)}) == 21


class Pieces:
    """A tokenizer of given pieces."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_semantic_cuts_leave_numbers_and_words_whole():
    tokenizer = Pieces("<<", "12", "3", "+", "4", ">>", " So", " mul", "tiply", ".", " 7", "5")
    boundary = boundary_of(tokenizer)  # type: ignore[arg-type]
    assert [boundary(*pair)[0] for pair in ((0, 1), (1, 2), (2, 3), (6, 7), (7, 8), (8, 10), (10, 11))] == [
        True, False, True, True, False, True, False,
    ]  # fmt: skip
    assert boundary(5, 6) == (True, True) and boundary(9, 10) == (True, True) and boundary(3, 4) == (True, False)

    def cut(ids: list[int], rate: int, longest: int) -> list[str]:
        config = SpansConfig(cuts="semantic", rate=rate, longest=longest)
        lengths = span_lengths({"id": "x", "cot": ids, "step_lengths": []}, config, boundary, random.Random(0))
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return [tokenizer.decode(ids[s : s + n]) for s, n in zip(starts, lengths, strict=True)]

    text = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert cut(text, 6, 8) == ["<<123+4>>", " So multiply. 75"]  # at the end of the equation
    assert cut(text, 4, 8) == ["<<123+", "4>>", " So multiply.", " 75"]
    assert cut(text[6:], 5, 8) == [" So multiply.", " 75"]
    assert cut([1, 2, 2, 2, 2, 2, 2], 2, 3) == ["1233", "333", "3"]  # a number longer than `longest` is cut after all


def test_words_between_spaces_may_be_parted(tiny_config):
    boundary = boundary_of(Workspace(tiny_config()).tokenizer)
    three, five = (Workspace(tiny_config()).tokenizer.convert_tokens_to_ids(t) for t in "35")
    assert boundary(three, five)[0]  # written `3 5`


# -------------------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("config", [
    SpansConfig(cuts="fixed", rate=3, rho=0.7), SpansConfig(cuts="step", rho=0.5, longest=4),
    SpansConfig(cuts="fixed", rate=1),
    SpansConfig(cuts="random", num_spans=2, rho=0.9),
], ids=["fixed", "step", "one", "random"])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_reference(config, tied):
    rows = [{**row, "phase": 5, "cot": [*row["cot"][:-1], row["cot"][0]]} for row in ROWS]  # with repeats
    model = Stage2Model(llama(3, tied), SPEC)
    twin = copy.deepcopy(model)
    batch = spans_batch(rows, SPEC, config, NEVER, loss_reduction="token")
    sums = model(**batch).loss_sums
    ce, kl = sums["ce"] / batch["count_ce"], sums["kl"] / batch["count_kl"]
    (ce + kl).backward()
    examples, labels = [], []
    for row, example in zip(rows, EXAMPLES, strict=True):
        lengths = lengths_of(row, config, 5)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        labels.append([mux(row["cot"][s : s + n], config.rho) for s, n in zip(starts, lengths, strict=True)])
        examples.append(dataclasses.replace(example, cot=row["cot"]))
    expected, expected_ce, expected_kl = reference.stage2_loss(twin.lm, examples, labels, PUBLISHED)
    expected.backward()
    assert ce.item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-5, abs=1e-6)
    assert_same(gradients(model), gradients(twin))


def test_one_token_per_span_is_cot_fine_tuning():
    """At r = 1 the KL is the cross-entropy of the CoT and what is fed is the CoT."""
    config = SpansConfig(cuts="fixed", rate=1, longest=1)
    model = Stage2Model(llama(3, True), SPEC)
    sums = model(**spans_batch(ROWS, SPEC, config, NEVER, loss_reduction="token")).loss_sums
    explicit = explicit_batch(ROWS, SPEC, with_cot=True, loss_reduction="token")
    plain = ExplicitModel(model.lm)(**explicit).loss_sums["ce"]
    # the KL is a mean over each row's latents: weight the rows back
    by_row = 0.0
    for row in ROWS:
        one = spans_batch([row], SPEC, config, NEVER, loss_reduction="token")
        by_row += model(**one).loss_sums["kl"].item() * len(row["cot"])
    assert sums["ce"].item() + by_row == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("batch", ["spans", "stage 1"])
def test_a_row_without_a_cot_is_one_clear_error(batch):
    rows = [ROWS[0], {**ROWS[1], "id": "b", "cot": [], "step_lengths": [], "segment_lengths": []}]
    rows[0] = {**rows[0], "segment_lengths": [len(rows[0]["cot"])]}
    with pytest.raises(DataError, match="row b: field 'cot': empty; expected a chain of thought"):
        if batch == "spans":
            spans_batch(rows, SPEC, SpansConfig(cuts="fixed"), NEVER, loss_reduction="token")
        else:
            stage1_batch(rows, SPEC, loss_reduction="token")


def test_rows_do_not_depend_on_the_batch():
    config, model = SpansConfig(cuts="fixed", rate=3), Stage2Model(llama(3, True), SPEC)
    together = model(**spans_batch(ROWS, SPEC, config, NEVER, loss_reduction="token")).loss_sums
    for term in ("ce", "kl"):
        alone = sum(
            model(**spans_batch([row], SPEC, config, NEVER, loss_reduction="token")).loss_sums[term] for row in ROWS
        )
        torch.testing.assert_close(together[term], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cuts", ["fixed", "step", "random", "semantic"])
def test_planned_lengths_are_those_of_batches(cuts, tiny_config):
    work = Workspace(tiny_config())
    data, config = work.data["train"], SpansConfig(cuts=cuts, rate=4, longest=5, num_spans=3)
    boundary = boundary_of(work.tokenizer)
    lengths = spans_lengths(data, work.spec, config, boundary)
    found = lengths.width(lengths.parts).tolist()
    for number, row in enumerate(data.select(range(20))):
        batch = spans_batch([row], work.spec, config, boundary, loss_reduction="token")
        assert batch["ids"].shape[1] == found[number] if cuts != "random" else batch["ids"].shape[1] <= found[number]
    assert (count_tokens(data, "cot") > 0).all()


# ------------------------------------------------------------------------------------------------- scheduled sampling


def own(model: Stage2Model, rows: list[dict], share: float, config: SpansConfig, spec: LatentSpec = SPEC) -> dict:
    batch = {**spans_batch(rows, spec, config, NEVER, loss_reduction="token"), "row_ids": [row["id"] for row in rows]}
    policy = Policy(module=model, thinker=Thinker("spans", model.lm, mixture=config.code), spec=spec, seed=3, step=7)
    with torch.no_grad():
        return with_own_latents(batch, policy, share=share, code=config.code)


@pytest.mark.parametrize("snap", ["none", "nearest"])
def test_what_is_fed_is_what_the_model_makes_of_the_place_behind_the_labels(snap):
    """Against one pass per row, its logits turned into latents by the thinker that decodes."""
    config, model = SpansConfig(cuts="fixed", rate=2, longest=3, snap=snap), Stage2Model(llama(3, True).float(), SPEC)
    plain = spans_batch(ROWS, SPEC, config, NEVER, loss_reduction="token")
    found = own(model, ROWS, 0.6, config)
    assert torch.equal(found["latent_ids"], plain["latent_ids"])  # targets stay
    thinking, taken = SpanThinking(SPEC, torch.device("cpu"), mixture=config.code), 0
    for b, row in enumerate(ROWS):
        draws = random.Random(f"3/7/{row['id']}")
        labels = [mux(row["cot"][s : s + 2], config.rho) for s in range(0, len(row["cot"]), 2)]
        table = model.lm.get_input_embeddings().weight
        inputs = [*table[row["prompt"]], *(sum(w * table[t] for t, w in label.items()) for label in labels)]
        logits = model.lm(inputs_embeds=torch.stack(inputs)[None]).logits[0, len(row["prompt"]) - 1 : -1]
        expected, _ = thinking.step(logits, thinking.start([0] * len(logits)))
        for n in range(len(labels)):
            masses = torch.zeros(VOCAB).index_add(0, found["fed_ids"][b, n], found["fed_weights"][b, n])
            if draws.random() < 0.6:
                taken += 1
                wanted = torch.zeros(VOCAB).index_add(0, expected.ids[n], expected.weights[n])
            else:
                wanted = torch.zeros(VOCAB)
                wanted[list(labels[n])] = torch.tensor(list(labels[n].values()))
            if END[0] not in logits[n].topk(1).indices:  # where it would end thinking there is no latent to compare
                torch.testing.assert_close(masses, wanted, rtol=1e-3, atol=1e-4)
    assert 2 < taken < 9


def test_a_share_of_none_is_none_and_rows_do_not_depend_on_the_batch():
    config, model = SpansConfig(cuts="fixed", rate=2, longest=3), Stage2Model(llama(3, True).float(), SPEC)
    plain = spans_batch(ROWS, SPEC, config, NEVER, loss_reduction="token")
    assert torch.equal(own(model, ROWS, 0.0, config)["fed_weights"], plain["latent_weights"])
    together = own(model, ROWS, 0.5, config)
    loss = model(**{k: v for k, v in together.items() if k != "row_ids"}).loss_sums
    alone = [own(model, [row], 0.5, config) for row in ROWS]
    each = [model(**{k: v for k, v in batch.items() if k != "row_ids"}).loss_sums for batch in alone]
    for term in ("ce", "kl"):
        torch.testing.assert_close(loss[term], sum(part[term] for part in each), rtol=1e-4, atol=1e-4)
    assert loss["kl"] != model(**plain).loss_sums["kl"]


def test_training_on_own_latents_does_not_depend_on_how_a_step_is_cut(tiny_config, tmp_path):
    found = {}
    for way, size, accumulation in (("whole", 8, 1), ("cut", 2, 4)):
        config = tiny_config(
            *SETTINGS, "spans.own_latents=0.5", f"spans.train.micro_batch_size={size}", f"run_dir={tmp_path / way}",
            f"spans.train.gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        found[way] = logged(train_stage(config, "latent-spans").directory, "train/loss")
    assert found["cut"] == pytest.approx(found["whole"], rel=2e-3) and len(found["whole"]) == 6
    plain = train_stage(tiny_config(*SETTINGS, f"run_dir={tmp_path / 'plain'}"), "latent-spans")
    assert logged(plain.directory, "train/loss") != found["whole"]


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("snap", ["none", "nearest", "likeliest", "greedy"])
def test_a_batch_decodes_as_single_problems(snap):
    model = llama(5, True).float().eval()
    spec = dataclasses.replace(SPEC, max_latents=6, max_answer_tokens=4)
    prompts = [example.prompt for example in EXAMPLES]
    options = {"thinker": "spans", "mixture": SpanCode(rho=0.7, longest=3, snap=snap)}
    together = generate(model, spec, prompts, **options)
    for prompt, row in zip(prompts, together, strict=True):
        (alone,) = generate(model, spec, [prompt], **options)
        assert (row.spans, row.answer_ids, row.num_steps) == (alone.spans, alone.answer_ids, alone.num_steps)
        assert row.thought_ids == [token for span in row.spans for token in span]
        assert all(1 <= len(span) <= 3 for span in row.spans) and len(row.spans) == row.num_steps
    assert any(row.num_steps for row in together)


def test_with_spans_of_one_token_decoding_is_explicit():
    model = llama(5, True).float().eval()
    spec = dataclasses.replace(SPEC, end_think_ids=END[:1], exclude_end=True, max_latents=6, max_answer_tokens=4)
    prompts = [example.prompt for example in EXAMPLES]
    ours = generate(model, spec, prompts, thinker="spans", mixture=SpanCode(rho=0.7, longest=1))
    plain = generate(model, spec, prompts, thinker="explicit", max_cot_tokens=6)
    assert [row.answer_ids for row in ours] == [row.answer_ids for row in plain]
    assert [row.thought_ids for row in ours] == [row.thought_ids for row in plain]


def test_agreement_of_spans_place_by_place():
    def sample(*spans: list[int]) -> Decoded:
        return Decoded(
            latent_ids=None, latent_weights=None, thought_ids=[], answer_ids=[], num_steps=len(spans),
            forward_passes=0, finished=True, spans=list(spans),
        )  # fmt: skip

    references = {"a": [[1, 2], [3]], "b": [[1, 2], [3]], "c": [[4, 5, 4]], "d": [[6]]}
    rows = [{"id": name, "cot": [0]} for name in references] + [{"id": "e", "cot": []}]
    decoded = [sample([1, 2], [3]), sample([2, 1], [3], [9]), sample([4, 4, 5]), sample(), sample([8])]
    found = span_agreement(decoded, rows, lambda row: references[row["id"]])
    assert found["spans_exact"] == pytest.approx(3 / 6) and found["spans_multiset"] == pytest.approx(5 / 6)
    assert found["thought_exact"] == 1 / 4 and found["first_wrong_latent_mean"] == 1.0
    assert found["spans_by_position"] == {
        "1": {"exact": 0.25, "num_examples": 4},
        "2": {"exact": 1.0, "num_examples": 2},
    }
    # a thought that goes on too long is wrong behind the reference's last span
    longer = span_agreement([sample([6], [6])], [{"id": "d", "cot": [0]}], lambda row: references["d"])
    assert (longer["spans_exact"], longer["thought_exact"], longer["first_wrong_latent_mean"]) == (1.0, 0.0, 2.0)
    assert span_agreement(decoded[4:], rows[4:], lambda row: []) == {}


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(("change", "message"), [
    ({"rho": 0.0}, "spans.rho: got 0.0, expected 0 < rho <= 1"),
    ({"rate": 9}, "spans.rate: got 9, expected 1 to spans.longest=8"),
    ({"own_latents": 1.5}, "spans.own_latents: got 1.5, expected a share from 0 to 1"),
    ({"longest": 70}, "spans.longest: got 70"), ({"num_spans": 0}, "spans.num_spans"),
    ({"longest": 12}, r"spans.snap: got 'nearest', expected none or greedy, where spans.longest=12 is above 9"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SpansConfig(**change)
    assert SpansConfig(longest=12, snap="greedy").code == SpanCode(rho=0.7, longest=12, snap="greedy")


def test_labels_that_cannot_be_told_apart_are_reported(tiny_config, caplog):
    work = Workspace(tiny_config("model.dtype=bfloat16", "model.lora.rank=2", "spans.rho=0.9", "spans.init=base"))
    STAGES["latent-spans"].model(work.setup("latent-spans"))
    assert "two spans of 8 tokens can have labels that differ by 1.3e-04 only, less than bfloat16" in caplog.text


# --------------------------------------------------------------------------------------------------------- experiment

SETTINGS = ["spans.train.enabled=true", "spans.init=base", "spans.longest=6", "spans.train.max_steps=6"]


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


@pytest.mark.parametrize("cuts", ["step", "random"])
def test_how_a_step_is_cut_up_changes_nothing(tiny_config, tmp_path, cuts):
    found = {}
    for way, size, accumulation in (("whole", 8, 1), ("cut", 2, 4)):
        config = tiny_config(
            *SETTINGS, f"spans.cuts={cuts}", f"spans.train.micro_batch_size={size}", f"run_dir={tmp_path / way}",
            f"spans.train.gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        found[way] = logged(train_stage(config, "latent-spans").directory, "train/loss")
    assert found["cut"] == pytest.approx(found["whole"], rel=2e-4) and len(found["whole"]) == 6


def test_snapping_is_chosen_when_problems_are_solved(tiny_config, tmp_path, capsys):
    """One training; evaluated with and without; the thought is text; exported, it decodes as in the package."""
    off = tiny_config(*SETTINGS, "spans.snap=none", "eval.splits=[test]")
    trained = train_stage(off, "latent-spans")
    plain = evaluate(off, models=["latent-spans"])["latent-spans"]["test"]
    snapped = tiny_config(*SETTINGS, "spans.snap=nearest", "eval.splits=[test]")
    assert train_stage(snapped, "latent-spans").results() == trained.results()  # finished already
    found = evaluate(snapped, models=["latent-spans"])["latent-spans"]["test"]
    keys = {"spans_exact", "spans_multiset", "thought_exact", "spans_by_position"}
    assert keys <= plain.keys() and keys <= found.keys()
    work = Workspace(snapped)
    for snap in ("none", "nearest"):
        config = {"none": off, "nearest": snapped}[snap]
        out = export_run(config, "latent-spans", tmp_path / snap)
        reasoner = load(out)
        assert reasoner.thinker.kind == "spans"
        problem = work.splits.test[0].problem
        solution = reasoner.generate(problem)
        assert [latent.span for latent in solution.latents if latent.span]
        assert "stands for" in as_table(solution) and json.loads(solution.to_json())["thought"] == solution.thought
    card = (out / "README.md").read_text()
    assert "a span of up to 6 tokens of written reasoning" in card and "Span labels" in card
    assert cli.main(["generate", str(out), problem]) in (0, None)
    assert "stands for" in capsys.readouterr().out


def test_the_bundled_code_decodes_alike(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(*SETTINGS, "latent.max_latents=5")
    step = train_stage(config, "latent-spans")
    out = export_run(config, "latent-spans", tmp_path / "out")
    module = ModuleType("exported_spans")
    monkeypatch.setitem(sys.modules, "exported_spans", module)
    code = (out / "custom_generate" / "generate.py").read_text()
    assert "HOW = SpanCode(rho=0.7, longest=6, snap='nearest')" in code
    exec(code, module.__dict__)
    work, reasoner = Workspace(config), load(step.final)
    prompts = [row["prompt"] for row in work.data["test"].select(range(4))]
    for snap in (None, "none", "greedy"):
        how = reasoner.thinker.mixture if snap is None else dataclasses.replace(reasoner.thinker.mixture, snap=snap)
        for prompt in prompts:
            (row,) = generate(reasoner.thinker.lm, reasoner.spec, [prompt], thinker="spans", mixture=how)
            found = module.generate(
                torch.tensor([prompt]),
                model=reasoner.thinker.lm,
                return_latents=True,
                **({"snap": snap} if snap else {}),
            )
            assert found.latent_ids[0].tolist() == row.latent_ids.tolist()
            assert found.thoughts[0].tolist() == row.thought_ids
            tail = [*work.spec.end_think_ids, *row.answer_ids, *([work.spec.eos_id] if row.finished else [])]
            assert found.sequences[0].tolist() == [*prompt, *tail]
    with pytest.raises(ValueError, match="snap: got 'soft', expected none, nearest"):
        module.generate(torch.tensor(prompts[:1]), model=reasoner.thinker.lm, snap="soft")


def test_it_starts_from_the_cot_stage_or_the_base_model(tiny_config):
    with pytest.raises(ConfigError, match=r"spans\.init: got 'cot', expected cot\.enabled=true"):
        tiny_config("spans.train.enabled=true", "spans.init=cot", "cot.enabled=false")
    work = Workspace(tiny_config("spans.init=cot"))
    assert work.source_of("latent-spans").directory.name == "cot"
    assert Workspace(tiny_config("spans.init=base")).source_of("latent-spans") is None


def test_a_trained_model_writes_its_label(tiny_config):
    """Fitted to one row, the KL goes to zero: a label is reachable, repeats included."""
    work = Workspace(tiny_config())
    row, config = work.data["train"][0], SpansConfig(cuts="fixed", rate=6, longest=6, rho=0.5)
    torch.manual_seed(0)
    model = Stage2Model(llama(0, True).float(), SPEC)
    rows = [{**row, "cot": [t % VOCAB for t in row["cot"]], "prompt": [8, 4], "answer": [9, EOS]}]
    batch = spans_batch(rows, SPEC, config, NEVER, loss_reduction="token")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(**batch).loss_sums["kl"]
        loss.backward()
        optimizer.step()
    assert 0 <= loss.item() < 0.02
