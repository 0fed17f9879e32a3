"""CoT2 against slow definitions: mixtures as labels, losses, gradients, decoding, bad rows."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models.test_exactness import END, EOS, VOCAB, assert_same, gradients, llama, make_spec
from reference import PUBLISHED
from torch import Tensor

from latent_sft.config.schema import DataConfig, SyntheticConfig
from latent_sft.data.formats import Record
from latent_sft.data.records import load_splits
from latent_sft.data.synthetic import generate as generate_data
from latent_sft.errors import ConfigError, DataError
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.workspace import Workspace
from latent_sft.export.checkpoint import export_run
from latent_sft.inference.generate import generate
from latent_sft.inference.show import load
from latent_sft.method.types import Mixtures
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.methods.cot2 import Cot2Config, Cot2Model, cot2_batch, cot2_lengths
from latent_sft.train.run import train_stage

SPEC = make_spec(PUBLISHED, noise_scale=1.0)  # noise is of other methods
PROMPTS = ([8, 9, 3, 4], [8, 4], [8, 9, 9, 3, 2, 4])
ANSWERS = ([20, EOS], [21, 22, 23, EOS], [EOS])
MIXTURES: list[list[dict[int, float]]] = [
    [{10: 0.5, 11: 0.5}, {12: 0.25, 13: 0.25, 14: 0.5}],
    [{15: 1.0}, {16: 0.75, 5: 0.25}],  # 5 begins `</think>`
    [{10: 1 / 3, 17: 2 / 3}, {18: 0.125, 19: 0.125, 20: 0.25, 21: 0.5}],
]


def rows_of(mixtures: list[list[dict[int, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "id": str(number), "hash": "", "prompt": prompt, "cot": [next(iter(step)) for step in steps],
            "answer": answer, "mixture_ids": [[*step] for step in steps],
            "mixture_weights": [[*step.values()] for step in steps],
        }
        for number, (prompt, answer, steps) in enumerate(zip(PROMPTS, ANSWERS, mixtures, strict=True))
    ]  # fmt: skip


def slow_losses(lm: Any, row: dict[str, Any], own: bool) -> tuple[list[Tensor], list[Tensor]]:
    """KL of every latent and cross-entropy of every token behind them: a pass from the first token on for each."""
    table = lm.get_input_embeddings().weight
    inputs = [table[token] for token in row["prompt"]]

    def predicted() -> Tensor:
        return torch.log_softmax(lm(inputs_embeds=torch.stack(inputs)[None], use_cache=False).logits[0, -1], 0)

    divergences, entropies = [], []
    for ids, masses in zip(row["mixture_ids"], row["mixture_weights"], strict=True):
        logs = predicted()
        divergences.append(sum(m * (math.log(m) - logs[v]) for v, m in zip(ids, masses, strict=True)))
        fed = enumerate(logs.exp()) if own else zip(ids, masses, strict=True)
        inputs.append(sum(mass * table[token] for token, mass in fed))
    for token in [*END, *row["answer"]]:
        entropies.append(-predicted()[token])
        inputs.append(table[token])
    return divergences, entropies


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("own", [False, True], ids=["hard_teacher", "soft_teacher"])
def test_losses_and_gradients_are_those_of_the_slow_definition(own, reduction, tied):
    model = Cot2Model(llama(3, tied), SPEC, Mixtures(num_latents=2), own)
    twin, rows = copy.deepcopy(model), rows_of(MIXTURES)
    batch = cot2_batch(rows, SPEC, 2, loss_reduction=reduction)
    sums = model.train()(**batch).loss_sums
    ce, kl = sums["ce"] / batch["count_ce"], sums["kl"] / batch["count_kl"]
    (ce + kl).backward()
    found = [slow_losses(twin.lm, row, own) for row in rows]
    if reduction == "token":  # 2 latents, 3 tokens of </think>, and the answers'
        count = 3 * (2 + 3) + 2 + 4 + 1
        expected_kl, expected_ce = (sum(sum(part) for part in parts) / count for parts in zip(*found, strict=True))
    else:
        sizes = [2 + 3 + len(answer) for answer in ANSWERS]
        expected_kl, expected_ce = (
            sum(sum(part) / size for part, size in zip(parts, sizes, strict=True)) / 3
            for parts in zip(*found, strict=True)
        )
    (expected_ce + expected_kl).backward()
    assert ce.item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-5)
    assert_same(gradients(model), gradients(twin))


def test_one_trace_is_cot_fine_tuning():
    """Mixtures of single tokens: the same loss and gradients, those of the embeddings included."""
    rows = rows_of([[{10: 1.0}, {12: 1.0}], [{15: 1.0}, {16: 1.0}], [{17: 1.0}, {10: 1.0}]])
    ours = Cot2Model(llama(3, False), SPEC, Mixtures(num_latents=2), False)
    plain = ExplicitModel(copy.deepcopy(ours.lm))
    for reduction in ("token", "sample"):
        batch = cot2_batch(rows, SPEC, 2, loss_reduction=reduction)
        sums = ours(**batch).loss_sums
        loss = sums["ce"] / batch["count_ce"] + sums["kl"] / batch["count_kl"]
        explicit = explicit_batch(rows, SPEC, with_cot=True, loss_reduction=reduction)
        expected = plain(**explicit).loss_sums["ce"] / explicit["count_ce"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        ours.zero_grad(), plain.zero_grad(), loss.backward(), expected.backward()
        assert_same(gradients(ours), gradients(plain))


# ----------------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def slow_decode(lm: Any, prompt: list[int], steps: int, most: int) -> tuple[list[Tensor], list[int]]:
    table = lm.get_input_embeddings().weight
    inputs = [table[token] for token in prompt]

    def logits() -> Tensor:
        return lm(inputs_embeds=torch.stack(inputs)[None], use_cache=False).logits[0, -1]

    latents, answer = [], []
    for _ in range(steps):
        latents.append(torch.softmax(logits(), 0))
        inputs.append(latents[-1] @ table)
    inputs += [table[token] for token in END]
    while len(answer) < most and EOS not in answer:
        answer.append(int(logits().argmax()))
        inputs.append(table[answer[-1]])
    return latents, [token for token in answer if token != EOS]


def test_it_thinks_in_its_whole_softmax_always_as_many_steps():
    """Whatever the spec says: top-k, temperature, `</think>` left out, limits. A batch decodes as single rows."""
    spec = make_spec(PUBLISHED, top_k=3, decode_temperature=0.5, exclude_end=True, max_latents=1, max_answer_tokens=4)
    lm = llama(5, True).float().eval()
    decoded = generate(lm, spec, PROMPTS, thinker="mixtures", mixture=Mixtures(num_latents=4))
    for prompt, row in zip(PROMPTS, decoded, strict=True):
        latents, answer = slow_decode(lm, prompt, 4, 4)
        assert row.num_steps == 4 and row.answer_ids == answer
        assert row.latent_ids.shape == (4, VOCAB) and row.latent_ids.sort().values.tolist() == [[*range(VOCAB)]] * 4
        dense = torch.zeros(4, VOCAB).scatter_(1, row.latent_ids, row.latent_weights)
        torch.testing.assert_close(dense, torch.stack(latents), rtol=1e-4, atol=1e-6)
        assert row.forward_passes == 4 + len(END) + len(answer) + row.finished


# --------------------------------------------------------------------------------------------------------------- data

MNNS = [
    "data.synthetic.task=mnns", "model.tiny.tokenizer=space", "data.limit_train=40", "data.limit_validation=8",
    "data.limit_test=8", "cot2.train.enabled=true", "cot2.train.max_steps=6", "cot.enabled=false", "stage1={}",
    "no_cot.enabled=false", *(f"stage1.{part}.enabled=false" for part in ("encoder", "decoder", "union")),
    "stage2.enabled=false",
]  # fmt: skip


def of_problem(problem: str, **settings: Any) -> Record:
    splits = generate_data(SyntheticConfig(task="mnns", **settings)).values()
    return next(record for records in splits for record in records if record.problem == problem)


def test_the_published_example_and_entropies():
    eighth = dict.fromkeys(("S10", "S6", "S4", "S-4", "S-6", "S-10"), 1 / 8)
    assert of_problem("D5 D3 D2 D4").mixtures == (
        {"S5": 1 / 2, "S-5": 1 / 2},
        {"S8": 1 / 4, "S2": 1 / 4, "S-2": 1 / 4, "S-8": 1 / 4},
        {**eighth, "S0": 1 / 4},
    )
    assert of_problem("D5 D3 D2 D4").answer == "S0" and of_problem("D2 D1 D9 D3").answer == "S3"
    two = {"S-5": 1 / 2, "S5": 1 / 2}, {"S-2": 1 / 2, "S2": 1 / 2}, {"S-4": 1 / 2, "S4": 1 / 2}
    assert of_problem("D5 D3 D2 D4", path_budget=2, path_order="beam").mixtures == two
    assert of_problem("D5 D3 D2 D4", path_budget=3).mixtures[1] == {"S-2": 1 / 3, "S2": 1 / 3, "S8": 1 / 3}
    records = [r for part in generate_data(SyntheticConfig(task="mnns")).values() for r in part]
    for step, expected in enumerate((0.693, 1.348, 1.941)):
        entropies = [-sum(m * math.log(m) for m in record.mixtures[step].values()) for record in records]
        assert sum(entropies) / 6561 == pytest.approx(expected, abs=0.0005)


def test_rows_hold_tokens_and_masses(tiny_config):
    work = Workspace(tiny_config(*MNNS))
    rows = list(work.data["train"])
    assert len(rows) == 40 and work.data["train"].features["mixture_ids"].feature.feature.dtype == "int32"
    for row, record in zip(rows, work.splits.train, strict=True):
        texts = [work.tokenizer.convert_ids_to_tokens(step) for step in row["mixture_ids"]]
        found = [dict(zip(*pair, strict=True)) for pair in zip(texts, row["mixture_weights"], strict=True)]
        assert found == list(record.mixtures)  # shares of eight are exact in float32
    lengths = cot2_lengths(work.data["train"], work.spec, 3)
    batch = cot2_batch(rows, work.spec, 3, loss_reduction="token")
    assert lengths.width(lengths.parts).tolist() == [batch["ids"].shape[1]] * 40
    assert load_splits(DataConfig()).train[0].mixtures == ()


def write(path: Path, *mixtures: Any) -> str:
    rows = [{"problem": f"a {n}", "cot": "x y", "answer": "b", "mixtures": m} for n, m in enumerate(mixtures)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [{"x": 0.25, "y": 0.75}, {"y": 1}]


@pytest.mark.parametrize(("bad", "message"), [
    ("x", "got str 'x'; expected a list with an object {token: mass} for each step"),
    ([], "got list []; expected a list"), ([{}], r"got list [{}]; expected a list"),
    ([{"x": 1}, {"x": 0.5, "y": -0.5}], "step 2: 'y' has -0.5; expected a mass > 0"),
    ([{"x": "1"}], "step 1: 'x' has '1'; expected a mass > 0"), ([{"x": True}], "step 1: 'x' has True"),
    ([{"x": math.nan}], "step 1: 'x' has nan"), ([{"x": math.inf}], "step 1: its masses sum to inf; expected 1"),
    ([{"x": 0.5, "y": 0.4}], "step 1: its masses sum to 0.9; expected 1"),
])  # fmt: skip
def test_bad_mixtures_are_named_with_file_and_line(tmp_path, bad, message):
    source = write(tmp_path / "train.jsonl", GOOD, bad)
    other = write(tmp_path / "validation.jsonl", bad)  # a problem is solved without them
    config = {"train": source, "validation": other, "test": ""}
    with pytest.raises(DataError) as error:
        assert load_splits(DataConfig(**config)).train
    assert str(error.value).startswith(f"{source}:2: field 'mixtures': ") and message in str(error.value)
    splits = load_splits(DataConfig(**config, on_error="skip"))
    assert [record.mixtures for record in splits.train] == [({"x": 0.25, "y": 0.75}, {"y": 1.0})]
    assert len(splits.validation) == 1 and splits.skipped["train"][0]["line"] == 2


def test_texts_that_are_no_single_token_and_rows_of_other_lengths(tmp_path, tiny_config):
    def train(**more: Any) -> None:
        source = write(tmp_path / "train.jsonl", *more["mixtures"])
        settings = ["cot2.num_latents=2", f"data.train={source}", f"data.validation={source}", "data.test="]
        settings += ["cot2.train.micro_batch_size=1"]
        train_stage(tiny_config(*MNNS, *settings, f"run_dir={tmp_path / more['name']}"), "cot2")

    with pytest.raises(DataError, match="row 'train-2': field 'mixtures': 'x y' is 2 tokens; expected a single token"):
        train(name="a", mixtures=[GOOD, [{"x y": 1.0}, {"y": 1.0}]])
    with pytest.raises(DataError, match="row 'train-1': field 'mixtures': 'z' is unknown to this tokenizer"):
        train(name="b", mixtures=[[{"z": 1.0}, {"y": 1.0}]])
    with pytest.raises(DataError, match=r"row train-2: field 'mixtures': 3 steps; expected cot2.num_latents=2"):
        train(name="c", mixtures=[GOOD, [*GOOD, {"x": 1}]])
    with pytest.raises(DataError, match=r"row train-1: field 'mixtures': 0 steps; expected cot2.num_latents=2"):
        train(name="d", mixtures=[None])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"cot2.num_latents: got 0, expected an integer >= 1"):
        Cot2Config(num_latents=0)
    with pytest.raises(ConfigError, match=r"data.synthetic.path_budget: got -1, expected 0 \(all\) or a number"):
        SyntheticConfig(path_budget=-1)


# --------------------------------------------------------------------------------------------------------- experiment


def logged(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("inputs", ["hard_teacher", "soft_teacher"])
def test_how_a_step_is_cut_up_changes_nothing(tiny_config, tmp_path, inputs):
    found = {}
    for way, size, accumulation in (("whole", 8, 1), ("cut", 2, 4)):
        config = tiny_config(
            *MNNS, f"cot2.inputs={inputs}", f"cot2.train.micro_batch_size={size}", f"run_dir={tmp_path / way}",
            f"cot2.train.gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        found[way] = logged(train_stage(config, "cot2").directory)
    assert found["cut"] == pytest.approx(found["whole"], rel=2e-4) and len(found["whole"]) == 6


def test_from_training_to_an_export_that_decodes_alike(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(*MNNS, "eval.splits=[test]")
    train_stage(config, "cot2")
    found = evaluate(config, models=["cot2"])["cot2"]["test"]
    assert found["reasoning_steps_mean"] == 3
    out = export_run(config, "cot2", tmp_path / "out")
    reasoner, work = load(out), Workspace(config)
    assert reasoner.thinker.kind == "mixtures" and reasoner.thinker.mixture == Mixtures(num_latents=3)
    assert reasoner.generate("D5 D3 D2 D4").num_steps == 3
    module = ModuleType("exported_mixtures")
    monkeypatch.setitem(sys.modules, "exported_mixtures", module)
    exec((out / "custom_generate" / "generate.py").read_text(), module.__dict__)
    prompt = work.data["test"][0]["prompt"]
    (row,) = generate(reasoner.thinker.lm, reasoner.spec, [prompt], thinker="mixtures", mixture=Mixtures(num_latents=3))
    exported = module.generate(torch.tensor([prompt]), model=reasoner.thinker.lm, return_latents=True)
    assert exported.latent_ids[0].tolist() == row.latent_ids.tolist() and exported.thoughts is None
    with pytest.raises(ValueError, match="max_latents: not available"):
        module.generate(torch.tensor([prompt]), model=reasoner.thinker.lm, max_latents=2)
    card = (out / "README.md").read_text()
    assert "thinks in 3 latent tokens: each is its softmax over the whole vocabulary" in card and "CoT2" in card
    assert "`min_latents`" not in card
