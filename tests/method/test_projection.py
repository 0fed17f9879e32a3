"""Superpositions from hidden states against `superpose` of all logits: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_sft.method import projection
from latent_sft.method.projection import superpose_states
from latent_sft.method.superposition import superpose


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(0, 3), (1, 1), (2, 5), (7,)]),
    vocab=st.integers(1, 60),
    data=st.data(),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_superposition_of_all_logits(shape, vocab, data, temperature, seed) -> None:
    exclude = data.draw(st.one_of(st.none(), st.integers(0, vocab - 1)))
    top_k = data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(vocab, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    if exclude is not None and vocab == 1:
        return
    found = superpose_states(hidden, table, top_k, temperature, exclude)
    expected = superpose(hidden @ table.detach().T, top_k, temperature, exclude)
    assert torch.equal(found.ids, expected.ids)
    assert torch.allclose(found.weights, expected.weights, atol=1e-12)
    upstream = torch.randn(found.weights.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x.weights, hidden, upstream)[0] for x in (found, expected))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_rows_are_projected_in_chunks_and_the_table_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "ROWS", 4)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    table = torch.randn(20, 8, requires_grad=True)
    found = superpose_states(hidden, table, 3)
    assert torch.equal(found.ids, superpose(hidden @ table.T, 3).ids)
    found.weights[..., 0].sum().backward()
    assert hidden.grad is not None and table.grad is None
