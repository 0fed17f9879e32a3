"""Stage 1, stage 2 and decoding on a tiny Llama equal the slow definitions of `reference.py`, loss and every gradient.

The package runs a ragged, padded batch (a CoT shorter than the rate, one that the rate divides, two that it does not);
the reference runs one example after the other, unpadded, with masks from loops. Weights are float64; what remains of
the tolerance is for the norm and the softmax, which transformers computes in float32 whatever the weights are.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import reference
import torch
from reference import DEFAULTS, PUBLISHED, Example, Settings
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from latent_sft.config.schema import LatentConfig
from latent_sft.config.training import TrainConfig
from latent_sft.data.collate import stage1_batch, stage2_batch
from latent_sft.inference.generate import generate
from latent_sft.method.superposition import NOISE_DRAWS, gumbel
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import mix_latents
from latent_sft.models.stage1 import Stage1Model
from latent_sft.models.stage2 import Stage2Model

VOCAB, HIDDEN, EOS, PAD, END = 29, 16, 1, 1, (5, 6, 7)  # padding has the id of EOS, as for many tokenizers
SETTINGS = {"published": PUBLISHED, "defaults": DEFAULTS}
NORMALISATIONS = ("token", "segment", "sample")

EXAMPLES = [
    Example(prompt=[8, 9, 3, 4], cot=[10, 11, 12, 13, 14], end_think=list(END), answer=[20, EOS]),
    Example(prompt=[8, 4], cot=[15], end_think=list(END), answer=[21, 22, 23, EOS]),
    Example(prompt=[8, 9, 9, 3, 2, 4], cot=[11, 10, 12, 5], end_think=list(END), answer=[EOS]),
    Example(prompt=[9, 3, 4], cot=[16, 17, 10, 18, 19, 12, 13], end_think=list(END), answer=[24, 20, EOS]),
]


def llama(seed: int, tied: bool) -> LlamaForCausalLM:
    """Two layers, grouped heads, weights large enough that masks and positions matter."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).double()


def make_spec(settings: Settings, **changes: Any) -> LatentSpec:
    values = {name: getattr(settings, name) for name in ("rate", "top_k", "temperature", "projection", "exclude_end")}
    return LatentSpec(
        **{
            **values,
            "marker_positions": settings.marker_positions,
            "think_ids": (4,),
            "end_think_ids": END,
            "eos_id": EOS,
            "pad_id": PAD,
            "vocab_size": VOCAB,
            **changes,
        }
    )


def rows_of(examples: list[Example], rate: int) -> list[dict[str, Any]]:
    """Tokenised rows, as the data set holds them."""
    return [
        {
            "id": str(number),
            "hash": f"{number:016x}",
            "prompt": example.prompt,
            "cot": example.cot,
            "segment_lengths": [len(piece) for piece in reference.pieces_of(example, rate)],
            "answer": example.answer,
        }
        for number, example in enumerate(examples)
    ]


def random_labels(examples: list[Example], rate: int, top_k: int, seed: int = 3) -> list[Superposition]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for example in examples:
        num = len(reference.pieces_of(example, rate))
        ids = torch.rand(num, VOCAB, generator=generator).topk(top_k).indices
        found.append(Superposition(ids, torch.softmax(torch.randn(num, top_k, generator=generator), -1)))
    return found


def as_dicts(labels: list[Superposition]) -> list[list[dict[int, float]]]:
    return [
        [dict(zip(i.tolist(), w.tolist(), strict=True)) for i, w in zip(ids, weights.double(), strict=True)]
        for ids, weights in labels
    ]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Same parameters, and every difference below `tolerance` of the largest entry of that gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, f"{name}: the reference gradient is zero, this would test nothing"
        error = (found[name] - gradient).abs().max().item()
        assert error <= tolerance * scale, f"{name}: error {error:.3g} of {scale:.3g}"


def stage1_model(settings: Settings, tied: bool, **changes: Any) -> Stage1Model:
    marker = 0.3 * torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return Stage1Model(llama(0, tied), llama(1, tied), marker, make_spec(settings, **changes))


def stage1_result(model: Stage1Model, examples: list[Example], settings: Settings) -> Tensor:
    batch = stage1_batch(rows_of(examples, settings.rate), model.spec, loss_reduction=settings.loss_reduction)
    return settings.ce_weight * model(**batch).loss_sums["ce"] / batch["count_ce"]


