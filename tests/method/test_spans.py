"""Span labels and the search for code words, against `reference_spans.py` and the numbers of the paper's example."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_spans import best, distance, mux, smallest_gap

from latent_sft.method.losses import weighted_sparse_kl
from latent_sft.method.spans import (
    LONGEST,
    Snapper,
    SpanThinking,
    _code_words,
    random_cuts,
    separation,
    span_labels,
    span_weights,
)
from latent_sft.method.superposition import entropy, mix
from latent_sft.method.thinking import LatentThinking
from latent_sft.method.types import LatentSpec, SpanCode, Superposition

CPU = torch.device("cpu")
SPEC = LatentSpec(think_ids=(2,), end_think_ids=(3,), eos_id=1, pad_id=0, vocab_size=40, top_k=5, max_latents=9)


def snapped(latents: list[dict[int, float]], code: SpanCode) -> list[list[int]]:
    """Return the spans that are found for latents given as masses, filled up with ids of no mass."""
    width = max(code.longest, *map(len, latents)) + 2
    ids, weights = torch.zeros(len(latents), width, dtype=torch.long), torch.zeros(len(latents), width)
    for row, latent in enumerate(latents):
        filled = [*latent.items(), *((1000 + i, 0.0) for i in range(width - len(latent)))]
        random.Random(row).shuffle(filled)
        ids[row], weights[row] = torch.tensor([i for i, _ in filled]), torch.tensor([float(w) for _, w in filled])
    found = Snapper(code, CPU)(Superposition(ids, weights))
    pairs = zip(found.ids.tolist(), found.weights.tolist(), strict=True)
    return [[i for i, w in zip(*pair, strict=True) if w > 0] for pair in pairs]


# ------------------------------------------------------------------------------------------------------------- labels


def test_the_example_of_the_paper():
    """`<< 5 + 3 = 8 >>` at rho = 0.9, to four digits; and a span with repeats."""
    label = span_labels([[50, 5, 40, 3, 41, 8, 51]], 0.9, 9)
    assert [round(w, 4) for w in label.weights[0].tolist()] == [
        0.1917, 0.1725, 0.1553, 0.1397, 0.1258, 0.1132, 0.1019, 0.0, 0.0,
    ]  # fmt: skip
    assert label.ids[0, :7].tolist() == [50, 5, 40, 3, 41, 8, 51]
    masses = mux([1, 1, 40, 1], 0.9)
    assert {k: round(v, 4) for k, v in masses.items()} == {1: 0.7645, 40: 0.2355}


@pytest.mark.parametrize(("rho", "length"), [(0.9, 4), (0.9, 8), (0.5, 3), (1.0, 5)])
def test_entropies_of_long_flat_labels(rho, length):
    """4: 1.379, 8: 2.051 at 0.9, as counted from the formula; uniform weights give log S."""
    known = {(0.9, 4): 1.379, (0.9, 8): 2.051, (0.5, 3): 0.9557, (1.0, 5): math.log(5)}
    label = span_labels([list(range(length))], rho, length)
    assert entropy(label).item() == pytest.approx(known[rho, length], abs=6e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4), st.floats(0.2, 1.0))
def test_labels_are_the_formula_and_mix_adds_repeats(spans, rho):
    label = span_labels(spans, rho, 6)
    table = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fed = mix(Superposition(label.ids, label.weights.double()), table)
    for i, span in enumerate(spans):
        expected = sum(table[token] * mass for token, mass in mux(span, rho).items())
        torch.testing.assert_close(fed[i], expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(label.weights.sum(-1), torch.ones(len(spans)))


def test_a_span_of_one_token_is_the_token():
    label = span_labels([[7], [8]], 0.7, 1)
    assert label.ids.tolist() == [[7], [8]] and label.weights.tolist() == [[1.0], [1.0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.floats(0.3, 1.0), st.integers(0, 1000))
def test_divergence_with_repeats_is_that_of_merged_masses(span, rho, seed):
    """Never negative; the dense KL; 0 where the student is the label; CE less entropy."""
    logits = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    raw = span_labels([span], rho, 6)
    label = Superposition(raw.ids, raw.weights.double())
    found = weighted_sparse_kl(logits, label, torch.ones(1)).item()
    merged = mux(span, rho)
    log_p = logits.log_softmax(-1)[0]
    dense = sum(m * (math.log(m) - log_p[t].item()) for t, m in merged.items())
    assert found == pytest.approx(dense, abs=1e-6) and found >= -1e-9
    own = torch.full((1, 5), -40.0, dtype=torch.float64)
    for token, mass in merged.items():
        own[0, token] = math.log(mass)
    assert weighted_sparse_kl(own, label, torch.ones(1)).item() == pytest.approx(0.0, abs=1e-6)


def test_the_value_that_was_negative():
    """`[1, 1, +, 1]` at 0.9: the entries' entropy is 1.379, that of the masses 0.546."""
    assert entropy(span_labels([[1, 1, 9, 1]], 0.9, 4)).item() == pytest.approx(0.546, abs=1e-3)


