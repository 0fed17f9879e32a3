"""LOTUS against a slow definition: whole sequences through the plain model, one example at a time, nothing kept."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from inference.test_thoughts import PROMPTS, model_of, thoughts_of
from inference.test_thoughts import SPEC as DECODED
from models.thinking import EXAMPLES, HIDDEN, SPEC, assert_same, gradients, llama, rows_of
from reference_distill import Example
from reference_thinkers import states_and_logits
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import latent_sft.train.loop as loop
from latent_sft.errors import ConfigError, DataError
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.graph import graph_of
from latent_sft.experiment.workspace import Experiment, Workspace
from latent_sft.export.checkpoint import export_run
from latent_sft.inference.generate import generate
from latent_sft.method.types import ThoughtSpec
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.methods.lotus import (
    ForgetBest,
    LotusConfig,
    LotusModel,
    lotus_batch,
    lotus_lengths,
    numbered,
    stage_at,
    step_targets,
)
from latent_sft.models.logits import head
from latent_sft.models.thought_passes import read, read_on, think_at_once, use_thoughts
from latent_sft.models.thoughts import Thoughts, load_thoughts
from latent_sft.train.run import train_stage

# unequal prompts and CoTs, steps longer than a block and shorter, more steps than blocks, and none
ALL = [*EXAMPLES, Example([9, 8, 3, 4], [], [5, 6], [22, 1]), Example([7, 4], [[10], [11], [12, 13]], [5, 6], [23, 1])]


# ------------------------------------------------------------------------------------------------ the slow definition


def slow(lm, start: Tensor, example: Example, stage: int, config: LotusConfig) -> tuple[Tensor, Tensor, int, int]:
    """Return the sums `ce` and `step` of one example and how many tokens each counts."""
    table = lm.get_input_embeddings().weight
    prompt = [table[token] for token in example.prompt]
    count = config.latents_per_block * stage
    loops = 0
    while loops < config.iterations * stage / config.num_blocks:
        loops += 1
    inputs, seen = [start] * count, []
    for t in range(loops + 1):
        states, logits = states_and_logits(lm, [*prompt, *inputs])
        seen.append(logits)
        if t < loops:
            inputs = [start + states[len(prompt) + i] for i in range(count)]
    last_stage = stage == config.num_blocks
    rest = [] if last_stage else [token for step in example.steps[stage:] for token in step]
    tail = [*rest, *example.end, *example.answer]
    logits = states_and_logits(lm, [*prompt, *inputs, *(table[token] for token in tail)])[1]
    unlearned = 0 if stage == 0 else 1 if rest else len(example.end)
    ce, behind = start.new_zeros(()), len(prompt) + count
    for j in range(unlearned, len(tail)):
        ce = ce - logits[behind + j - 1].softmax(-1)[tail[j]].log()
    step, scored = start.new_zeros(()), 0
    for b, tokens in enumerate(example.steps[:stage]):
        for j, token in enumerate(tokens):
            place = b * config.latents_per_block + j
            if place > count:
                continue
            own = -(-config.iterations * (b + 1) // config.num_blocks)
            for t in {"last": [loops], "own": [own], "every": list(range(1, loops + 1)) or [0]}[config.step_pass]:
                step = step - seen[t][len(prompt) - 1 + place].softmax(-1)[token].log()
                scored += 1
    return ce, step, len(tail) - unlearned, scored


@torch.no_grad()
def slow_decode(model, start: Tensor, count: int, loops: int, prompt: list[int]) -> tuple[Tensor, list[Tensor], list]:
    """Return the inputs of the last pass, the logits before each latent in it, and the answer, EOS included."""
    embed = model.get_input_embeddings()
    before, inputs = [embed(torch.tensor(t)) for t in prompt], [start] * count
    for _ in range(loops):
        states = states_and_logits(model, [*before, *inputs])[0]
        inputs = [start + states[len(prompt) + i] for i in range(count)]
    logits = states_and_logits(model, [*before, *inputs])[1]
    said = [logits[len(prompt) - 1 + i] for i in range(count)]
    fed, answer = [*before, *inputs, *(embed(torch.tensor(t)) for t in DECODED.end_think_ids)], []
    while len(answer) < DECODED.max_answer_tokens and DECODED.eos_id not in answer:
        answer.append(int(states_and_logits(model, fed)[1][-1].argmax()))
        fed.append(embed(torch.tensor(answer[-1])))
    return torch.stack(inputs), said, answer


# -------------------------------------------------------------------------------------------------------- the method


def gpt2() -> GPT2LMHeadModel:
    """In float64 throughout, where the norms of a Llama compute in float32; with a table of positions."""
    config = GPT2Config(
        vocab_size=29, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3, bos_token_id=1,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).double()


def build(config: LotusConfig, lm=llama) -> LotusModel:
    torch.manual_seed(7)
    start = torch.randn(HIDDEN, dtype=torch.float64)
    return LotusModel(lm(), Thoughts(config.thoughts_at(config.num_blocks), start), config)


def batch_of(config: LotusConfig, stage: int, examples: list[Example] = ALL, reduction: str = "token") -> dict:
    rows = [{**row, "phase": stage} for row in rows_of(examples)]
    return lotus_batch(rows, SPEC, config, loss_reduction=reduction)


SHAPES = [
    {"num_blocks": 2, "latents_per_block": 3, "iterations": 2},
    {"num_blocks": 2, "latents_per_block": 2, "iterations": 3},  # steps reach into the next block, and beyond the last
    {"num_blocks": 3, "latents_per_block": 4, "iterations": 1},
    {"num_blocks": 2, "latents_per_block": 1, "iterations": 2},
    {"num_blocks": 1, "latents_per_block": 3, "iterations": 0},
]


@pytest.mark.parametrize(
    ("lm", "shape", "step_pass", "rel"),
    [
        *((gpt2, shape, step_pass, 1e-9) for shape in SHAPES for step_pass in ("last", "own", "every")),
        (llama, SHAPES[0], "last", 1e-5),
        (llama, SHAPES[1], "every", 1e-5),
    ],
)
def test_losses_and_gradients_equal_the_slow_definition(lm, shape, step_pass, rel):
    config = LotusConfig(**shape, step_pass=step_pass)
    for stage in range(config.num_blocks + 1):
        model, reference = build(config, lm), build(config, lm)
        reference.lm.set_attn_implementation("eager")
        batch = batch_of(config, stage)
        sums = model(**batch).loss_sums
        expected = [slow(reference.lm, reference.thoughts.placeholder, e, stage, config) for e in ALL]
        ce, step = sum(e[0] for e in expected), sum(e[1] for e in expected)
        assert (batch["count_ce"].item(), batch["count_step"].item()) == (
            sum(e[2] for e in expected),
            sum(e[3] for e in expected),
        )
        assert sums["ce"].item() == pytest.approx(ce.item(), rel=rel)
        assert sums["step"].item() == pytest.approx(step.item(), rel=rel)
        assert bool(step) == bool(stage)
        assert_same(gradients(model, sums["ce"] + 0.3 * sums["step"]), gradients(reference, ce + 0.3 * step), rel)


def test_places_of_the_step_targets_by_hand():
    """K = 2, c = 3: place 3 has two targets, the last latent none. Passes and rows are counted before places."""
    steps_of = [[[10, 11, 12, 13], [20, 21, 22]]]
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=2)
    assert step_targets(steps_of, 2, config) == [(0, 10), (1, 11), (2, 12), (3, 13), (3, 20), (4, 21), (5, 22)]
    assert step_targets([[], *steps_of], 2, config) == [
        (7 + place, token) for place, token in step_targets(steps_of, 2, config)
    ]
    assert step_targets(steps_of, 1, config) == [(0, 10), (1, 11), (2, 12), (3, 13)]
    assert step_targets(steps_of, 0, config) == []
    own = step_targets(steps_of, 2, dataclasses.replace(config, step_pass="own"))
    assert own == [*((7 + p, t) for p, t in ((0, 10), (1, 11), (2, 12), (3, 13))), (17, 20), (18, 21), (19, 22)]
    every = step_targets(steps_of, 2, dataclasses.replace(config, step_pass="every"))
    assert every[:4] == [(7, 10), (14, 10), (8, 11), (15, 11)] and len(every) == 14
    long = [[[10], [20, 21, 22, 23, 24, 25]]]
    assert step_targets(long, 2, config)[-2:] == [(5, 22), (6, 23)]  # the place of the last latent, and no further


def test_a_batch_by_hand():
    config = LotusConfig(num_blocks=2, latents_per_block=3)
    batch = batch_of(config, 1, EXAMPLES[:2])
    assert batch["tail_ids"].tolist() == [[13, 14, 10, 16, 5, 6, 20, 1], [17, 5, 6, 21, 22, 23, 1, 1]]
    # of 9 columns a row, the first is the last latent; the first token of the tail is not learned
    assert batch["target_index"].tolist() == [*range(1, 8), *range(10, 16)]
    assert batch["targets"].tolist() == [14, 10, 16, 5, 6, 20, 1, 5, 6, 21, 22, 23, 1]
    last = batch_of(config, 2, EXAMPLES[:2])
    assert last["tail_ids"].tolist() == [[5, 6, 20, 1, 1, 1], [5, 6, 21, 22, 23, 1]]
    assert last["targets"].tolist() == [20, 1, 21, 22, 23, 1]
    assert last["thought_mask"].shape == (2, 6) and (last["kind"] > 0).sum(1).tolist() == [4 + 6 + 4, 2 + 6 + 6]
    assert batch_of(config, 0)["thought_mask"].shape == (len(ALL), 0)
    assert torch.equal(
        lotus_batch(rows_of(ALL), SPEC, config, loss_reduction="token")["kind"], batch_of(config, 2)["kind"]
    )


def test_without_loops_it_is_one_plain_pass():
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=0)
    model, batch = build(config), batch_of(LotusConfig(num_blocks=2, latents_per_block=3, iterations=0), 2)
    plain = build(config)
    table, total = plain.lm.get_input_embeddings().weight, 0.0
    for example in ALL:
        tail = [*example.end, *example.answer]
        fed = torch.cat([table[example.prompt], plain.thoughts.placeholder.expand(6, -1), table[tail]])
        logits = plain.lm(inputs_embeds=fed[None]).logits[0].log_softmax(-1)
        first = len(example.prompt) + 6 + len(example.end)
        total = total - sum(logits[first - 1 + i, token] for i, token in enumerate(example.answer))
    loss = model(**batch).loss_sums["ce"]
    assert loss.item() == pytest.approx(total.item(), rel=1e-7)
    assert_same(gradients(model, loss), gradients(plain, total), 1e-6)


@pytest.mark.parametrize("loss_reduction", ["token", "segment", "sample"])
def test_before_the_first_block_it_is_fine_tuning_on_the_cot(loss_reduction):
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=2)
    model, batch = build(config), batch_of(config, 0, reduction=loss_reduction)
    plain = ExplicitModel(copy.deepcopy(model.lm))
    other = explicit_batch(rows_of(ALL), SPEC, with_cot=True, loss_reduction=loss_reduction)
    assert (batch["count_ce"], batch["count_step"]) == (other["count_ce"], 0)
    out = model(**batch).loss_sums
    assert out["ce"].item() == pytest.approx(plain(**other).loss_sums["ce"].item(), rel=1e-7) and out["step"] == 0
    found = gradients(model, out["ce"])
    assert not found.pop("thoughts.placeholder").any()
    assert_same(found, gradients(plain, plain(**other).loss_sums["ce"]), 1e-6)
    # a parameter without any gradient would stop a job of several processes
    (given,) = torch.autograd.grad(model(**batch).loss_sums["ce"], [model.thoughts.placeholder])
    assert given is not None


def test_recomputed_activations_change_nothing():
    """There the published code reads latents once more than without, and scores the question's places."""
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=2, step_pass="every")
    plain, again = build(config), build(config)
    again.train()
    again.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_of(config, 2)
    expected, found = (sum(m(**batch).loss_sums.values()) for m in (plain, again))
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)
    assert_same(gradients(again, found), gradients(plain, expected), 1e-6)


