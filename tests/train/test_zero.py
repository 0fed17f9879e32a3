"""ZeRO 1, 2 and 3 on two real processes train what one process trains; what overrides the configuration is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.zero_job import HALVES, PHASES, THOUGHTS, UNION, config_of, train_all, train_with_own_latents

from latent_sft.errors import ConfigError, TrainingError
from latent_sft.experiment.workspace import Workspace
from latent_sft.methods import STAGES
from latent_sft.methods.latent_sft import load_stage1
from latent_sft.train import zero
from latent_sft.train.run import train_stage

TESTS = Path(__file__).parents[1]


def started(*arguments: object) -> subprocess.Popen[str]:
    """Start the job on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launcher, str(TESTS / "train" / "zero_job.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with runs `one`, `shared` (one process) and `zero1` to `zero3`, `zero3-shared`, `zero*-halves` (two)."""
    folder = tmp_path_factory.mktemp("zero")
    job = started(folder)
    try:
        train_all(config_of(folder, "one", 0), kill=False)
        train_stage(config_of(folder, "shared", 0, shared=True), "stage1-union")
        train_with_own_latents(config_of(folder, "own", 0, *UNION))
        output, _ = job.communicate(timeout=400)
    finally:
        job.kill()
    assert job.returncode == 0, output[-4000:]
    return folder


def logged(folder: Path, tag: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[tag] for line in lines if tag in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "final").rglob("*.safetensors"))
    assert files
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


CASES = [(f"zero{level}", "one", stage) for level in (1, 2, 3) for stage in (*PHASES, "stage2")]
CASES += [("zero3", "one", stage) for stage in THOUGHTS]  # the level that takes every parameter apart


MORE = [("zero3-shared", "shared", "stage1-union"), ("zero3-own", "own", "stage2")]


@pytest.mark.parametrize(("run", "reference", "stage"), [*CASES, *MORE])
def test_two_processes_with_zero_equal_one(trained, run, reference, stage):
    """Losses, gradient norms, decoded validation and final weights; stage 2 was killed once and resumed."""
    ours, expected = trained / run / stage, trained / reference / stage
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate"):
        assert len(logged(expected, tag)) == 3
        assert logged(ours, tag) == pytest.approx(logged(expected, tag), rel=1e-5), tag
    # each process decodes some of the rows; all get what one process gets from all of them
    assert logged(ours, "eval/accuracy") == logged(expected, "eval/accuracy")
    assert logged(ours, "eval/reasoning_steps") == logged(expected, "eval/reasoning_steps")
    for tag in ("eval/latent_entropy", "eval/end_token_rate"):
        assert logged(ours, tag) == pytest.approx(logged(expected, tag), rel=1e-4), tag
    a, b = weights(ours), weights(expected)
    assert a.keys() == b.keys()
    for name, value in b.items():
        # of three steps of 1e-3; Adam turns rounding into as much where a gradient is nearly 0
        torch.testing.assert_close(a[name], value, rtol=0, atol=1e-5, msg=name)


def test_the_final_folder_is_what_was_trained(trained):
    """Weights have moved from the start, and manifests count whole parameters, not a process's part."""
    base = load_file(trained / "zero3" / "base" / "final" / "model.safetensors")
    moved = load_file(trained / "zero3" / "stage2" / "final" / "model.safetensors")
    assert any((moved[name] - base[name]).abs().max() > 1e-4 for name in base)
    for stage in (*PHASES, "stage2", *THOUGHTS):
        counts = [json.loads((trained / run / stage / "manifest.json").read_text()) for run in ("one", "zero3")]
        assert counts[0]["parameters"] == counts[1]["parameters"] > 0
        assert counts[0]["trained_parameters"] == counts[1]["trained_parameters"]
    config = config_of(trained, "zero3", 0)
    load_stage1(trained / "zero3" / "stage1-union" / "final", config.model, config.model, Workspace(config).spec)


def test_validation_is_shared_out(trained):
    """Of five rows: three and two, or with ZeRO-3, where the processes keep step, three and three."""
    for rank, numbers in ((0, [3, 3, 3, 3]), (1, [3, 2, 2, 3])):
        assert list(map(int, (trained / f"decoded-{rank}.txt").read_text().split())) == numbers
    # the second process thought for 32 tokens while the first one stopped at 8
    (steps,) = logged(trained / "zero3-uneven" / "cot", "eval/reasoning_steps")
    assert steps == pytest.approx((3 * 8 + 2 * 32) / 5)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_thoughts_beside_a_model_in_16_bit_are_float32(trained, level):
    """Scales of the norm start at 1; in bfloat16 the next numbers are 0.4 % away, so that they would stay there."""
    folder = trained / f"zero{level}-halves" / "kava"
    thoughts = load_file(folder / "final" / "thoughts.safetensors")
    assert {value.dtype for value in thoughts.values()} == {torch.float32}
    assert (thoughts["projection.4.weight"] != 1).all()
    assert len(logged(folder, "eval/accuracy")) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", HALVES)
