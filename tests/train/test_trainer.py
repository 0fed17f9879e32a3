"""The loss does not depend on how a global batch is cut, on padding, or on an interruption."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_sft.data.collate import stage1_batch
from latent_sft.data.labels import LabelStore
from latent_sft.errors import ArtefactError, TrainingError
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods import SECTIONS
from latent_sft.methods.latent_sft import LABELS, load_stage1
from latent_sft.train.guards import check_rows, said_if_alone, stop_unless_finite
from latent_sft.train.run import last_checkpoint, train_stage
from latent_sft.train.sampler import LengthBucketSampler

STAGES = ("no-cot", "cot", "stage1-encoder", "stage1-decoder", "stage1-union")


def logged(folder: Path, tag: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[tag] for line in lines if tag in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize("loss_reduction", ["token", "sample"])
def test_accumulation_gives_the_losses_of_one_large_batch(tiny_config, tmp_path, loss_reduction):
    runs = {}
    for name, batch, accumulation in (("whole", 8, 1), ("cut", 2, 4)):
        config = tiny_config(
            f"run_dir={tmp_path / name}",
            f"cot.micro_batch_size={batch}",
            f"cot.gradient_accumulation_steps={accumulation}",
            f"cot.loss_reduction={loss_reduction}",
        )
        # the same order of examples: the sampler buckets by the global batch
        config_step = train_stage(config, "cot")
        runs[name] = (logged(config_step.directory, "train/loss"), logged(config_step.directory, "train/grad_norm"))
    assert len(runs["whole"][0]) == 4
    assert runs["cut"][0] == pytest.approx(runs["whole"][0], rel=1e-4)
    assert runs["cut"][1] == pytest.approx(runs["whole"][1], rel=1e-3)


def test_a_global_batch_decides_the_accumulation(tiny_config, tmp_path, caplog):
    """The step of eight examples and its losses stay, and the job says what a step takes."""
    found = []
    for name, settings in (
        ("whole", ["cot.micro_batch_size=8"]),
        ("cut", ["cot.micro_batch_size=2", "cot.global_batch_size=8"]),
    ):
        with caplog.at_level("INFO", logger="latent_sft"):
            step = train_stage(tiny_config(f"run_dir={tmp_path / name}", *settings), "cot")
        found.append(logged(step.directory, "train/loss"))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert "cot: a step takes 8 examples (8 a micro-batch x accumulation 1 x 1 process)" in caplog.text
    assert "cot: a step takes 8 examples (2 a micro-batch x accumulation 4 x 1 process)" in caplog.text


def test_a_stage_is_the_same_however_its_batch_is_cut_and_its_adapters_are_said(tiny_config):
    """Equal fingerprints; and another where the step has another size, the adapters another scale."""
    plain = ["cot.micro_batch_size=2", "cot.global_batch_size=8", "model.lora.rank=4"]
    ways = [
        [],
        ["cot.micro_batch_size=4"],
        ["model.lora.alpha=8"],
        ["cot.global_batch_size=16"],
        ["model.lora.alpha=4"],
    ]
    first, *others = (Workspace(tiny_config(*plain, *way)).step("cot").fingerprint for way in ways)
    assert [other == first for other in others] == [True, True, False, False]


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_config, tmp_path):
    """Stop after the first of two checkpoints by deleting everything the second half wrote, and run again."""
    whole = train_stage(tiny_config(f"run_dir={tmp_path / 'whole'}"), "cot")

    config = tiny_config(f"run_dir={tmp_path / 'cut'}")

    class Killed(BaseException):
        pass

    import latent_sft.train.loop as loop

    original = loop.StageProgress.advance

    def stop_at_three(self, state):
        original(self, state)
        if state.global_step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StageProgress, "advance", stop_at_three)
        with pytest.raises(Killed):
            train_stage(config, "cot")
    folder = tmp_path / "cut" / "cot"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "running"
    assert last_checkpoint(folder).endswith("checkpoint-2")
    resumed = train_stage(config, "cot")
    assert logged(resumed.directory, "train/loss")[-2:] == pytest.approx(
        logged(whole.directory, "train/loss")[-2:], rel=1e-5
    )
    for name, value in weights(whole.directory).items():
        torch.testing.assert_close(weights(resumed.directory)[name], value, rtol=1e-5, atol=1e-6)


def test_every_stage_one_phase_trains_what_it_should(tiny_config):
    """Encoder phase moves the encoder and the marker only, decoder phase the decoder only, union both."""
    config = tiny_config("stage1.init=cot")

    def parts(name: str) -> dict[str, dict[str, torch.Tensor]]:
        folder = train_stage(config, name).final
        found = {part: load_file(folder / part / "model.safetensors") for part in ("encoder", "decoder")}
        return {**found, "marker": load_file(folder / "marker.safetensors")}

    def moved(a, b):
        return any(not torch.equal(a[name], b[name]) for name in a)

    start = load_file(train_stage(config, "cot").final / "model.safetensors")
    encoder = parts("stage1-encoder")
    assert moved(encoder["encoder"], start)
    assert not moved(encoder["decoder"], start)
    decoder = parts("stage1-decoder")
    assert not moved(decoder["encoder"], encoder["encoder"])
    assert not moved(decoder["marker"], encoder["marker"])
    assert moved(decoder["decoder"], encoder["decoder"])
    union = parts("stage1-union")
    for part in ("encoder", "decoder", "marker"):
        assert moved(union[part], decoder[part])


def test_lora_trains_adapters_and_saves_a_merged_model(tiny_config):
    config = tiny_config("model.lora.rank=2", "model.lora.alpha=4")
    step = train_stage(config, "cot")
    results = step.results()
    assert 0 < results["trained_parameters"] < 0.5 * results["parameters"]
    base = load_file(step.directory.parent / "base" / "final" / "model.safetensors")
    tuned = weights(step.directory)
    assert tuned.keys() == base.keys()
    assert torch.equal(tuned["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(tuned["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_gradient_checkpointing_changes_nothing(tiny_config, tmp_path):
    losses = [
        logged(
            train_stage(
                tiny_config(
                    f"run_dir={tmp_path / flag}",
                    f"stage1.union.gradient_checkpointing={flag}",
                    "stage1.encoder.enabled=false",
                    "stage1.decoder.enabled=false",
                ),
                "stage1-union",
            ).directory,
            "train/loss",
        )
        for flag in ("false", "true")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_stage_stops_when_it_has_converged(tiny_config):
    config = tiny_config("cot.max_steps=50", "cot.stop_at_accuracy=1e-9")
    import latent_sft.train.loop as loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validation_metrics", lambda *_: {"accuracy": 0.5})
        step = train_stage(config, "cot")
    assert step.results()["steps"] == 2


def test_a_finished_stage_is_skipped_and_another_experiment_is_refused(tiny_config):
    config = tiny_config()
    first = train_stage(config, "no-cot").results()
    assert train_stage(config, "no-cot").results() == first
    with pytest.raises(ArtefactError, match=r"train.learning_rate was 0.003, now 0.5"):
        train_stage(tiny_config("no_cot.learning_rate=0.5"), "no-cot")


def test_a_stage_without_its_source_says_what_to_run(tiny_config):
    with pytest.raises(ArtefactError, match="not finished yet; run that step first"):
        train_stage(tiny_config("stage1.init=cot"), "stage1-encoder")


def test_a_non_finite_gradient_stops_at_its_step_and_saves_the_ids(tiny_config):
    """The second step's weights are what a learning rate of 1e30 made of them."""
    ruin = ["cot.learning_rate=1e30", "cot.warmup_ratio=0", "cot.max_grad_norm=1e30"]
    config = tiny_config(
        *ruin, "cot.micro_batch_size=4", "cot.gradient_accumulation_steps=2", "cot.log_every=100", "cot.save_every=1"
    )
    with pytest.raises(TrainingError, match=r"step \d: the loss is .*non_finite.json.*learning rate"):
        train_stage(config, "cot")
    folder = Path(config.directory) / "cot"
    found = json.loads((folder / "non_finite.json").read_text(), parse_constant=pytest.fail)
    assert found["step"] > 1 and last_checkpoint(folder).endswith(f"checkpoint-{found['step'] - 1}")
    assert found["gradient_norm"] in ("nan", "inf")
    assert [batch["process"] for batch in found["batches"]] == [0, 0]
    # the rows of that step, in order: the sampler says which they are
    data = Workspace(config).data["train"]
    order = list(LengthBucketSampler(list(data["length"]), 8, config.seed))
    first = 8 * (found["step"] - 1)
    assert [i for batch in found["batches"] for i in batch["ids"]] == [data[n]["id"] for n in order[first : first + 8]]


