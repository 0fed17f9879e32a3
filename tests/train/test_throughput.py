"""Token batches, stored latents and the numbers of throughput change nothing in what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import latent_sft.train.loop as loop
import latent_sft.train.metrics as metrics
from latent_sft.data.collate import stage1_batch, stage2_batch
from latent_sft.data.labels import LabelStore
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.experiment.stores import make_labels, store_latents
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods import STAGES
from latent_sft.methods.cot import ExplicitModel, explicit_batch, explicit_lengths
from latent_sft.methods.latent_sft import FROZEN_ENCODER, oracle_latents, phase_start
from latent_sft.models.load import load_lm
from latent_sft.train.flops import peak_of, step_flops
from latent_sft.train.run import last_checkpoint, train_stage
from latent_sft.train.sampler import TokenBatchSampler


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def assert_same_weights(one: Path, two: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_token_batches_give_the_loss_of_the_whole_step(tiny_config):
    """The first step is four micro-batches; its loss is that of their union in one batch, and is divided once."""
    config = tiny_config("cot.max_tokens=150", "cot.gradient_accumulation_steps=4", "cot.max_steps=2")
    step = train_stage(config, "cot")
    work = Workspace(config)
    sampler = TokenBatchSampler(explicit_lengths(work.data["train"], work.spec, with_cot=True), 150, 4, 0, "cot")
    batches = list(sampler)
    model = ExplicitModel(load_lm(work.base, config.model))
    union = [work.data["train"][i] for batch in batches[:4] for i in batch]
    batch = explicit_batch(union, work.spec, with_cot=True, loss_reduction="token")
    expected = (model(**batch).loss_sums["ce"] / batch["count_ce"]).item()
    assert logged(step.directory, "train/loss")[0] == pytest.approx(expected, rel=1e-5)
    assert step.results()["examples_seen"] == sum(map(len, batches[:8]))
    assert step.results()["steps"] == 2


def test_epochs_of_token_batches_are_whole(tiny_config):
    """Steps an epoch are known in advance: two epochs show every example twice."""
    config = tiny_config("no_cot.max_tokens=600", "no_cot.max_steps=0", "no_cot.epochs=2", "no_cot.eval_every=0")
    results = train_stage(config, "no-cot").results()
    assert results["examples_seen"] == 240
    assert logged(Path(config.directory) / "no-cot", "train/epoch")[-1] == 2


def test_a_run_of_token_batches_resumes_in_the_middle_of_an_epoch(tiny_config, tmp_path):
    settings = ("cot.max_tokens=1200", "cot.max_steps=8", "cot.gradient_accumulation_steps=2")
    whole = train_stage(tiny_config(f"run_dir={tmp_path / 'whole'}", *settings), "cot")
    epochs = sorted(set(logged(whole.directory, "train/epoch")))
    assert epochs[3] == pytest.approx(4 / 3), "the checkpoint of step 4 lies within the second epoch"

    config = tiny_config(f"run_dir={tmp_path / 'cut'}", *settings)

    class Killed(BaseException):
        pass

    original = loop.StageProgress.advance

    def stop_at_five(self, state):
        original(self, state)
        if state.global_step == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StageProgress, "advance", stop_at_five)
        with pytest.raises(Killed):
            train_stage(config, "cot")
    assert last_checkpoint(tmp_path / "cut" / "cot").endswith("checkpoint-4")
    resumed = train_stage(config, "cot")
    assert logged(resumed.directory, "train/loss")[-4:] == pytest.approx(
        logged(whole.directory, "train/loss")[-4:], rel=1e-5
    )
    assert_same_weights(resumed.final, whole.final)
    assert resumed.results()["examples_seen"] == whole.results()["examples_seen"]


def test_an_example_beyond_the_budget_is_one_clear_error(tiny_config):
    with pytest.raises(ConfigError, match=r"stage1\.union\.max_tokens: got 20, expected at least \d+.*data\.max_cot"):
        train_stage(
            tiny_config("stage1.union.max_tokens=20", "stage1.encoder.enabled=false", "stage1.decoder.enabled=false"),
            "stage1-union",
        )


def test_settings_that_do_not_apply_do_not_make_another_experiment(tiny_config):
    work = Workspace(tiny_config())
    steps = {}
    for settings in ((), ("cot.max_tokens=500", "cot.micro_batch_size=3"), ("stage1.attention=dense",)):
        work.config = tiny_config(*settings)
        steps[settings[:1]] = work.step("cot").inputs["train"], work.step("stage1-union").fingerprint
    (plain, auto), (tokens, _), (_, dense) = steps.values()
    assert plain["micro_batch_size"] == 8 and "max_tokens" not in plain
    assert tokens["max_tokens"] == 500 and "micro_batch_size" not in tokens
    assert dense == auto


@pytest.mark.parametrize("encoder_phase", ["true", "false"])
def test_stored_latents_are_those_of_the_frozen_encoder(tiny_config, encoder_phase):
    """Loss and gradients of the decoder phase, with latents read and with the encoder run again."""
    config = tiny_config(f"stage1.encoder.enabled={encoder_phase}", "latent.marker_input=previous")
    work = Workspace(config)
    if encoder_phase == "true":
        train_stage(config, "stage1-encoder", work)
    store_latents(work, "stage1-decoder")
    read = STAGES["stage1-decoder"].batch(work.setup("stage1-decoder"))
    rows = work.data["train"].select([0, 30, 60, 119]).to_list()
    stored, fresh = read(rows), stage1_batch(rows, work.spec, loss_reduction="token")
    assert not any(key.startswith("encoder_") for key in stored)
    assert torch.equal(stored["latent_mask"], fresh["latent_mask"])
    results = []
    for batch in (stored, fresh):
        model = STAGES["stage1-decoder"].model(work.setup("stage1-decoder")).train()
        out = model(**batch)
        out.loss_sums["ce"].backward()
        latent = (batch["latent_ids"], batch["latent_weights"]) if "latent_ids" in batch else model.encode(batch)
        results.append(
            (out.loss_sums["ce"], latent, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    (one, latent_one, grads_one), (two, latent_two, grads_two) = results
    mask = fresh["latent_mask"]
    assert torch.equal(latent_one[0][mask], latent_two[0][mask])
    torch.testing.assert_close(latent_one[1][mask], latent_two[1][mask], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert grads_one.keys() == grads_two.keys() and grads_one
    assert all(name.startswith("decoder.") for name in grads_one)
    for name, grad in grads_one.items():
        torch.testing.assert_close(grad, grads_two[name], rtol=1e-4, atol=1e-5)


def test_the_decoder_phase_stores_latents_once_and_says_where_they_belong(tiny_config):
    config = tiny_config("stage1.encoder.enabled=false", "stage1.noise_scale=1.0", "stage1.decoder.max_steps=20")
    work = Workspace(config)
    step = train_stage(config, "stage1-decoder", work)
    store = work.store_step(FROZEN_ENCODER)
    assert store.directory == Path(config.directory) / "stage1-decoder-latents"
    assert store.results()["num_rows"] == len(LabelStore(store.directory / "store")) == 120
    assert store.inputs["dtype"] == "float32"
    assert step.results()["examples_seen"] == 120 + 5 * 8  # the first 15 steps are an epoch

    # a damaged shard: the message says which command makes it again, and that command does
    shard = store.directory / "store" / "labels-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtefactError, match="delete it and run latent-sft train stage1-decoder again"):
        STAGES["stage1-decoder"].batch(work.setup("stage1-decoder"))
    shard.unlink()
    kept = (store.directory / "store" / "labels-00000.arrow").stat().st_mtime_ns
    store_latents(work, "stage1-decoder")
    assert (store.directory / "store" / "labels-00000.arrow").stat().st_mtime_ns == kept
    STAGES["stage1-decoder"].batch(work.setup("stage1-decoder"))


def test_workers_never_build_masks(tiny_config):
    """No batch holds a square of the sequence: its tensors grow with rows x length, not with length squared."""
    config = tiny_config("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
    work = Workspace(config)
    rows = work.data["train"].select(range(6)).to_list()

    def label_of(*_):
        return next(stored)

    stored = iter(list(oracle_latents(phase_start(work.setup("stage1-union")), rows, 8)))
    batches = [
        explicit_batch(rows, work.spec, with_cot=True, loss_reduction="token"),
        stage1_batch(rows, work.spec, loss_reduction="token"),
        stage2_batch(rows, work.spec, label_of=label_of, loss_reduction="token"),
    ]
    for batch in batches:
        lengths = {batch[k].shape[1] for k in ("kind", "encoder_kind") if k in batch}
        for name, value in batch.items():
            assert sum(size in lengths for size in value.shape) <= 1, name
            assert value.numel() <= len(rows) * max(lengths) * work.spec.top_k, name


def test_flops_by_hand(tiny_config):
    """Two layers of width 16, two heads of 8; MLP 3 x 16 x 32, attention 4 x 16 x 16, norms 5 x 16."""
    config = tiny_config("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
    work = Workspace(config)
    rows = work.data["train"].select([0, 1]).to_list()
    weights = 2 * (3 * 16 * 32 + 4 * 16 * 16) + 5 * 16
    table = work.spec.vocab_size * 16
    batch = explicit_batch(rows, work.spec, with_cot=True, loss_reduction="token")
    model = ExplicitModel(load_lm(work.base, config.model))
    lengths = [len(r["prompt"]) + len(r["cot"]) + len(work.spec.end_think_ids) + len(r["answer"]) for r in rows]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    labels = len(batch["targets"])
    expected = 6 * weights * sum(lengths) + 6 * table * labels + 3 * 2 * 4 * 16 * pairs
    assert step_flops(model, batch).item() == expected

    # stage 1: the encoder's markers see half of its text on average, and are projected over the vocabulary; the last
    # token of every chunk and of the answer, and the encoder's </think>, are seen by nobody
    batch = stage1_batch(rows, work.spec, loss_reduction="token")
    end = len(work.spec.end_think_ids)
    decoder = encoder = 0
    for r in rows:
        n, text = len(r["segment_lengths"]), len(r["prompt"]) + len(r["cot"])
        main, chunks = len(r["prompt"]) + n + end + len(r["answer"]) - 1, sum(m - 1 for m in r["segment_lengths"][1:])
        decoder += 6 * weights * (main + chunks) + 3 * 2 * 4 * 16 * main * (main + 1) / 2
        encoder += 6 * weights * (text + n) + 3 * 2 * 4 * 16 * (text * (text + 1) / 2 + n * text / 2) + 4 * table * n
    decoder += 6 * table * len(batch["targets"])
    union = STAGES["stage1-union"].model(work.setup("stage1-union"))
    assert step_flops(union, batch).item() == pytest.approx(decoder + encoder)
    # a frozen encoder only runs forward; so does the projection of its latents
    union.encoder.requires_grad_(False)
    union.marker.requires_grad_(False)
    projection = 4 * table * sum(len(r["segment_lengths"]) for r in rows)
    only_forward = (encoder - projection) / 3 + projection / 2
    assert step_flops(union, batch).item() == pytest.approx(decoder + only_forward)
    # and a frozen decoder, which passes gradients on to the encoder, saves those of its own weights
    union.requires_grad_(True)
    union.decoder.requires_grad_(False)
    tokens = (batch["kind"] > 0).sum().item()
    saved = 2 * weights * tokens + 2 * table * len(batch["targets"])
    assert step_flops(union, batch).item() == pytest.approx(decoder + encoder - saved)


def test_devices_by_name():
    assert peak_of("NVIDIA H200") == peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA GeForce RTX 3090") is None


def test_mfu_is_operations_over_time_and_peak(tiny_config, monkeypatch):
    monkeypatch.setattr(metrics, "device_peak", lambda: 1e9)
    config = tiny_config("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
    folders = [train_stage(config, "stage1-union").directory]
    make_labels(config)
    folders.append(train_stage(config, "stage2").directory)
    for folder in folders:
        mfu, speed = logged(folder, "train/mfu"), logged(folder, "train/tokens_per_second")
        assert len(mfu) == 4 and min(mfu) > 0
        # a token costs at least 6 N, so the two numbers bound each other
        weights = 2 * (3 * 16 * 32 + 4 * 16 * 16)
        assert all(share * 1e9 > 6 * weights * rate for share, rate in zip(mfu, speed, strict=True))
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert all(f"`train/{tag}`" in documented for tag in ("mfu", "peak_memory_gib"))