def test_the_answer_reads_the_pass_before_the_last_states():
    """h_R feeds nothing but the step loss; all states before it get gradients of both."""
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=2)
    model, batch = build(config), batch_of(config, 2)
    prompt, thought = model.think(batch)
    sums = model.losses(batch, prompt, thought).loss_sums
    assert len(thought.passes) == 3
    found = torch.autograd.grad(sums["ce"], thought.passes, retain_graph=True, allow_unused=True)
    assert found[2] is None or not found[2].any()
    assert found[1].abs().sum(-1).all() and found[0].abs().sum(-1).all()
    step = torch.autograd.grad(sums["step"], thought.passes)
    assert all(part.any() for part in step)


def test_a_batch_is_its_rows_one_by_one():
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=2, step_pass="every")
    model = build(config)
    for stage in (0, 1, 2):
        whole = model(**batch_of(config, stage, reduction="sample")).loss_sums
        singles = [model(**batch_of(config, stage, [example], "sample")).loss_sums for example in ALL]
        for name in ("ce", "step"):
            single = sum(sums[name] for sums in singles)
            assert whole[name].item() == pytest.approx(single.item(), rel=1e-7)
            assert_same(gradients(model, whole[name]), gradients(model, single), 1e-6)


def test_a_step_loss_of_weight_0_is_not_computed():
    config = LotusConfig(num_blocks=2, latents_per_block=3, step_weight=0.0)
    assert set(build(config)(**batch_of(config, 2)).loss_sums) == {"ce"}