def stage2_parts(
    model: Stage2Model, examples: list[Example], labels: list[Superposition], settings: Settings
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """CE sum, KL sum and their counts of a batch."""
    rows = rows_of(examples, settings.rate)
    store = {(row["id"], row["hash"]): label for row, label in zip(rows, labels, strict=True)}
    batch = stage2_batch(rows, model.spec, label_of=lambda *key: store[key], loss_reduction=settings.loss_reduction)
    out = model(**batch)
    return out.loss_sums["ce"], out.loss_sums["kl"], (batch["count_ce"], batch["count_kl"])


def assert_stage1_equals_reference(model: Stage1Model, examples: list[Example], settings: Settings) -> None:
    twin = copy.deepcopy(model)
    loss = stage1_result(model, examples, settings)
    loss.backward()
    expected = reference.stage1_loss(twin.encoder.model, twin.marker, twin.decoder, examples, settings)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(twin))


def test_settings_named_defaults_are_the_projects_defaults() -> None:
    latent, train = LatentConfig(), TrainConfig()
    for name in ("rate", "top_k", "temperature", "projection", "marker_positions", "exclude_end"):
        assert getattr(DEFAULTS, name) == getattr(latent, name), name
    for name in ("loss_reduction", "ce_weight", "kl_weight"):
        assert getattr(DEFAULTS, name) == getattr(train, name), name


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
@pytest.mark.parametrize("projection", ["input", "head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", SETTINGS)
def test_stage1_loss_and_gradients(name: str, tied: bool, projection: str, loss_reduction: str) -> None:
    settings = dataclasses.replace(SETTINGS[name], projection=projection, loss_reduction=loss_reduction)
    assert_stage1_equals_reference(stage1_model(settings, tied), EXAMPLES, settings)


@pytest.mark.parametrize(
    "change",
    [{"rate": 3}, {"rate": 1}, {"rate": 99}, {"top_k": 1}, {"top_k": VOCAB}, {"temperature": 4.0}, {"ce_weight": 0.5}],
    ids=str,
)
def test_stage1_with_other_settings(change: dict[str, Any]) -> None:
    settings = dataclasses.replace(DEFAULTS, **change)
    model = stage1_model(settings, tied=False)
    if settings.top_k == 1:  # the weight of a single entry is always 1: no gradient reaches the encoder
        model.encoder.requires_grad_(False)
        model.marker.requires_grad_(False)
    assert_stage1_equals_reference(model, EXAMPLES, settings)


def test_stage1_with_one_latent_a_step() -> None:
    lengths = [[1, 3, 1], [1], [2, 2], [4, 1, 2]]
    examples = [dataclasses.replace(e, segment_lengths=n) for e, n in zip(EXAMPLES, lengths, strict=True)]
    settings = dataclasses.replace(DEFAULTS, loss_reduction="segment")
    assert_stage1_equals_reference(stage1_model(settings, tied=True), examples, settings)


def test_latents_equal_the_reference() -> None:
    model = stage1_model(DEFAULTS, tied=False)
    latent = model.encode(stage1_batch(rows_of(EXAMPLES, 2), model.spec, loss_reduction="token"))
    for b, example in enumerate(EXAMPLES):
        for n, (ids, weights) in enumerate(
            reference.encode(model.encoder.model, model.marker, model.decoder, example, DEFAULTS)
        ):
            assert latent.ids[b, n].tolist() == ids.tolist()
            assert torch.allclose(latent.weights[b, n], weights, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 3.0)], ids=["equal", "weighted"])
def test_stage2_loss_and_gradients(weights: tuple[float, float], tied: bool, loss_reduction: str) -> None:
    settings = dataclasses.replace(PUBLISHED, loss_reduction=loss_reduction, ce_weight=weights[0], kl_weight=weights[1])
    model = Stage2Model(llama(2, tied), make_spec(settings))
    twin = copy.deepcopy(model)
    labels = random_labels(EXAMPLES, settings.rate, settings.top_k)
    ce, kl, counts = stage2_parts(model, EXAMPLES, labels, settings)
    loss = settings.ce_weight * ce / counts[0] + settings.kl_weight * kl / counts[1]
    loss.backward()
    expected, expected_ce, expected_kl = reference.stage2_loss(twin.lm, EXAMPLES, as_dicts(labels), settings)
    expected.backward()
    assert (ce / counts[0]).item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert (kl / counts[1]).item() == pytest.approx(expected_kl.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(twin))