# --------------------------------------------------------------------------------------------------------- separation


@pytest.mark.parametrize(("rho", "length", "gap"), [
    (0.5, 2, 0.333), (0.5, 3, 0.143), (0.5, 6, 0.0159), (0.8, 4, 0.024), (0.9, 2, 0.053), (0.9, 4, 5.5e-3),
    (0.9, 8, 1.3e-4),
])  # fmt: skip
def test_the_smallest_gap(rho, length, gap):
    assert separation(length, rho) == pytest.approx(gap, rel=0.06)
    exact = smallest_gap(length, Fraction(rho).limit_denominator(10))
    assert separation(length, rho) == pytest.approx(float(exact), rel=1e-9)


def test_half_is_the_best_ratio_and_the_golden_one_is_none():
    for length in range(2, 9):
        assert separation(length, 0.5) == pytest.approx(1 / (2**length - 1))
        assert all(separation(length, rho) <= separation(length, 0.5) + 1e-12 for rho in (0.3, 0.6, 0.7, 0.8, 0.9))
    golden = (math.sqrt(5) - 1) / 2
    assert separation(3, golden) == pytest.approx(0, abs=1e-12)
    assert mux([1, 2, 2], golden) == pytest.approx(mux([2, 1, 1], golden))


# ----------------------------------------------------------------------------------------------------------- snapping


