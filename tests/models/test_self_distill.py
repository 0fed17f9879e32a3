"""CODI, PCCoT and KaVa on a tiny Llama equal the slow definitions of `reference_distill.py`, losses and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models.families import FAMILIES
from models.families import build as family
from models.thinking import END, EXAMPLES, HIDDEN, SPEC, assert_same, gradients, llama, rows_of
from reference_distill import Example, Rules, terms
from torch import Tensor, nn

from latent_sft.config.schema import LoraConfig
from latent_sft.errors import ConfigError, TrainingError
from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.methods.self_distill import KvDistillConfig, SelfDistillConfig, SelfDistillModel, distill_batch
from latent_sft.models import thought_passes
from latent_sft.models.load import add_lora
from latent_sft.models.thoughts import Thoughts

NAMES = ("ce", "teacher_ce", "hidden", "kv")


def settings_of(rules: Rules, **weights: float) -> SelfDistillConfig:
    kv = KvDistillConfig(
        weight=weights.pop("kv", 1.0),
        loss=rules.kv_loss,
        layer_std=rules.layer_std,
        **{
            key: getattr(rules, key)
            for key in (
                "selector",
                "importance",
                "queries",
                "pooling",
                "normalise",
                "span",
                "short",
                "reduction",
            )
        },
    )
    own = {
        key: getattr(rules, key)
        for key in ("num_latents", "iterations", "drop_last_step", "hidden_loss", "hidden_std", "hidden_embedding")
    }
    return SelfDistillConfig(**own, kv=kv, **weights)


def build(rules: Rules, *, projection: bool = True, lm: nn.Module | None = None, **weights: float) -> SelfDistillModel:
    lm = copy.deepcopy(lm) if lm is not None else llama()
    spec = ThoughtSpec(num_latents=rules.num_latents, iterations=rules.iterations, projection=projection)
    torch.manual_seed(3)
    thoughts = Thoughts(spec, torch.randn(HIDDEN, dtype=torch.float64), inner=20)
    return SelfDistillModel(lm, thoughts, SPEC, settings_of(rules, **weights))


def batch_of(model: SelfDistillModel, examples: list[Example] | None = None, loss_reduction: str = "token") -> dict:
    rows = rows_of(EXAMPLES if examples is None else examples)
    return distill_batch(
        rows,
        SPEC,
        model.thoughts.spec,
        loss_reduction=loss_reduction,
        drop_last_step=model.settings.drop_last_step,
        kv=model.settings.kv,
    )


def counts_of(batch: dict[str, Tensor]) -> list[float]:
    return [batch[f"count_{name}"].item() for name in NAMES]


# every option once, beside the paper's own; the last ones are Jacobi iterations from none to sequential
VARIANTS = {
    "kava": {},
    "norms": {"kv_loss": "mse", "layer_std": True, "hidden_loss": "l1", "hidden_std": "all"},
    "sums": {"reduction": "sum", "short": "zero", "kv_loss": "l1", "hidden_std": "none", "hidden_embedding": True},
    "zero-std": {"short": "zero", "layer_std": True, "hidden_loss": "mse"},
    "all-max": {"normalise": "all", "pooling": "max", "queries": "tail", "importance": 0.9},
    "all-mean": {"normalise": "all", "span": "delimiter", "importance": 0.9},
    "delimiter": {"queries": "tail", "span": "delimiter", "pooling": "max", "selector": "attention"},
    "layer-std": {"layer_std": True},
    "cosine": {"selector": "cosine", "drop_last_step": False},
    "attention": {"selector": "attention", "num_latents": 2},
    "crop": {"selector": "crop", "num_latents": 2, "iterations": 1},
    "uniform": {"selector": "uniform", "num_latents": 2, "iterations": 0},
    "codi": {"num_latents": 3, "iterations": 3},
    "one": {"num_latents": 1, "iterations": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_term_and_gradient_equals_the_slow_definition(variant):
    rules = Rules(**VARIANTS[variant])
    model = build(rules, projection=variant != "norms")
    batch = batch_of(model)
    reference = build(rules, projection=variant != "norms")
    reference.lm.set_attn_implementation("eager")
    thoughts = reference.thoughts
    each = [terms(reference.lm, thoughts.projection, thoughts.placeholder, e, rules)[0] for e in EXAMPLES]
    found = model(**batch).loss_sums
    for name in NAMES:
        expected = sum(example[name] for example in each)
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-5), name
        assert_same(gradients(model, found[name]), gradients(reference, expected))
    tokens = [len(e.answer) for e in EXAMPLES], [len(END) + len(e.answer) for e in EXAMPLES]
    traces = [sum(map(len, e.steps[:-1] if rules.drop_last_step else e.steps)) for e in EXAMPLES]
    compared = [t > 0 or rules.span == "delimiter" or rules.short == "zero" for t in traces]
    assert counts_of(batch) == [sum(tokens[0]), sum(tokens[1]) + sum(traces), len(EXAMPLES), sum(compared)]


def test_a_batch_is_its_rows_one_by_one():
    for options in ({}, {"iterations": 3}, {"selector": "random", "num_latents": 2}, {"selector": "uniform"}):
        model = build(Rules(layer_std=True, **options))
        whole = model(**batch_of(model, loss_reduction="sample")).loss_sums
        rows = [model(**batch_of(model, [e], loss_reduction="sample")) for e in EXAMPLES]
        # the random selector goes by a row's id, which is its number here
        if options.get("selector") == "random":
            every = batch_of(model)
            rows = [model(**{**batch_of(model, [e], "sample"), "row_seed": every["row_seed"][i : i + 1]})
                    for i, e in enumerate(EXAMPLES)]  # fmt: skip
        for name in NAMES:
            single = sum(row.loss_sums[name] for row in rows)
            assert whole[name].item() == pytest.approx(single.item(), rel=1e-9), name
            assert_same(gradients(model, whole[name]), gradients(model, single), 1e-8)


def test_as_many_iterations_as_latents_are_one_latent_after_another():
    """T = M - 1 is not; T beyond M changes nothing. The parallel passes, run M times, give the sequential result."""
    losses = [build(Rules(iterations=t))(**batch_of(build(Rules(iterations=t)))).loss_sums for t in (2, 3, 7)]
    assert all(losses[1][name].item() == losses[2][name].item() for name in NAMES)
    assert losses[0]["ce"].item() != pytest.approx(losses[1]["ce"].item(), rel=1e-4)
    from latent_sft.models.thought_passes import read, think_at_once, think_in_turn

    model = build(Rules(iterations=3))
    batch = batch_of(model)
    ids, length = batch["prompt_ids"], batch["prompt_length"]
    at_once = think_at_once(model.lm, model.thoughts, read(model.lm, ids, length, model.thoughts))
    in_turn = think_in_turn(model.lm, model.thoughts, read(model.lm, ids, length), torch.ones(4, 3).bool())
    for layer in range(2):
        for name in ("keys", "values"):
            expected = torch.cat([getattr(piece, name)[layer] for piece in in_turn.pieces], dim=2)
            torch.testing.assert_close(getattr(at_once.pieces[0], name)[layer], expected, rtol=1e-5, atol=1e-6)


def test_no_iteration_reads_the_placeholders_as_pause_tokens():
    """As if M pause tokens with the placeholder's embedding stood in the prompt."""
    model = build(Rules(iterations=0), teacher_weight=0.0, hidden_weight=0.0, kv=0.0)
    with torch.no_grad():
        model.lm.get_input_embeddings().weight[28] = model.thoughts.placeholder
    rows = [{**row, "prompt": [*row["prompt"], 28, 28, 28]} for row in rows_of(EXAMPLES)]
    plain = ExplicitModel(copy.deepcopy(model.lm))
    batch = explicit_batch(rows, SPEC, with_cot=False, loss_reduction="token")
    hidden = [i for i, t in enumerate(batch["targets"].tolist()) if t not in END]
    batch |= {k: batch[k][hidden] for k in ("target_index", "targets", "target_weights")}
    assert model(**batch_of(model)).loss_sums["ce"].item() == pytest.approx(
        plain(**batch).loss_sums["ce"].item(), rel=1e-6
    )
    assert not any(p.requires_grad for p in model.thoughts.projection.parameters())