def test_steps_have_to_be_known():
    row = {**rows_of(ALL)[0], "step_lengths": []}
    config = LotusConfig(num_blocks=2)
    with pytest.raises(DataError, match="row 0: its steps are not parts of its CoT"):
        lotus_batch([{**row, "phase": 1}], SPEC, config, loss_reduction="token")
    assert lotus_batch([{**row, "phase": 0}], SPEC, config, loss_reduction="token")["count_step"] == 0


def test_lengths_bound_every_stage():
    config = LotusConfig(num_blocks=2, latents_per_block=3, iterations=4)
    lengths = lotus_lengths(Dataset.from_list(rows_of(ALL)), SPEC, config)
    # P, five passes over six latents, and the whole CoT
    assert lengths.width(lengths.parts).tolist() == [
        len(e.prompt) + 30 + sum(map(len, e.steps)) + 2 + len(e.answer) for e in ALL
    ]


# ------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_blocks": 2, "stage_share": 0.2}, [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]),
        ({"num_blocks": 3, "stage_share": 0.3, "first_stage": 1}, [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]),
        ({"num_blocks": 2, "stage_share": 0.001}, [0, 1, 2, 2, 2, 2, 2, 2, 2, 2]),  # a stage lasts a step at least
        ({"num_blocks": 2, "first_stage": 2, "stage_share": 5.0}, [2] * 10),
    ],
)
def test_stages_by_hand(settings, expected):
    config = LotusConfig(**settings)
    assert [stage_at(step, 10, config) for step in range(10)] == expected
    number = numbered(100, 10, 0, config)
    assert [number(step, 7) for step in range(10)] == [100 * stage + 7 for stage in expected]