@pytest.mark.parametrize("snap", ["nearest", "likeliest"])
@pytest.mark.parametrize("rho", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("longest", [1, 2, 4, 6, 8])
def test_exact_code_words_are_found(snap, rho, longest):
    """Snapping is the identity on labels, up to spans of another length with the same label (`[a]` and `[a, a]`)."""
    rng = random.Random(longest)
    spans = [[rng.choice([*[4] * 4, *range(5, 12)]) for _ in range(rng.randint(1, longest))] for _ in range(200)]
    found = snapped([mux(span, rho) for span in spans], SpanCode(rho=rho, longest=longest, snap=snap))
    assert all(mux(a, rho) == pytest.approx(mux(b, rho), abs=1e-5) for a, b in zip(spans, found, strict=True))
    assert sum(a == b for a, b in zip(spans, found, strict=True)) >= (200 if longest == 1 else 150)


def test_greedy_is_exact_at_one_half_and_wrong_where_a_repeat_outweighs():
    spans = [[1, 2, 2], [3, 4, 5, 3], [6], [7, 8]]
    assert snapped([mux(s, 0.5) for s in spans], SpanCode(rho=0.5, longest=12, snap="greedy")) == spans
    assert snapped([mux([1, 2, 2], 0.7)], SpanCode(rho=0.7, longest=3, snap="greedy")) != [[1, 2, 2]]
    assert snapped([mux([1, 2, 2], 0.7)], SpanCode(rho=0.7, longest=3, snap="nearest")) == [[1, 2, 2]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.sampled_from([0.5, 0.7, 0.9]),
    st.sampled_from(["nearest", "likeliest"]),
)
def test_no_code_word_is_nearer_to_any_latent(seed, longest, rho, measure):
    """Sorting and set partitions against all K^S spans."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, generator=generator).mul(1.5).softmax(-1)
    latent = dict(zip((7, 3, 9, 5), weights.tolist(), strict=True))
    (found,) = snapped([latent], SpanCode(rho=rho, longest=longest, snap=measure))
    assert distance(mux(found, rho), latent, measure) == pytest.approx(best(latent, longest, rho, measure), abs=1e-5)


def test_there_are_bell_numbers_of_code_words():
    for longest, count in ((1, 1), (2, 3), (3, 8), (4, 23), (6, 278), (8, 5295)):
        assert len(_code_words(SpanCode(rho=0.5, longest=longest))[0]) == count


def test_a_long_code_is_searched_greedily():
    with pytest.raises(ValueError, match="got 'nearest', expected none or greedy for spans of up to 12 tokens"):
        Snapper(SpanCode(rho=0.5, longest=12, snap="nearest"), CPU)
    snapper = Snapper(SpanCode(rho=0.5, longest=LONGEST + 3, snap="none"), CPU)
    assert snapper.greedy and not hasattr(snapper, "masses")


def test_rows_are_independent():
    weights = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    latents = Superposition(torch.arange(140).view(20, 7), weights)
    for snap in ("nearest", "likeliest", "greedy"):
        snapper = Snapper(SpanCode(rho=0.7, longest=5, snap=snap), CPU)
        together = snapper(latents)
        for row in range(20):
            alone = snapper(Superposition(*(part[row : row + 1] for part in latents)))
            assert torch.equal(alone.ids[0], together.ids[row]) and torch.equal(alone.weights[0], together.weights[row])


# ----------------------------------------------------------------------------------------------------------- thinking


def test_a_step_feeds_the_code_word_back_and_reads_it():
    span, code = [11, 12, 11, 13], SpanCode(rho=0.7, longest=4)
    logits = torch.full((2, 40), -9.0)
    for token, mass in mux(span, 0.7).items():
        logits[0, token] = math.log(mass * random.Random(token).uniform(0.93, 1.07))
    logits[1, 3] = 5.0  # </think>
    thinking = SpanThinking(SPEC, CPU, mixture=code)
    fed, after = thinking.step(logits, thinking.start([0, 0]))
    assert fed.ids[0].tolist() == span
    torch.testing.assert_close(fed.weights[0], span_weights(4, 0.7).float())
    assert thinking.read(Superposition(fed.ids[:1], fed.weights[:1])) == [span]
    assert (fed.ids[1, 0].item(), fed.weights[1].tolist()) == (3, [1.0, 0.0, 0.0, 0.0])
    assert after.num_steps.tolist() == [1, 0] and after.phase.tolist() == [0, 1]


def test_without_snapping_it_is_latent_thinking_that_can_be_read():
    logits = torch.randn(30, 40, generator=torch.Generator().manual_seed(3)) * 2
    off = SpanThinking(SPEC, CPU, mixture=SpanCode(rho=0.5, longest=3, snap="none"))
    plain = LatentThinking(SPEC, CPU)
    ours, theirs = (way.step(logits, way.start([0] * 30)) for way in (off, plain))
    assert torch.equal(ours[0].ids, theirs[0].ids) and torch.equal(ours[0].weights, theirs[0].weights)
    assert all(1 <= len(span) <= 3 for span in off.read(ours[0]))


def test_spans_of_one_token_are_the_explicit_cot():
    """r = 1: what is fed back is the argmax, and thinking ends at `</think>`."""
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(4))
    thinking = SpanThinking(SPEC, CPU, mixture=SpanCode(rho=0.7, longest=1))
    fed, _ = thinking.step(logits, thinking.start([0] * 50))
    assert torch.equal(fed.ids[:, 0], logits.argmax(-1)) and (fed.weights == 1).all()


# --------------------------------------------------------------------------------------------------------------- cuts


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 99))
def test_random_cuts_make_a_whole_of_spans(num_tokens, num_spans, seed):
    lengths = random_cuts(num_tokens, num_spans, random.Random(seed))
    assert sum(lengths) == num_tokens and all(lengths) and len(lengths) == min(num_tokens, num_spans)
    assert lengths == random_cuts(num_tokens, num_spans, random.Random(seed))


def test_all_cut_points_are_equally_likely():
    found = {tuple(random_cuts(5, 3, random.Random(seed))) for seed in range(300)}
    assert found == {(1, 1, 3), (1, 2, 2), (1, 3, 1), (2, 1, 2), (2, 2, 1), (3, 1, 1)}