def test_finite_steps_pass_and_any_other_value_stops(tmp_path):
    good, ids = [torch.tensor(1.0), torch.tensor(2.0)], [["a"], ["b", "c"]]
    stop_unless_finite(7, torch.tensor(0.0), good, ids, tmp_path)
    stop_unless_finite(7, 3.5, good, ids, tmp_path)
    assert not list(tmp_path.iterdir())
    bad = [good[0], torch.tensor(torch.nan)]
    for norm, losses in ((-1.0, good), (float("inf"), good), (torch.tensor(1.0), bad)):
        with pytest.raises(TrainingError, match="step 7"):
            stop_unless_finite(7, norm, losses, ids, tmp_path)
        found = json.loads((tmp_path / "non_finite.json").read_text(), parse_constant=pytest.fail)
        assert [batch["ids"] for batch in found["batches"]] == ids
    assert [batch["loss"] for batch in found["batches"]] == [1.0, "nan"]


def test_too_few_rows_for_a_step_are_refused(tiny_config):
    with pytest.raises(TrainingError, match=r"no_cot: 6 training rows, but one .* 8 \(no_cot.micro_batch_size=8 x"):
        train_stage(tiny_config("data.synthetic.num_train=6"), "no-cot")
    train = tiny_config("cot.gradient_accumulation_steps=2").cot
    check_rows(48, train, "cot", 3)
    with pytest.raises(
        TrainingError, match=r"47 training rows, but .* takes 48 .*gradient_accumulation_steps=2 x 3 processes"
    ):
        check_rows(47, train, "cot", 3)