def test_every_stage_trains_beside_a_model_in_16_bit(tmp_path, kind):
    """Two processes, each ZeRO level and none, through the first validation: 40 trainings, two minutes."""
    job = started(tmp_path, kind)
    try:
        output, _ = job.communicate(timeout=1700)
    finally:
        job.kill()
    assert job.returncode == 0, output[-4000:]
    for level in range(4):
        for stage in STAGES:
            run = f"{kind}{level}" + ("-own" if stage == "cot2" else "")
            assert len(logged(tmp_path / run / stage, "eval/accuracy")) == 1, (level, stage)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_job_with_a_message(tmp_path):
    """Six seconds; torchrun then waits half a minute for the one that does not react."""
    job = started(tmp_path, "hang")
    output, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    assert "did not answer for 0.1 minutes (launch.timeout_minutes)" in output, output[-4000:]


def test_the_configuration_decides(tiny_config):
    config = tiny_config(
        "launch.zero=2",
        "launch.offload=optimizer",
        "cot.gradient_accumulation_steps=4",
        "cot.max_grad_norm=0.5",
        "cot.mixed_precision=bf16",
    )
    made = zero.settings(config, config.cot)
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in made["zero_optimization"]
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (8, 4)
    assert made["gradient_clipping"] == 0.5
    assert made["torch_autocast"]["dtype"] == "bfloat16" and "bf16" not in made
    # neither an optimizer nor a schedule of DeepSpeed's
    assert not made.keys() & {"optimizer", "scheduler", "fp16"}
    assert zero.settings(tiny_config(), config.cot) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": {"type": "Adam"}}, "'optimizer'.*learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'.*schedule"),
        ({"bf16": {"enabled": True}}, "'bf16'.*mixed_precision"),
        ({"train_batch_size": 64}, "'train_batch_size'.*micro_batch_size"),
        ({"gradient_clipping": 1.0}, "'gradient_clipping'.*max_grad_norm"),
        ({"zero_optimization": {"stage": 3}}, r"'zero_optimization\.stage'.*launch\.zero"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"'zero_optimization\.offload_optimizer'.*launch\.offload",
        ),
    ],
)
def test_a_json_file_that_overrides_the_configuration_is_refused(tiny_config, tmp_path, settings, named):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    config = tiny_config("launch.zero=2", f"launch.deepspeed={path}")
    with pytest.raises(ConfigError, match=f"ds.json: sets {named}"):
        zero.settings(config, config.cot)


def test_other_deepspeed_settings_are_passed_on(tiny_config, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"wall_clock_breakdown": true, "zero_optimization": {"reduce_bucket_size": 123}}')
    config = tiny_config("launch.zero=3", f"launch.deepspeed={path}")
    made = zero.settings(config, config.cot)
    assert made["wall_clock_breakdown"] is True
    assert (made["zero_optimization"]["reduce_bucket_size"], made["zero_optimization"]["stage"]) == (123, 3)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        zero.settings(config, config.cot)
    path.unlink()
    with pytest.raises(ConfigError, match="not a readable JSON file"):
        zero.settings(config, config.cot)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.zero=4"], r"launch\.zero: got 4"),
        (["launch.offload=optimizer"], r"launch\.offload: got 'optimizer'.*launch\.zero=1"),
        (["launch.zero=2", "launch.offload=parameters"], r"launch\.offload: got 'parameters'.*launch\.zero=3"),
        (["launch.deepspeed=x.json"], r"launch\.deepspeed"),
        (["launch.timeout_minutes=0"], r"launch\.timeout_minutes"),
        (["launch.zero=1", "stage2.mixed_precision=fp16"], r"stage2\.mixed_precision: got 'fp16'.*bf16"),
        (["launch.zero=1", "model.dtype=float16"], r"model\.dtype: got 'float16'"),
        (["stage1.share_backbone=true"], r"stage1\.share_backbone.*model\.lora\.rank"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tiny_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(*overrides)


def test_zero_without_a_launcher_says_how_to_start(tiny_config):
    with pytest.raises(TrainingError, match="latent-sft train STAGE CONFIG"):
        train_stage(tiny_config("launch.zero=1"), "no-cot")


@pytest.mark.parametrize(
    ("written", "level", "refused"), [("0", 2, True), ("1", 2, False), ("1", 0, True), ("3", 2, True), ("3", 3, False)]
)
def test_a_checkpoint_of_another_level_is_refused(tiny_config, tmp_path, written, level, refused):
    states = tmp_path / "checkpoint-2" / "global_step2"
    if written != "0":
        states.mkdir(parents=True)
        (states / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
        name = "zero_pp_rank_0_mp_rank_00" if written == "3" else "mp_rank_00"
        (states / f"{name}_model_states.pt").touch()
    launch = tiny_config(f"launch.zero={level}").launch
    if not refused:
        zero.check_checkpoint(str(states.parent), launch)
        return
    with pytest.raises(TrainingError, match=rf"launch\.zero=.*got {level}"):
        zero.check_checkpoint(str(states.parent), launch)