def test_stage2_noise_perturbs_kl_target_and_input_alike() -> None:
    """Training with noise is training on labels that the reference has perturbed with the same draws."""
    settings = PUBLISHED
    model = Stage2Model(llama(2, True), make_spec(settings, noise_scale=1.0)).train()
    twin = copy.deepcopy(model)
    labels = random_labels(EXAMPLES, settings.rate, settings.top_k)
    torch.manual_seed(11)
    ce, kl, counts = stage2_parts(model, EXAMPLES, labels, settings)
    (ce / counts[0] + kl / counts[1]).backward()

    torch.manual_seed(11)
    width = max(len(label.ids) for label in labels)
    draws = gumbel((NOISE_DRAWS, len(labels), width, settings.top_k), None, torch.device("cpu"))
    noised = []
    for b, latents in enumerate(as_dicts(labels)):
        noised.append([])
        for n, latent in enumerate(latents):
            ids, chosen = list(latent), list(latent.values())
            for draw in draws[:, b, n].tolist():
                tried = reference.noisy_weights(list(latent.values()), draw, 1.0, 1.0, (-1.5, 3.0))
                if ids[tried.index(max(tried))] != END[0]:
                    chosen = tried
                    break
            noised[b].append(dict(zip(ids, chosen, strict=True)))
    expected, expected_ce, expected_kl = reference.stage2_loss(twin.lm, EXAMPLES, noised, settings)
    expected.backward()
    assert (ce / counts[0]).item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert (kl / counts[1]).item() == pytest.approx(expected_kl.item(), rel=1e-5)
    assert_same(gradients(model), gradients(twin))
    clean = stage2_parts(twin, EXAMPLES, labels, settings)[1].item()
    assert kl.item() != pytest.approx(clean, rel=1e-3), "the noise did nothing"