def test_a_lost_process_is_said():
    lost = pytest.raises(TrainingError, match=r"did not answer for 0.5 minutes \(launch.timeout_minutes\)")
    with lost, said_if_alone(0.5):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="shapes"), said_if_alone(0.5):
        raise RuntimeError("shapes do not match")


def test_every_logged_tag_is_documented(tiny_config):
    config = tiny_config("stage1.encoder.enabled=false", "stage1.decoder.enabled=false")
    from latent_sft.experiment.stores import make_labels

    folders = [train_stage(config, "stage1-union").directory]
    make_labels(config)
    folders += [train_stage(config, name).directory for name in ("stage2", "kava", "coconut")]
    tags = set()
    for folder in folders:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            tags |= json.loads(line).keys() - {"step", "seconds"}
        assert list((folder / "tensorboard").glob("events*"))
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    missing = sorted(tag for tag in tags if f"`{tag}`" not in documented)
    assert not missing, f"docs/metrics.md does not define {missing}"
    assert {"train/loss_ce", "train/loss_kl", "eval/accuracy", "train/latent_entropy", "train/end_token_rate"} <= tags
    assert {"train/loss_teacher_ce", "train/loss_hidden", "train/loss_kv", "train/kv_short", "train/kv_cosine"} <= tags


def test_the_sampler_yields_every_example_once_in_an_order_of_seed_and_epoch():
    lengths = [n % 17 + 1 for n in range(103)]
    sampler = LengthBucketSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(103))
    assert first == list(LengthBucketSampler(lengths, 8, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = [max(b) - min(b) for b in ([lengths[i] for i in first[k : k + 8]] for k in range(0, 96, 8))]
    assert max(spread) <= 2  # random batches of these lengths spread over about 14


def test_disk_full_while_saving_the_final_model_loses_nothing(tiny_config, monkeypatch):
    config = tiny_config()
    import latent_sft.models.load as load

    work = Workspace(config)  # the base model is written before the disk fills up

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(load, "unwrap_peft", lambda lm: type("Full", (), {"save_pretrained": full})())
        with pytest.raises(ArtefactError, match="No space left on device"):
            train_stage(config, "no-cot", work)
    folder = Path(config.directory) / "no-cot"
    assert last_checkpoint(folder) is not None  # training goes on from here
    assert not (folder / "final").exists()
    assert train_stage(config, "no-cot").results()["steps"] == 4
    shutil.rmtree(folder)


def test_a_collapse_is_said_once(tiny_config, caplog):
    """A superposition temperature near zero puts all weight on one token: entropy 0."""
    config = tiny_config("stage1.encoder.enabled=false", "stage1.decoder.enabled=false", "latent.temperature=1e-4")
    with caplog.at_level("WARNING", logger="latent_sft"):
        train_stage(config, "stage1-union")
    assert caplog.text.count("the latents are collapsing") == 1
    assert "latent.temperature" in caplog.text


def test_noise_of_stage_one_begins_late_and_never_touches_evaluation(tiny_config):
    """Half of four steps without noise: equal losses; then other losses. Labels and validation see clean latents."""
    losses = []
    for scale in (0.0, 2.0):
        config = tiny_config(
            f"run_dir={tiny_config().directory}-{scale}",
            "stage1.encoder.enabled=false",
            "stage1.decoder.enabled=false",
            f"stage1.noise_scale={scale}",
        )
        losses.append(logged(train_stage(config, "stage1-union").directory, "train/loss"))
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]
    model = load_stage1(
        Path(config.directory) / "stage1-union" / "final", config.model, config.model, Workspace(config).spec
    ).eval()
    model.noise_scale = 2.0
    batch = stage1_batch(Workspace(config).data["train"].select(range(4)).to_list(), model.spec, loss_reduction="token")
    assert torch.equal(model(**batch).loss_sums["ce"], model(**batch).loss_sums["ce"])


def test_latents_of_the_whole_vocabulary_are_trained_and_learnt(tiny_config):
    """`latent.top_k=0`, the paper's definition, is top_k of the vocabulary's size: the same steps."""
    settings = ("stage1.encoder.enabled=false", "stage1.decoder.enabled=false", "stage1.union.max_steps=1")
    config = tiny_config(*settings, "stage1.union.eval_every=1", "stage2.eval_every=4", "latent.top_k=0")
    work = Workspace(config)
    train_stage(config, "stage1-union", work)
    make_labels(config, work)
    step = train_stage(config, "stage2", work)
    store = LabelStore(work.store_step(LABELS).directory / "store", expect=work.store_made_from(LABELS))
    assert store.top_k == work.spec.top_k == work.spec.vocab_size
    assert all(map(math.isfinite, logged(step.directory, "train/loss_kl")))
    named = tiny_config(*settings, "stage1.union.eval_every=1", f"latent.top_k={work.spec.vocab_size}")
    assert Workspace(named).store_step(LABELS).is_finished()


@pytest.mark.parametrize(("stage", "part"), [("cot", "."), ("stage1-encoder", "encoder"), ("codi", ".")])
def test_a_whole_model_of_bfloat16_keeps_small_updates(tiny_config, tmp_path, stage, part):
    """A step of 1e-5 is less than half of what bfloat16 tells apart in most weights; all of them have to move."""
    config = tiny_config("model.dtype=bfloat16", f"{SECTIONS[stage]}.learning_rate=1e-5")
    step = train_stage(config, stage)
    ours = load_file(step.final / part / "model.safetensors")
    base = weights(tmp_path / "run" / "base")
    moved = sum((ours[name] != base[name].to(ours[name].dtype)).sum().item() for name in ours)
    assert moved > 0.99 * sum(value.numel() for value in ours.values())
