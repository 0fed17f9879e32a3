"""The backends of stage 1 on whole models: every family, ragged batches, checkpointing, LoRA, autocast, compile."""

from __future__ import annotations

import pytest
import torch
from models.families import FAMILIES, build
from models.test_families import SPEC, row
from torch.utils._python_dispatch import TorchDispatchMode

from latent_sft.config.schema import LoraConfig
from latent_sft.data.collate import encoder_batch, stage1_batch
from latent_sft.errors import ConfigError
from latent_sft.models.attention import use_backend
from latent_sft.models.load import add_lora, initial_marker
from latent_sft.models.stage1 import Stage1Model

# r divides the CoT and not, a CoT shorter than r, one latent, no answer
ROWS = [row(0, 3, 7), row(1, 6, 1), row(2, 2, 4), {**row(3, 4, 5), "answer": []}]


def stage1(family: str, attention: str, **options: int) -> Stage1Model:
    encoder, decoder = build(family, seed=1, scale=3.0), build(family, seed=2, scale=3.0)
    return Stage1Model(encoder, decoder, initial_marker(encoder, SPEC), SPEC, attention, **options)


def run(model: Stage1Model, batch: dict, dtype: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(**batch).loss_sums["ce"]
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=scale)).item()


def assert_same(found: tuple, expected: tuple, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    scale = 1e-2 * max(g.abs().max().item() for g in expected[1].values())
    for name, gradient in found[1].items():
        assert relative(gradient, expected[1][name], scale) <= tolerance, name


@pytest.mark.parametrize("family", FAMILIES)
def test_two_track_equals_dense(family: str) -> None:
    fast, dense = stage1(family, "auto"), stage1(family, "dense")
    assert fast.encoder_attention == fast.decoder_attention == "two_track"
    batch = stage1_batch(ROWS, SPEC, loss_reduction="token")
    assert_same(run(fast, batch), run(dense, batch), 1e-5)
    ours, theirs = (m.encode(encoder_batch(ROWS, SPEC)) for m in (fast, dense))
    real = batch["latent_mask"]
    assert torch.equal(ours.ids[real], theirs.ids[real])
    assert torch.allclose(ours.weights[real], theirs.weights[real], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_and_lora_change_nothing(family: str) -> None:
    results = []
    batch = stage1_batch(ROWS, SPEC, loss_reduction="token")
    for attention, checkpointing in (("two_track", True), ("dense", False)):
        model = stage1(family, attention)
        for name in ("encoder", "decoder"):
            lm = getattr(model, name)
            if checkpointing:
                lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            torch.manual_seed(0)
            setattr(model, name, add_lora(lm, LoraConfig(rank=2, alpha=4)))
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=generator)
        results.append(run(model, batch))
    assert any("lora_A" in name for name in results[0][1])
    assert_same(*results, 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_low_precision_is_within_twice_the_plain_error(family: str) -> None:
    batch = stage1_batch(ROWS, SPEC, loss_reduction="token")
    exact = run(stage1(family, "dense"), batch)
    plain = run(stage1(family, "dense"), batch, torch.bfloat16)
    fast = run(stage1(family, "two_track"), batch, torch.bfloat16)

    def error(result: tuple) -> float:
        differences = torch.cat([(result[1][n] - g).flatten() for n, g in exact[1].items()])
        return differences.norm().item()

    assert error(fast) <= 2 * error(plain) and error(plain) > 0
    assert abs(fast[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 1e-2 * exact[0]


def test_compiles_without_a_graph_break_in_the_layers() -> None:
    batch = stage1_batch(ROWS, SPEC, loss_reduction="token")
    plain = run(stage1("llama", "two_track"), batch)
    model = stage1("llama", "two_track")
    for lm in (model.encoder, model.decoder):
        for layer in lm.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(model, batch), plain, 1e-5)


class Largest(TorchDispatchMode):
    """Remembers the largest numbers of rows and columns that any tensor had in its last two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.square = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value.ndim >= 2:
                self.square = max(self.square, min(value.shape[-2:]))
        return out


@pytest.mark.parametrize(("attention", "expected"), [("two_track", False), ("dense", True)])
def test_no_square_mask_exists_on_the_fast_path(attention: str, expected: bool) -> None:
    """640 tokens: no tensor has two last dimensions of more than the largest block."""
    rows = [{**row(0, 20, 600), "cot": [6] * 600, "segment_lengths": [4] * 150}]
    model = stage1("llama", attention)
    with Largest() as seen:
        model(**stage1_batch(rows, SPEC, loss_reduction="token")).loss_sums["ce"].backward()
    assert (seen.square > 128) == expected


def test_a_trained_decoder_still_decodes_and_saves_plainly(tmp_path) -> None:
    model = stage1("gemma2", "two_track")
    ids = torch.arange(5, 12)[None]
    plain = build("gemma2", seed=2, scale=3.0)
    assert torch.allclose(model.decoder(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    model.decoder.save_pretrained(tmp_path)
    assert "two_track" not in (tmp_path / "config.json").read_text()


def test_backends_that_cannot_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage1.attention: got 'fast', expected one of auto, two_track"):
        use_backend(build("llama"), "fast")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="flex needs a CUDA device"):
            use_backend(build("llama"), "flex")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ConfigError, match="GPT2LMHeadModel has no FlexAttention; use auto, two_track or dense"):
            use_backend(build("gpt2"), "flex")
    closed = build("llama")
    closed._supports_attention_backend = False
    assert use_backend(closed, "auto") == "dense"
    with pytest.raises(ConfigError, match="only dense works"):
        use_backend(closed, "two_track")


def test_windows_are_refused_by_what_they_would_hide() -> None:
    model = stage1("mistral", "two_track")
    model.decoder.config.sliding_window = model.encoder.config.sliding_window = 10
    short = stage1_batch([row(0, 3, 6)], SPEC, loss_reduction="token")  # encoder text: 4 + 6 tokens
    model(**short)
    with pytest.raises(ConfigError, match="sliding-window attention of 10 with a stage-1 sequence of 11 tokens"):
        model(**stage1_batch([row(0, 3, 7)], SPEC, loss_reduction="token"))
