"""SIM-CoT equals a slow definition, step by step and row by row, that shares nothing with the package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.thinking import END, EOS, EXAMPLES, HIDDEN, SPEC, assert_same, gradients, llama, rows_of
from reference_distill import Example
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from latent_sft.cli import main
from latent_sft.config.load import load_config
from latent_sft.errors import ConfigError, DataError, TrainingError
from latent_sft.forecast import given_examples, load_of, measure, plan_setup
from latent_sft.inference.solve import solve
from latent_sft.method.types import ThoughtSpec
from latent_sft.methods import STAGES
from latent_sft.methods.coconut import CoconutConfig, CoconutModel, coconut_batch
from latent_sft.methods.common import thinker_of
from latent_sft.methods.self_distill import SelfDistillConfig, SelfDistillModel, distill_batch
from latent_sft.methods.sim_cot import SimCotModel, with_steps
from latent_sft.models.thoughts import Thoughts
from latent_sft.train.run import train_stage

NAMES = ("simcot-codi", "codi")
OPTIONS = (
    "sim_cot.codi.num_latents=2",
    "sim_cot.codi.iterations=2",
    "sim_cot.coconut.max_stage=2",
    "sim_cot.coconut.init=base",
    "sim_cot.coconut.stage_share=0.3",
)
NINE = Example([8, 9, 4], [[10 + k, 12, 20 + k % 3] for k in range(9)], list(END), [21, EOS])


# the slow definition: one row, one latent, one step at a time, by whole passes of the Hugging Face models


def joined(steps: list[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


def latents_of(lm: nn.Module, project: Any, prompt: list[int], count: int) -> list[Tensor]:
    """The first `count` latents `[D]`: each is the state at the end of a pass over everything before it."""
    fed = [lm.get_input_embeddings()(torch.tensor(prompt))]
    found: list[Tensor] = []
    for _ in range(count):
        states = lm.model(inputs_embeds=torch.cat(fed)[None]).last_hidden_state[0]
        found.append(project(states[-1]))
        fed.append(found[-1][None])
    return found


def cost(lm: nn.Module, decoder: nn.Module, read: list[Tensor], step: list[int], first: int) -> Tensor:
    """Cross-entropy, summed, of a step and its end behind the latents it is read from."""
    target = torch.tensor([*step, EOS])
    inputs = torch.cat([torch.stack(read), lm.get_input_embeddings()(torch.tensor(step, dtype=torch.long))])
    at = torch.arange(first, first + len(inputs))[None]
    logits = decoder(inputs_embeds=inputs[None], position_ids=at).logits[0]
    return functional.cross_entropy(logits[len(read) - 1 :], target, reduction="sum")


def on_codi(model: SimCotModel, examples: list[Example], num_latents: int) -> Tensor:
    """Published: per slot the mean over tokens of the batch, then the mean over slots that have any."""
    lm, slots = model.lm, {}
    for e in examples:
        steps = e.steps[:-1]
        if len(steps) > num_latents + 1:
            steps = [*steps[:num_latents], joined(steps[num_latents:])]
        z = latents_of(lm, model.thoughts.projection, e.prompt, num_latents + 1)
        for k, step in enumerate(steps):
            slots.setdefault(k, []).append((cost(lm, model.decoder, [z[k]], step, 0), len(step) + 1))
    means = [sum(c for c, _ in costs) / sum(n for _, n in costs) for costs in slots.values()]
    return sum(means) / len(means)


def on_coconut(model: SimCotModel, examples: list[Example], stage: int, most: int, each: int) -> Tensor:
    """Published: per slot the sum over tokens and the mean over rows, then the mean over slots."""
    lm, slots, here = model.lm, {}, min(stage, most)
    for e in examples:
        steps = list(e.steps)
        while len(steps) < here:
            steps.append(e.answer[:-1])
        if len(steps) > most:
            steps = [*steps[: most - 1], joined(steps[most - 1 :])]
        z = latents_of(lm, lambda h: h, e.prompt, here * each)
        for k in range(here):
            read = z[k * each : (k + 1) * each]
            slots.setdefault(k, []).append(cost(lm, model.decoder, read, steps[k], 1))
    return sum(sum(costs) / len(costs) for costs in slots.values()) / len(slots)


def codi_settings(num_latents: int = 2) -> SelfDistillConfig:
    return SelfDistillConfig(num_latents=num_latents, iterations=num_latents)


def codi_model(settings: SelfDistillConfig) -> SimCotModel:
    spec = ThoughtSpec(num_latents=settings.num_latents, iterations=settings.iterations, projection=True)
    torch.manual_seed(3)
    thoughts = Thoughts(spec, torch.randn(HIDDEN, dtype=torch.float64))
    return SimCotModel(SelfDistillModel(llama(), thoughts, SPEC, settings), llama(1), 0)


def codi_rows(rows: list[dict], settings: SelfDistillConfig) -> dict[str, Tensor]:
    spec = ThoughtSpec(num_latents=settings.num_latents, iterations=settings.iterations, projection=True)
    options = {"loss_reduction": "token", "drop_last_step": settings.drop_last_step}
    return with_steps(rows, lambda rows: distill_batch(rows, SPEC, spec, **options), settings, EOS)


def coconut_model(config: CoconutConfig) -> SimCotModel:
    spec = ThoughtSpec(num_latents=config.num_latents, iterations=config.num_latents)
    student = CoconutModel(llama(), Thoughts(spec, torch.zeros(HIDDEN, dtype=torch.float64)), SPEC)
    return SimCotModel(student, llama(1), config.latents_per_step)


def coconut_rows(examples: list[Example], stage: int, config: CoconutConfig) -> dict[str, Tensor]:
    rows = [{**row, "phase": stage} for row in rows_of(examples)]
    return with_steps(rows, lambda rows: coconut_batch(rows, SPEC, config, loss_reduction="token"), config, EOS)


def step_loss(model: SimCotModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss_sums["step"] / batch["count_step"]


@pytest.mark.parametrize("num_latents", [1, 2, 6])
def test_on_codi_step_loss_and_gradients_equal_the_slow_definition(num_latents):
    settings, examples = codi_settings(num_latents), [*EXAMPLES, NINE]
    model, reference = codi_model(settings), codi_model(settings)
    reference.lm.set_attn_implementation("eager")
    found = step_loss(model, codi_rows(rows_of(examples), settings))
    expected = on_codi(reference, examples, num_latents)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found > 0
    every = gradients(model, found)
    assert_same(every, gradients(reference, expected))
    assert all(
        every[name].abs().max() > 0 for name in ("student.thoughts.projection.1.weight", "decoder.lm_head.weight")
    )


@pytest.mark.parametrize(("stage", "most", "each"), [(1, 2, 2), (2, 2, 1), (2, 3, 2), (4, 3, 2)])
def test_on_coconut_step_loss_and_gradients_equal_the_slow_definition(stage, most, each):
    config, examples = CoconutConfig(max_stage=most, latents_per_step=each), [*EXAMPLES, NINE]
    model, reference = coconut_model(config), coconut_model(config)
    reference.lm.set_attn_implementation("eager")
    found = step_loss(model, coconut_rows(examples, stage, config))
    expected = on_coconut(reference, examples, stage, most, each)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model, found), gradients(reference, expected))


def test_the_student_has_the_losses_it_has_alone():
    settings = codi_settings()
    model, batch = codi_model(settings), codi_rows(rows_of(EXAMPLES), settings)
    both, alone = model(**batch).loss_sums, model.student(**batch).loss_sums
    assert {name: both[name].item() for name in alone} == {name: value.item() for name, value in alone.items()}


def test_positions_count_from_0_on_codi_and_from_1_on_coconut():
    """A Llama sees differences alone; a table of positions (GPT-2) does not."""
    config, settings = CoconutConfig(max_stage=2), codi_settings()
    for model, batch, first in (
        (codi_model(settings), codi_rows(rows_of(EXAMPLES), settings), 0),
        (coconut_model(config), coconut_rows(EXAMPLES, 2, config), 1),
    ):
        seen: list[Tensor] = []
        model.decoder.model.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        model(**batch)
        assert [ids.tolist() for ids in seen[0]] == [[*range(first, first + seen[0].shape[1])]] * len(seen[0])


def test_nine_steps_fill_seven_slots():
    settings = SelfDistillConfig(num_latents=6, iterations=6, drop_last_step=False)
    batch = codi_rows(rows_of([NINE]), settings)
    assert batch["step_slot"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch["step_ids"][-1].tolist() == [*joined(NINE.steps[6:]), EOS]
    assert batch["count_step"] == 34 and batch["count_slots"].tolist() == [4, 4, 4, 4, 4, 4, 10]


def test_a_row_of_fewer_steps_writes_its_answer_on_coconut():
    config = CoconutConfig(max_stage=3)
    batch = coconut_rows([EXAMPLES[2]], 3, config)
    assert [ids[: len(ids)] for ids in batch["step_ids"].tolist()] == [[11, 10, EOS], [20, EOS, EOS], [20, EOS, EOS]]
    without = CoconutConfig(max_stage=3, pad_latents=False)
    assert coconut_rows([EXAMPLES[2]], 3, without)["step_slot"].tolist() == [0]


def test_a_batch_without_a_step_still_runs_the_decoder():
    config, settings = CoconutConfig(max_stage=2), codi_settings()
    for model, batch in (
        (coconut_model(config), coconut_rows(EXAMPLES, 0, config)),
        (codi_model(settings), codi_rows(rows_of([EXAMPLES[2]]), settings)),
    ):
        calls: list[int] = []
        model.decoder.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert model(**batch).loss_sums["step"].item() == 0 and calls == [1]
        assert len(batch["step_targets"]) == 0 and batch["count_step"] == 0 and not batch["count_slots"].any()


def test_without_its_decoder_a_model_answers_the_same():
    model = codi_model(codi_settings()).eval()
    rows = [{"prompt": e.prompt} for e in EXAMPLES]
    before = solve(thinker_of(model), SPEC, rows, batch_size=4, max_cot_tokens=4)
    del model.decoder
    after = solve(thinker_of(model), SPEC, rows, batch_size=4, max_cot_tokens=4)
    assert [row.answer_ids for row in before] == [row.answer_ids for row in after]


def test_the_planner_counts_the_decoder():
    config = load_config(None, [*OPTIONS, "codi.num_latents=2", "model.lora.rank=2", "model.dtype=bfloat16"])
    backbone, examples = measure(config, 99), given_examples(config, 8, (4, 9, 2))
    setups = [plan_setup(config, name, examples) for name in NAMES]
    both, alone = (STAGES[name].parameters(backbone, setup) for name, setup in zip(NAMES, setups, strict=True))
    assert both.trained - alone.trained == backbone.size
    assert both.trained_bytes - alone.trained_bytes == 4 * backbone.size
    # the step that is not the last one has 8 tokens, behind a latent; its end is a label too
    both, alone = (load_of(name, setup, examples) for name, setup in zip(NAMES, setups, strict=True))
    assert both.tokens - alone.tokens == 1 + 8
    assert both.labels - alone.labels == 32 * (8 + 1)


def test_a_cot_whose_steps_are_not_known_is_refused():
    row = {**rows_of([EXAMPLES[0]])[0], "step_lengths": []}
    with pytest.raises(DataError, match="row 0: its steps are not parts of its CoT"):
        codi_rows([row], codi_settings())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sim_cot.weight=0", r"sim_cot\.weight"),
        ("sim_cot.decoder=lora", r"sim_cot\.decoder.*model\.lora\.rank"),
        ("sim_cot.codi.iterations=0", r"sim_cot\.codi\.iterations"),
        ("sim_cot.coconut.max_stage=0", r"sim_cot\.coconut\.max_stage"),
        ("sim_cot.coconut.uniform_prob=2", r"sim_cot\.coconut\.uniform_prob"),
    ],
)
def test_values_out_of_range_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override, "sim_cot.codi.train.enabled=true"])


# training


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


@pytest.mark.parametrize("name", ["simcot-codi", "simcot-coconut"])
def test_accumulation_gives_the_losses_of_one_large_batch(tiny_config, tmp_path, name):
    """Cut into four micro-batches and with activations computed again; slots are counted over all of them."""
    found, section = {}, STAGES[name].section
    for way, batch, accumulation, checkpointing in (("whole", 8, 1, "false"), ("cut", 2, 4, "true")):
        config = tiny_config(
            f"run_dir={tmp_path / way}",
            *OPTIONS,
            f"{section}.max_steps=2",
            f"{section}.micro_batch_size={batch}",
            f"{section}.gradient_accumulation_steps={accumulation}",
            f"{section}.gradient_checkpointing={checkpointing}",
        )
        found[way] = train_stage(config, name).directory
    for tag in ("train/loss", "train/grad_norm", "train/loss_ce", "train/loss_step"):
        whole, cut = logged(found["whole"], tag), logged(found["cut"], tag)
        assert len(whole) == 2, tag
        assert cut == pytest.approx(whole, rel=2e-4, abs=1e-6), tag
    assert min(logged(found["whole"], "train/loss_step")) > 0


def test_the_decoder_is_trained_in_float32_beside_adapters_and_left_behind(tiny_config, tmp_path):
    config = tiny_config(*OPTIONS, "model.dtype=bfloat16", "model.lora.rank=2")
    step = train_stage(config, "simcot-codi")
    kept = load_file(next(step.directory.glob("checkpoint-*")) / "model.safetensors")
    decoder = {name: value for name, value in kept.items() if name.startswith("decoder.")}
    assert "decoder.model.embed_tokens.weight" in decoder and {value.dtype for value in decoder.values()} == {
        torch.float32
    }
    assert not any("lora" in name for name in decoder)
    assert {path.name for path in step.final.iterdir()} >= {"model.safetensors", "thoughts.safetensors"}
    assert not any("decoder" in name for name in load_file(step.final / "model.safetensors"))


def test_the_decoder_may_be_trained_by_adapters(tiny_config):
    step = train_stage(tiny_config(*OPTIONS, "model.lora.rank=2", "sim_cot.decoder=lora"), "simcot-codi")
    kept = load_file(next(step.directory.glob("checkpoint-*")) / "model.safetensors")
    assert all("lora" in name for name in kept if name.startswith("decoder."))


def test_traces_of_a_single_step_end_the_stage(tiny_config, tmp_path):
    """Prose on one line is one step, the last, which is left out: the loss would be 0 without a word."""
    rows = [{"problem": f"{n} and 1", "cot": f"we add {n} and 1", "answer": str(n)} for n in range(40)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        *OPTIONS,
        f"data.train={tmp_path / 'prose.jsonl'}",
        f"data.validation={tmp_path / 'prose.jsonl'}",
        "data.test=",
        "sim_cot.codi.train.max_steps=30",
        "sim_cot.codi.train.eval_every=30",
        "sim_cot.codi.train.micro_batch_size=2",
    )
    with pytest.raises(TrainingError, match=r"first 20 optimizer steps.*sim_cot\.codi\.drop_last_step=false"):
        train_stage(config, "simcot-codi")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "kept"))
    settings = dataclasses.replace(config.sim_cot, codi=dataclasses.replace(config.sim_cot.codi, drop_last_step=False))
    other = dataclasses.replace(config, sim_cot=settings)
    assert min(logged(train_stage(other, "simcot-codi").directory, "train/loss_step")) > 0


@pytest.mark.slow
def test_from_the_command_line_to_an_export(tiny_config, tmp_path, capsys):
    from latent_sft.config.load import to_yaml

    off = ("no_cot", "cot", "stage1.encoder", "stage1.decoder", "stage1.union", "stage2")
    config = tiny_config(
        *OPTIONS,
        "eval.splits=[test]",
        *(f"{section}.enabled=false" for section in off),
        *(f"sim_cot.{base}.train.enabled=true" for base in ("codi", "coconut")),
    )
    (tmp_path / "experiment.yaml").write_text(to_yaml(config))
    assert main(["run", str(tmp_path / "experiment.yaml")]) == 0
    run = tmp_path / "run"
    for name, folder in (("simcot-codi", "export"), ("simcot-coconut", "export-simcot-coconut")):
        assert (run / "eval" / name / "test").is_dir()
        assert not any("decoder" in tensor for tensor in load_file(run / folder / "model.safetensors"))
    assert "SIM-CoT" in (run / "export" / "README.md").read_text()