def test_the_published_schedule():
    """An epoch a stage, stage s with s blocks and s loops."""
    config = LotusConfig(stage_share=1 / 30)
    assert [stage_at(3012 * epoch, 3012 * 30, config) for epoch in range(8)] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [config.thoughts_at(stage) for stage in (1, 6)] == [
        ThoughtSpec(num_latents=25, iterations=1, added=True),
        ThoughtSpec(num_latents=150, iterations=6, added=True),
    ]


def test_the_best_checkpoint_is_forgotten_where_a_stage_begins():
    forgotten, callback = [], ForgetBest(LotusConfig(num_blocks=2, stage_share=0.2))
    for step in range(10):
        state = SimpleNamespace(global_step=step, max_steps=10, best_metric=0.5, best_global_step=1)
        callback.on_step(state, None)
        if state.best_metric is None and state.best_global_step is None:
            forgotten.append(step)
    assert forgotten == [2, 4]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_blocks", 0, "an integer >= 1"),
        ("latents_per_block", 0, "an integer >= 1"),
        ("iterations", -1, "an integer >= 0"),
        ("first_stage", 7, "0 to lotus.num_blocks=6"),
        ("stage_share", 0.0, "a share > 0, 6 of which sum to below 1"),
        ("stage_share", 0.2, "a share > 0, 6 of which sum to below 1"),
        ("step_weight", -0.1, "a number >= 0"),
    ],
)
def test_values_out_of_range_are_refused(key, value, expected):
    with pytest.raises(ConfigError, match=rf"lotus\.{key}: got {value}, expected {expected}"):
        LotusConfig(**{key: value})


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("loops", [0, 1, 3, 6])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_equals_a_loop_without_cache_or_batch(family, loops):
    """R + 1 passes, then a token a pass; also with R above M, which is no other way of thinking here."""
    model, spec = model_of(family), ThoughtSpec(num_latents=4, iterations=loops, added=True)
    thoughts = thoughts_of(model, spec).eval()
    for batch_size in (1, 3):
        rows = generate(model, DECODED, PROMPTS, thinker="continuous", thoughts=thoughts, batch_size=batch_size)
        for prompt, row in zip(PROMPTS, rows, strict=True):
            inputs, said, answer = slow_decode(model, thoughts.placeholder.detach(), 4, loops, prompt)
            assert [*row.answer_ids, *[DECODED.eos_id] * row.finished] == answer
            assert (row.num_steps, row.forward_passes) == (4, loops + len(answer))
            torch.testing.assert_close(row.latent_embeds, inputs, rtol=1e-4, atol=1e-4)
            for ids, logits in zip(row.latent_ids, said, strict=True):
                assert ids.tolist() == logits.argsort(descending=True)[: DECODED.top_k].tolist()


