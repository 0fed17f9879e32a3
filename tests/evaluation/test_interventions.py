"""Interventions on models whose answers are known: one that reads its thoughts only, one that reads none of them."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latent_sft.evaluation import interventions
from latent_sft.evaluation.answers import is_correct
from latent_sft.evaluation.interventions import check_given, intervene, latent_sweep, thought
from latent_sft.inference.generate import Decoded, generate
from latent_sft.inference.solve import Thinker, solve
from latent_sft.method.types import LatentSpec, Soft, SpanCode, ThoughtSpec
from latent_sft.models.thoughts import Thoughts

SIZE, THINK, END, EOS, PAD = 16, 1, 2, 3, 0
NAMES = ("zero", "mean", "shuffle", "truncate")
SPEC = LatentSpec(
    think_ids=(THINK,),
    end_think_ids=(END,),
    eos_id=EOS,
    pad_id=PAD,
    vocab_size=SIZE,
    top_k=2,
    max_latents=5,
    max_answer_tokens=1,
)


def counting_model(reads: bool) -> LlamaForCausalLM:
    """One layer, tied one-hot embeddings, attention the same to everything: the answer is the most frequent input.

    At `</think>` the logit of a token is 10 times its share of all inputs, plus 1 for `</think>` itself. With `reads`
    false attention gives nothing, so that the answer is always `</think>`.
    """
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.input_layernorm.weight.fill_(1.0)  # makes a one-hot input sqrt(SIZE) long
        model.model.embed_tokens.weight.copy_(torch.eye(SIZE))
        layer.self_attn.v_proj.weight.copy_(torch.eye(SIZE))
        layer.self_attn.o_proj.weight.copy_(torch.eye(SIZE) * reads * 10 / SIZE**0.5)
    return model


def decoded(kind: str, token: int, count: int) -> Decoded:
    """Return a problem whose thoughts all say `token`, in one of the three forms thoughts have."""
    latent = {"latent_ids": torch.tensor([[token, END]] * count), "latent_weights": torch.tensor([[1.0, 0.0]] * count)}
    return Decoded(
        **(latent if kind != "explicit" else {"latent_ids": None, "latent_weights": None}),
        latent_embeds=torch.eye(SIZE)[[token] * count] if kind == "continuous" else None,
        thought_ids=[token] * count,
        answer_ids=[token],
        num_steps=count,
        forward_passes=count + 2,
        finished=False,
    )


def run(model, samples, references, names=NAMES, prompt=(4, THINK), spec=SPEC):
    return intervene(
        model,
        spec,
        [{"prompt": list(prompt), "reference": str(reference)} for reference in references],
        samples,
        names=names,
        decode_text=lambda ids: " ".join(map(str, ids)),
        grader="text",
        batch_size=2,
    )


@pytest.mark.parametrize("kind", ["latent", "explicit", "continuous"])
def test_a_model_that_reads_its_thoughts(kind):
    samples = [decoded(kind, 7, 6), decoded(kind, 8, 6), decoded(kind, 9, 2)]
    found = run(counting_model(reads=True), samples, [7, 8, 9])
    accuracy = {name: result["accuracy"] for name, result in found.items()}
    # mean: the same thoughts for all, so the same answer; truncate: one 9 among four inputs is fewer than </think> has
    assert accuracy == {
        "given": 1.0,
        "zero": 0.0,
        "mean": pytest.approx(1 / 3),
        "shuffle": 0.0,
        "truncate": pytest.approx(2 / 3),
    }
    assert found["given"]["difference_ci"] == [0.0, 0.0]
    assert found["zero"]["difference"] == -1.0 and found["zero"]["difference_ci"] == [-1.0, -1.0]
    assert found["truncate"]["accuracy_se"] == pytest.approx(1 / 3)
    low, high = found["truncate"]["difference_ci"]
    assert (low, high) == (-1.0, 0.0)


def test_mean_is_over_all_thoughts_of_all_problems():
    """Of nine thoughts six say 7: behind their mean everybody answers 7."""
    samples = [decoded("latent", 7, 6), decoded("latent", 8, 3)]
    found = run(counting_model(reads=True), samples, [7, 7], names=("mean",))
    assert found["mean"]["accuracy"] == 1.0 and found["given"]["accuracy"] == 0.5


def test_a_model_that_does_not_read_them():
    samples = [decoded("latent", 7, 6), decoded("explicit", 8, 4), decoded("continuous", 9, 2)]
    found = run(counting_model(reads=False), samples, [END, END, 9])
    assert {name: result["accuracy"] for name, result in found.items()} == dict.fromkeys(
        ("given", *NAMES), pytest.approx(2 / 3)
    )
    assert all(result["difference"] == 0 and result["difference_ci"] == [0, 0] for result in found.values())


def test_a_problem_that_never_came_to_an_answer_stays_wrong():
    stuck = Decoded(
        latent_ids=None,
        latent_weights=None,
        thought_ids=[8, 8, EOS],
        answer_ids=[],
        num_steps=3,
        forward_passes=3,
        finished=False,
    )
    samples = [decoded("explicit", 7, 6), stuck, decoded("explicit", 9, 6)]
    found = run(counting_model(reads=True), samples, [7, 8, 9])
    assert found["given"]["accuracy"] == pytest.approx(2 / 3)
    assert found["truncate"]["accuracy"] == pytest.approx(2 / 3)


def test_where_there_is_nothing_to_change():
    model = counting_model(reads=True)
    silent = [decoded("explicit", 7, 0), decoded("latent", 8, 0)]
    assert run(model, silent, [7, 8]) == {}
    assert run(model, [decoded("latent", 7, 6)], [7], names=()) == {}
    # alone, a problem has nobody to exchange with
    assert set(run(model, [decoded("latent", 7, 6)], [7])) == {"given", "zero", "mean", "truncate"}


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


THINKERS = {
    "explicit": ("explicit", {"max_cot_tokens": 6}),
    "latent": ("latent", {}),
    "soft": ("soft", {"mixture": Soft(top_k=3, temperature=1.0), "max_cot_tokens": 6}),
    "sequential": ("continuous", {"thoughts": (3, 3)}),
    "jacobi": ("continuous", {"thoughts": (4, 2)}),
    "pause": ("continuous", {"thoughts": (4, 0)}),
}


@pytest.mark.parametrize("name", THINKERS)
def test_own_thoughts_fed_back_give_the_same_answers(name, random_model, caplog):
    thinker, options = THINKERS[name]
    spec = LatentSpec(
        think_ids=(1,),
        end_think_ids=(2, 5),
        eos_id=3,
        pad_id=0,
        vocab_size=40,
        top_k=4,
        max_latents=5,
        max_answer_tokens=6,
    )
    if "thoughts" in options:
        count, iterations = options["thoughts"]
        torch.manual_seed(1)
        start = torch.randn(32)
        options = {"thoughts": Thoughts(ThoughtSpec(num_latents=count, iterations=iterations), start)}
    torch.manual_seed(2)
    prompts = [[*torch.randint(6, 40, (n,)).tolist(), 1] for n in (3, 7, 5, 4, 9)]
    samples = generate(random_model, spec, prompts, thinker=thinker, **options)
    assert any(s.num_steps for s in samples)
    references = [" ".join(map(str, s.answer_ids)) for s in samples]
    found = intervene(
        random_model,
        spec,
        [{"prompt": p, "reference": r or "nothing"} for p, r in zip(prompts, references, strict=True)],
        samples,
        names=("truncate",),
        decode_text=lambda ids: " ".join(map(str, ids)),
        grader="text",
        batch_size=3,
    )
    normal = sum(bool(r) for r in references) / len(references)
    assert found["given"]["accuracy"] == pytest.approx(normal) and normal > 0
    with caplog.at_level(logging.WARNING):
        check_given(found, normal, "x")
    assert not caplog.text


@pytest.mark.parametrize("name", ["latent", "spans", "sequential", "jacobi"])
def test_a_sweep_thinks_in_as_many_latents_as_it_is_told(name, random_model, monkeypatch):
    """With the number of latents that a model takes by itself, its accuracy is its own."""
    spec = LatentSpec(
        think_ids=(1,), end_think_ids=(2, 5), eos_id=3, pad_id=0, vocab_size=40, top_k=4, max_latents=3, min_latents=3,
        max_answer_tokens=6,
    )  # fmt: skip
    options = {
        "latent": {"kind": "latent"},
        "spans": {"kind": "spans", "mixture": SpanCode(rho=0.5, longest=3)},
        "sequential": {"kind": "continuous", "thoughts": (3, 3)},
        "jacobi": {"kind": "continuous", "thoughts": (3, 2)},
    }[name]
    if "thoughts" in options:
        torch.manual_seed(1)
        shape = ThoughtSpec(num_latents=options["thoughts"][0], iterations=options["thoughts"][1])
        options["thoughts"] = Thoughts(shape, torch.randn(32))
    thinker = Thinker(lm=random_model, **options)
    torch.manual_seed(2)
    rows = [{"prompt": [*torch.randint(6, 40, (n,)).tolist(), 1], "reference": "x"} for n in (3, 7, 5, 4, 9, 6)]
    own = solve(thinker, spec, rows, batch_size=3, max_cot_tokens=9)
    for row, sample in zip(rows[::2], own[::2], strict=True):
        row["reference"] = " ".join(map(str, sample.answer_ids)) or "x"
    seen, inner = {}, interventions.solve

    def watched(how, limits, *args, **more):
        decoded = inner(how, limits, *args, **more)
        seen[limits.max_latents] = {sample.num_steps for sample in decoded}
        return decoded

    monkeypatch.setattr(interventions, "solve", watched)
    text = {"decode_text": lambda ids: " ".join(map(str, ids)), "grader": "text"}
    found = latent_sweep(thinker, spec, rows, (1, 3, 5), batch_size=4, **text)
    assert seen == {1: {1}, 3: {3}, 5: {5}} and found.keys() == {"1", "3", "5"}
    pairs = zip(own, rows, strict=True)
    right = [is_correct(text["decode_text"](s.answer_ids), r["reference"], "text") for s, r in pairs]
    assert found["3"]["accuracy"] == pytest.approx(sum(right) / 6) and sum(right) >= 2
    if thinker.thoughts is not None:
        assert thinker.thoughts.spec.num_latents == 3  # the model itself is as it was


def test_thoughts_as_embeddings(random_model):
    table = random_model.get_input_embeddings().weight.detach()
    explicit = Decoded(
        latent_ids=None,
        latent_weights=None,
        thought_ids=[7, 9],
        answer_ids=[],
        num_steps=2,
        forward_passes=2,
        finished=True,
    )
    assert torch.equal(thought(random_model, explicit), table[[7, 9]])
    latent = Decoded(
        latent_ids=torch.tensor([[7, 9]]),
        latent_weights=torch.tensor([[0.75, 0.25]]),
        thought_ids=[7],
        answer_ids=[],
        num_steps=1,
        forward_passes=2,
        finished=True,
    )
    torch.testing.assert_close(thought(random_model, latent), (0.75 * table[7] + 0.25 * table[9])[None])
    empty = Decoded(
        latent_ids=None,
        latent_weights=None,
        thought_ids=[],
        answer_ids=[],
        num_steps=0,
        forward_passes=1,
        finished=True,
    )
    assert thought(random_model, empty).shape == (0, 32)


def test_another_accuracy_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="latent_sft"):
        check_given({"given": {"accuracy": 0.5}}, 0.75, "kava test")
    assert "eval kava test: its own thoughts fed back give accuracy 0.5000 instead of 0.7500" in caplog.text
    caplog.clear()
    check_given({}, 0.75, "no-cot test")
    assert not caplog.text