def test_stage2_is_not_noisy_outside_training() -> None:
    labels = random_labels(EXAMPLES, 2, 10)
    noisy = Stage2Model(llama(2, True), make_spec(PUBLISHED, noise_scale=1.0)).eval()
    clean = Stage2Model(llama(2, True), make_spec(PUBLISHED)).eval()
    for found, expected in zip(
        stage2_parts(noisy, EXAMPLES, labels, PUBLISHED), stage2_parts(clean, EXAMPLES, labels, PUBLISHED), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def widen(batch: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The same batch with `by` more columns of padding in every main track, and `by` more groups in the decoder."""
    out = dict(batch)
    length = batch["ids"].shape[1]
    main = {}
    for prefix in ("", "encoder_"):
        if prefix + "anchor" in batch:
            main[prefix] = batch[prefix + "ids"].shape[1] - batch[prefix + "anchor"][0].numel()
    for key, value in batch.items():
        prefix = "encoder_" if key.startswith("encoder_") else ""
        name = key.removeprefix("encoder_")
        if name in ("ids", "kind", "branch", "position", "time"):
            cut = main.get(prefix, value.shape[1])
            more = value.new_full((len(value), by), {"ids": PAD, "branch": -1, "time": -1}.get(name, 0))
            pieces = [value[:, :cut], more, value[:, cut:]]
            if "anchor" in batch and not prefix:
                pieces += [more] * batch["anchor"].shape[2]
            out[key] = torch.cat(pieces, dim=1)
        if key == "anchor":
            out[key] = nn.functional.pad(value, (0, 0, 0, by))
    new_length = out["ids"].shape[1]
    for key in {"target_index", "kl_index"} & batch.keys():
        row, column = batch[key] // length, batch[key] % length
        out[key] = row * new_length + column + by * (column >= main.get("", length))
    return out


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
def test_stage1_does_not_depend_on_padding_order_or_batch_split(loss_reduction: str) -> None:
    """Sums of cross-entropy and counts add over any split, so no grouping of examples changes the result."""
    model = stage1_model(DEFAULTS, tied=True)
    rows = rows_of(EXAMPLES, 2)

    def result(groups: list[list[int]], extra: int = 0) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        batches = [
            stage1_batch([rows[i] for i in group], model.spec, loss_reduction=loss_reduction) for group in groups
        ]
        count = sum(batch["count_ce"] for batch in batches)
        total = sum(model(**widen(batch, extra)).loss_sums["ce"] for batch in batches) / count
        total.backward()
        return total.item(), {name: g.clone() for name, g in gradients(model).items()}

    loss, expected = result([[0, 1, 2, 3]])
    for groups, extra in (([[3, 1, 0, 2]], 0), ([[0], [1], [2], [3]], 0), ([[2, 1], [3, 0]], 0), ([[0, 1, 2, 3]], 5)):
        other, found = result(groups, extra)
        assert other == pytest.approx(loss, rel=1e-6)
        assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("loss_reduction", NORMALISATIONS)
def test_stage2_does_not_depend_on_padding_order_or_batch_split(loss_reduction: str) -> None:
    settings = dataclasses.replace(DEFAULTS, loss_reduction=loss_reduction)
    model = Stage2Model(llama(2, False), make_spec(settings))
    rows, labels = rows_of(EXAMPLES, 2), random_labels(EXAMPLES, 2, 10)
    store = {row["id"]: label for row, label in zip(rows, labels, strict=True)}

    def result(groups: list[list[int]], extra: int = 0) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        ce = kl = count_ce = count_kl = 0
        for group in groups:
            batch = stage2_batch(
                [rows[i] for i in group], model.spec, label_of=lambda i, _: store[i], loss_reduction=loss_reduction
            )
            out = model(**widen(batch, extra))
            ce, kl = ce + out.loss_sums["ce"], kl + out.loss_sums["kl"]
            count_ce, count_kl = count_ce + batch["count_ce"], count_kl + batch["count_kl"]
        total = ce / count_ce + kl / count_kl
        total.backward()
        return total.item(), {name: g.clone() for name, g in gradients(model).items()}

    loss, expected = result([[0, 1, 2, 3]])
    for groups, extra in (([[3, 1, 0, 2]], 0), ([[0], [1], [2], [3]], 0), ([[2, 1], [3, 0]], 0), ([[0, 1, 2, 3]], 5)):
        other, found = result(groups, extra)
        assert other == pytest.approx(loss, rel=1e-6)
        assert_same(found, expected, tolerance=1e-6)


def test_latents_train_the_encoder_but_never_the_tables() -> None:
    model = llama(0, True)
    weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    mix_latents(model, Superposition(torch.tensor([[3, 4]]), weights)).sum().backward()
    assert weights.grad is not None and (weights.grad != 0).any()
    assert model.get_input_embeddings().weight.grad is None

    stage1 = stage1_model(DEFAULTS, tied=False)
    batch = stage1_batch(rows_of(EXAMPLES, 2), stage1.spec, loss_reduction="token")
    stage1.encode(batch).weights[..., 0].sum().backward()
    assert gradients(stage1).keys() & {"marker", "encoder.model.norm.weight"} == {"marker", "encoder.model.norm.weight"}
    assert not any(name.startswith("decoder") for name in gradients(stage1))


@pytest.mark.parametrize("limits", [{}, {"min_latents": 3}, {"max_latents": 2}], ids=str)
@pytest.mark.parametrize("seed", [2, 8, 11])  # stop after 0 to 7 latents, answers of 0 to 6 tokens
def test_batched_cached_decoding_equals_the_reference(seed: int, limits: dict[str, int]) -> None:
    model = llama(seed, tied=False).eval()
    with torch.no_grad():  # so that both end tokens come up in an untrained model
        model.lm_head.weight[[END[0], EOS]] *= 3.5
    spec = make_spec(DEFAULTS, max_answer_tokens=6, **{"max_latents": 7, **limits})
    prompts = [example.prompt for example in EXAMPLES]
    for prompt, found in zip(prompts, generate(model, spec, prompts, thinker="latent", batch_size=3), strict=True):
        expected = reference.decode(
            model,
            prompt,
            end_think=END,
            eos=EOS,
            top_k=spec.top_k,
            min_latents=spec.min_latents,
            max_latents=spec.max_latents,
            max_answer_tokens=spec.max_answer_tokens,
            exclude_end=spec.exclude_end,
        )
        assert found.num_steps == len(expected.latents)
        assert found.answer_ids == expected.answer
        assert found.finished == expected.finished
        for ids, weights, latent in zip(found.latent_ids, found.latent_weights, expected.latents, strict=True):
            assert dict(zip(ids.tolist(), weights.tolist(), strict=True)) == pytest.approx(latent, rel=1e-4, abs=1e-7)


def test_a_previous_marker_starts_from_the_next_token_prediction() -> None:
    """Zero vector, transparent positions: a marker is a second copy of the token before it, at the same position.

    Alone with the text before it, such a copy has the hidden state of that token: attention weights are split among two
    equal keys with equal values. So the first latent is the superposition of the model's own next-token logits.
    """
    spec = make_spec(DEFAULTS, marker_input="previous", exclude_end=False)
    lm = llama(3, True).eval()
    model = Stage1Model(lm, lm, torch.zeros(HIDDEN, dtype=torch.float64), spec).double().eval()
    example = dataclasses.replace(EXAMPLES[0], cot=EXAMPLES[0].cot[:1])
    latent = model.encode(stage1_batch(rows_of([example], 2), spec, loss_reduction="token"))
    # the reference: prompt and token, and the token once more at the same position
    ids = torch.tensor([[*example.prompt, *example.cot, example.cot[0]]])
    position = torch.tensor([[*range(len(example.prompt) + 1), len(example.prompt)]])
    # a mask is given, since transformers takes repeated positions without one for packed sequences
    mask = torch.ones_like(ids)
    logits = lm(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits[0, -1]
    values, kept = torch.sort(logits, descending=True)
    assert latent.ids[0, 0].tolist() == kept[: spec.top_k].tolist()
    expected = torch.softmax(values[: spec.top_k] / spec.temperature, -1)
    assert torch.allclose(latent.weights[0, 0].double(), expected, atol=1e-6)