@torch.no_grad()
def test_it_thinks_in_training_as_in_decoding():
    model, spec = model_of("llama"), ThoughtSpec(num_latents=4, iterations=3, added=True)
    thoughts = thoughts_of(model, spec).eval()
    found = generate(model, DECODED, PROMPTS, thinker="continuous", thoughts=thoughts, batch_size=2)
    use_thoughts(model)
    length = torch.tensor([len(prompt) for prompt in PROMPTS])
    ids = torch.tensor([prompt + [0] * (int(length.max()) - len(prompt)) for prompt in PROMPTS])
    prompt = read(model, ids, length, thoughts)
    thought = think_at_once(model, thoughts, prompt)
    torch.testing.assert_close(thought.inputs, torch.stack([row.latent_embeds for row in found]), rtol=1e-4, atol=1e-4)
    tails = torch.tensor([list(DECODED.end_think_ids)] * len(PROMPTS))
    result = read_on(
        model, tails, torch.full((len(PROMPTS),), tails.shape[1]), thought.position, (prompt.piece, *thought.pieces)
    )
    first = head(model)(result.hidden[:, -1]).argmax(-1).tolist()
    assert first == [[*row.answer_ids, DECODED.eos_id][0] for row in found]


# -------------------------------------------------------------------------------------------------------- in training

SETTINGS = ["lotus.train.enabled=true", "lotus.train.max_steps=8", "lotus.train.eval_every=2",
            "lotus.train.save_every=2", "lotus.train.eval_examples=2"]  # fmt: skip


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def weights(folder: Path) -> dict[str, Tensor]:
    return {**load_file(folder / "final" / "model.safetensors"), **load_file(folder / "final" / "thoughts.safetensors")}


def test_accumulation_gives_the_losses_of_one_large_batch(tiny_config, tmp_path):
    """Cut into four micro-batches, with activations computed again, over all stages."""
    found = {}
    for way, size, accumulation, again in (("whole", 8, 1, "false"), ("cut", 2, 4, "true")):
        config = tiny_config(
            *SETTINGS,
            f"run_dir={tmp_path / way}",
            f"lotus.train.micro_batch_size={size}",
            f"lotus.train.gradient_accumulation_steps={accumulation}",
            f"lotus.train.gradient_checkpointing={again}",
        )
        found[way] = train_stage(config, "lotus").directory
    for tag in ("train/loss", "train/loss_ce", "train/loss_step", "train/grad_norm"):
        whole, cut = (logged(found[way], tag) for way in ("whole", "cut"))
        assert len(whole) == 8, tag
        assert cut == pytest.approx(whole, rel=2e-4, abs=1e-6), tag
    assert [loss > 0 for loss in logged(found["cut"], "train/loss_step")] == [False] * 2 + [True] * 6