def test_without_distances_it_is_the_sum_of_two_cross_entropies():
    """The teacher's is CoT fine-tuning on the steps it is shown; no KaVa term is computed."""
    model = build(Rules(), hidden_weight=0.0, kv=0.0)
    out = model(**batch_of(model))
    assert set(out.loss_sums) == {"ce", "teacher_ce"} and out.observed == {}
    rows = [
        {**row, "cot": [t for step in e.steps[:-1] for t in step]}
        for row, e in zip(rows_of(EXAMPLES), EXAMPLES, strict=True)
    ]
    plain = ExplicitModel(copy.deepcopy(model.lm))
    expected = plain(**explicit_batch(rows, SPEC, with_cot=True, loss_reduction="token")).loss_sums["ce"]
    assert out.loss_sums["teacher_ce"].item() == pytest.approx(expected.item(), rel=1e-6)
    alone = build(Rules(), teacher_weight=0.0, hidden_weight=0.0, kv=0.0)
    assert set(alone(**batch_of(alone)).loss_sums) == {"ce"}
    assert alone(**batch_of(alone)).loss_sums["ce"].item() == out.loss_sums["ce"].item()


@pytest.mark.parametrize(("share", "selector"), [(0.0, "cosine"), (1.0, "attention")])
def test_the_limits_of_lambda_are_the_single_scores(share, selector):
    mixed, single = build(Rules(importance=share)), build(Rules(selector=selector))
    batch = batch_of(mixed)
    assert mixed(**batch).loss_sums["kv"].item() == single(**batch).loss_sums["kv"].item()


def test_all_selectors_agree_where_there_are_as_many_latents_as_tokens():
    values = set()
    for selector in ("rkv", "cosine", "attention", "crop", "uniform", "random"):
        model = build(Rules(num_latents=9, selector=selector))
        values.add(round(model(**batch_of(model)).loss_sums["kv"].item(), 9))
    assert len(values) == 1


def test_what_is_observed():
    """Traces of 6, 2, 0 and 3 tokens and M = 3: two of four are shorter; kept are 3/6, 2/2, nothing to keep, 3/3."""
    model = build(Rules())
    observed = model(**batch_of(model)).observed
    assert [x.item() for x in observed["kv_short"]] == [2, 4]
    assert [x.item() for x in observed["kv_kept"]] == [pytest.approx(2.5), 3]
    total, count = (x.item() for x in observed["kv_cosine"])
    assert count == (3 + 2 + 0 + 3) * 2 * 2 and -1 < total / count < 1  # heads and layers
    assert not observed["kv_cosine"][0].requires_grad


@pytest.mark.parametrize("options", [{}, {"iterations": 3}, {"normalise": "all"}])
def test_gradient_checkpointing_changes_no_gradient(options):
    found = []
    for checkpointing in (False, True):
        model = build(Rules(**options)).train()
        if checkpointing:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.lm.is_gradient_checkpointing
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        model.lm.model.layers[0].mlp.register_forward_pre_hook(count)
        out = model(**batch_of(model)).loss_sums
        forward = calls
        weighted = sum((i + 1) * out[name] for i, name in enumerate(NAMES))
        model.zero_grad()
        weighted.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert calls - forward >= 5 if checkpointing else calls == forward  # five passes or more, run again
    assert_same(found[1], found[0], 1e-9)


def test_lora_trains_through_every_term():
    model = build(Rules(), lm=llama())
    model = SelfDistillModel(
        add_lora(model.lm, LoraConfig(rank=2, alpha=4)).double(), model.thoughts, SPEC, model.settings
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    out = model(**batch_of(model)).loss_sums
    for name in NAMES:
        found = gradients(model, out[name])
        assert all("lora_" in n or n.startswith("thoughts.") for n in found)
        assert any(g.abs().max() > 0 for n, g in found.items() if "lora_" in n), name
    merged = SelfDistillModel(model.lm.merge_and_unload(), model.thoughts, SPEC, model.settings)
    for name, value in merged(**batch_of(model)).loss_sums.items():
        assert value.item() == pytest.approx(out[name].item(), rel=1e-5), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_step(name):
    """Alone and in a batch, in float32."""
    spec = LatentSpec(think_ids=(4,), end_think_ids=END, eos_id=1, pad_id=0, vocab_size=40, top_k=4)
    settings = settings_of(Rules(normalise="all", layer_std=True))
    thoughts = Thoughts(ThoughtSpec(num_latents=3, iterations=2), torch.ones(32))
    model = SelfDistillModel(family(name, scale=2.0), thoughts, spec, settings)
    whole = model(**batch_of(model)).loss_sums
    single = [model(**batch_of(model, [e])).loss_sums for e in EXAMPLES]
    for term in NAMES:
        assert whole[term].item() == pytest.approx(sum(s[term].item() for s in single), rel=1e-4), term
    found = gradients(model, sum(whole.values()))
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["thoughts.placeholder"].abs().sum() > 0
    assert sum(float(g.abs().sum()) > 0 for g in found.values()) > len(found) / 2


def test_a_model_whose_layers_leave_nothing_is_refused():
    model = build(Rules())
    model.lm.set_attn_implementation("sdpa")
    with pytest.raises(TrainingError, match="0 of 2 layers of LlamaForCausalLM"):
        model(**batch_of(model))


def test_a_model_without_the_attention_interface_is_refused(monkeypatch):
    lm = llama()
    monkeypatch.setattr(type(lm), "_supports_attention_backend", False)
    with pytest.raises(ConfigError, match="does not use transformers' attention interface"):
        thought_passes.use_thoughts(lm)


def test_a_sliding_window_is_refused_where_it_would_bite():
    model = build(Rules())
    batch = batch_of(model)
    longest = batch["prompt_ids"].shape[1] + batch["teacher_ids"].shape[1]
    model.lm.config.sliding_window = longest
    model(**batch)
    model.lm.config.sliding_window = longest - 1
    with pytest.raises(ConfigError, match=f"with a thinking sequence of {longest} tokens"):
        model(**batch)


def test_whole_sequences_and_decoding_work_as_before():
    lm = llama()
    ids = torch.tensor([[8, 9, 4, 10, 11]])
    expected = lm(input_ids=ids).logits
    thought_passes.use_thoughts(lm)
    torch.testing.assert_close(lm(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    past = lm(input_ids=ids[:, :3], use_cache=True).past_key_values
    torch.testing.assert_close(
        lm(input_ids=ids[:, 3:], past_key_values=past).logits, expected[:, 3:], rtol=1e-5, atol=1e-6
    )