def test_a_killed_stage_goes_on_to_the_same_weights(tiny_config, tmp_path):
    """Killed in its sixth step, in the last stage, after the checkpoint of the fourth."""

    class Killed(BaseException):
        pass

    def killed(self, batches):
        if self.state.global_step == 5:
            raise Killed
        return batches

    whole = train_stage(tiny_config(*SETTINGS, f"run_dir={tmp_path / 'whole'}"), "lotus")
    config = tiny_config(*SETTINGS, f"run_dir={tmp_path / 'killed'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingLoop, "_prepared", killed)
        with pytest.raises(Killed):
            train_stage(config, "lotus")
    resumed = train_stage(config, "lotus")
    assert logged(resumed.directory, "train/loss") == logged(whole.directory, "train/loss")
    found, expected = weights(resumed.directory), weights(whole.directory)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_model_is_the_best_of_the_last_stage(tiny_config, monkeypatch):
    accuracies = iter([1.0, 0.75, 0.25, 0.5])
    monkeypatch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": next(accuracies)})
    step = train_stage(tiny_config(*SETTINGS), "lotus")
    assert (step.results()["best_step"], step.results()["validation_accuracy"]) == (8, 0.5)


def test_it_is_planned_evaluated_loaded_and_exported(tiny_config, tmp_path):
    config = tiny_config(*SETTINGS, "lotus.train.max_steps=4")
    assert "lotus" in config.models() and "lotus" in config.exports() and "lotus" in graph_of(Experiment(config))
    step = train_stage(config, "lotus")
    assert evaluate(config, ["lotus"], ["test"])["lotus"]["test"]["num_examples"] == 12
    folder = step.final
    how = json.loads((folder / "thinker.json").read_text())
    spec = ThoughtSpec(num_latents=6, iterations=2, added=True)
    assert how == {"thinker": "continuous", "thoughts": dataclasses.asdict(spec)}
    out = export_run(config, "lotus", tmp_path / "export")
    assert "each added to one that was trained, all at once, 2 times over." in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    thoughts = load_thoughts(folder / "thoughts.safetensors", spec, torch.device("cpu"))
    work = Workspace(config)
    prompt = [*tokenizer("1 + 2")["input_ids"], *work.spec.think_ids]
    (row,) = generate(model, work.spec, [prompt], thinker="continuous", thoughts=thoughts)
    found = model.generate(
        torch.tensor([prompt]), custom_generate=str(out), trust_remote_code=True, return_latents=True
    )
    torch.testing.assert_close(found.latent_embeds[0], row.latent_embeds)
    written = found.sequences[0, len(prompt) + len(work.spec.end_think_ids) :].tolist()
    assert written == [*row.answer_ids, *[work.spec.eos_id] * row.finished]


def test_it_starts_from_the_cot_stage_the_base_model_or_one_of_its_own(tiny_config, tmp_path):
    assert Workspace(tiny_config("lotus.init=cot")).source_of("lotus").directory.name == "cot"
    assert Workspace(tiny_config()).source_of("lotus") is None
    first = train_stage(tiny_config(*SETTINGS, "lotus.train.max_steps=4"), "lotus").directory
    config = tiny_config(
        *SETTINGS, "lotus.train.max_steps=1", f"lotus.train.start_from={first / 'final'}", "lotus.first_stage=2",
        "lotus.train.learning_rate=1e-12", f"run_dir={tmp_path / 'second'}",
    )  # fmt: skip
    start, end = weights(first), weights(train_stage(config, "lotus").directory)
    torch.testing.assert_close(end["placeholder"], start["placeholder"])
