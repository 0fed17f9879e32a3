"""The GPU proof without a GPU: everything of it that a CPU can show, and that the look for host waits sees them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # `eval` is not installed

from eval.gpu import backends, decode, graphs, mfu, parts, stages, sync, tables, training
from eval.gpu.__main__ import PARTS, main
from eval.gpu.parts import Case, Part, Settings
from eval.gpu.waits import HostWait, NoWaits, Watch, on_fake_gpu
from latent_sft.config.load import load_config
from latent_sft.method.losses import LinearHead, _walk
from latent_sft.methods import STAGES
from latent_sft.methods.cot import ExplicitModel


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(device="cpu", tiny=True, out=tmp_path, until=time.monotonic() + 600)


X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
WAITS = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x[0, 0]),
    "if": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "assigned by mask": lambda x: x.clone().index_put_((x > 0,), x.new_ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(torch.ones_like(x[0], dtype=torch.long), dim=0),
}
ELSEWHERE = {
    "to the host": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "from the host": lambda x: torch.tensor([1.0], device=x.device),
    "two devices": lambda x: x + torch.ones(2),
    "index of the host": lambda x: x[torch.tensor([0])],
}
FINE = {
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "torch.where": lambda x: torch.where(x > 0, x, 0.0),
    "gather": lambda x: x.gather(1, (x > 0).long()),
    "a scalar of the host": lambda x: x * torch.tensor(2.0),
    "queued": lambda x: torch.ones(2).to(x.device, non_blocking=True),
}


@pytest.mark.parametrize("name", WAITS)
def test_operations_that_wait_are_refused(name: str) -> None:
    with pytest.raises(HostWait), NoWaits():
        WAITS[name](X)


@pytest.mark.parametrize("name", [*WAITS, *ELSEWHERE])
def test_on_a_fake_gpu_copies_and_mixes_are_refused_too(name: str) -> None:
    with on_fake_gpu() as fake:
        x = fake(X)
        with pytest.raises(HostWait), NoWaits():
            {**WAITS, **ELSEWHERE}[name](x)


@pytest.mark.parametrize("name", FINE)
def test_operations_that_do_not_wait_are_not(name: str) -> None:
    with NoWaits():
        FINE[name](X)
    with on_fake_gpu() as fake:
        x = fake(X)
        with NoWaits():
            assert FINE[name](x).device.type == "cuda"


def test_modules_on_a_fake_gpu_stay_tied_and_waiting_can_be_allowed() -> None:
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    with on_fake_gpu(tied) as fake:
        assert tied[0].weight is tied[1].weight and tied[0](fake(X)).is_cuda
    watch = Watch("cpu")
    allowed = watch.outside(lambda: X.sum().item())
    assert watch.inside(allowed)() == 6.0
    with pytest.raises(HostWait):
        watch.inside(lambda: (allowed(), X.sum().item()))()


def test_gradients_of_the_chunked_head_wait_for_nothing() -> None:
    with on_fake_gpu() as fake, NoWaits():
        hidden, weight, bias = fake(torch.ones(5, 4)), fake(torch.ones(9, 4)), fake(torch.ones(9))
        ids, alpha = fake(torch.zeros(5, 2, dtype=torch.long)), fake(torch.ones(5, 2))
        head = LinearHead(weight, bias, 0.5, 3.0)
        found = _walk(hidden, head, torch.bfloat16, ids, alpha, fake(torch.ones(5)), 2, (True, True, True))
    assert [value.shape for value in found] == [(), (5, 4), (9, 4), (9,)]


def test_a_stage_that_reads_its_loss_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExplicitModel.forward

    def reads(self, **batch):
        out = right(self, **batch)
        out.loss_sums["ce"].item()
        return out

    monkeypatch.setattr(ExplicitModel, "forward", reads)
    with pytest.raises(HostWait), sync.watched(Watch("cpu")):
        sync.train(settings.out, "no-cot")


def test_no_stage_and_no_thinker_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage trains and decodes on the CPU, and then on a fake GPU; the command goes on, and shows tables."""
    command = ["--device", "cpu", "--tiny", "--part", "sync", "--out", str(tmp_path)]
    assert main(command) == 0, capsys.readouterr().err
    first = json.loads((tmp_path / "sync.json").read_text())
    assert list(first["cases"])[: len(STAGES)] == list(STAGES)
    # two training steps at least, and one of decoding
    assert all(result["regions"] >= 3 for result in first["cases"].values())
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads((tmp_path / "sync.json").read_text()) == first  # nothing was measured again
    assert main([*command, "--table"]) == 0
    shown = capsys.readouterr().out.split("**The host waits")
    assert len(shown) == 3 and shown[1].strip() == shown[2].strip()
    assert "| stage2 |" in shown[1] and first["key"]["code"] in shown[1]


def test_a_part_goes_on_where_it_ended(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def case(name: str, *, fails: bool = False, **result: object) -> Case:
        def run() -> dict:
            called.append(name)
            if fails and called.count(name) == 1:
                raise ValueError("broken\nmore")
            return result

        return Case(name, run, 1.0)

    many = [case("a", same=True, s=0.5), case("b", fails=True, same=True), case("c", same=False, s=7.25)]
    part = Part("made-up", "Made up", lambda _: [*many, case("d", finished=False)])
    assert parts.run(part, settings)
    record = json.loads((settings.out / "made-up.json").read_text())
    assert list(parts.failures([record])) == ["made-up, b: ValueError: broken\nmore", "made-up, c: not the same"]
    table = tables.to_markdown(record, "Made up")
    # a number of a case that is not equal is not shown
    assert "7.25" not in table and "| a | 0.5 | yes |" in table and "| c |  | not equal |" in table
    assert "| b |  | failed |" in table and "| d |  | to be continued |" in table
    assert parts.run(part, settings)
    assert called == ["a", "b", "c", "d", "b", "d"]
    soon = Settings(device="cpu", tiny=True, out=settings.out, until=time.monotonic() + 30)
    assert not parts.run(part, soon) and len(called) == 6
    monkeypatch.setattr(parts, "key_of", lambda _: {**record["key"], "code": "other"})
    assert parts.run(part, settings) and called[6:] == ["a", "b", "c", "d"]


def test_every_part_fits_into_its_minutes(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        whole = Settings(device=device, tiny=False, out=tmp_path, until=0.0)
        for part in PARTS:
            found = part.cases(whole)
            assert len({case.name for case in found}) == len(found) > 0
            assert sum(case.minutes for case in found) <= parts.MOST_MINUTES + 1e-9, part.name


def test_small_cases_of_the_other_parts(settings: Settings) -> None:
    chosen = {
        backends.cases: ("gemma2", "gpt2", "losses, linear", "losses, mapped"),
        graphs.cases: ("latent, batch 4",),
        stages.cases: ("cot",),
        mfu.llama_cases: ("stage1-union, 8 rows", "stage2, 8 rows"),
        decode.cases: ("batch 4",),
    }
    for cases, names in chosen.items():
        found = {case.name: case for case in cases(settings)}
        for name in names:
            result = found[name].run()
            assert result["same"], (name, result)
            numbers = [value for value in result.values() if isinstance(value, float)]
            assert numbers or name == "cot", (name, result)


def test_a_wrong_backend_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that does not see its latent is a small mistake."""
    from latent_sft.method import attention

    right = attention._branch_mask

    def wrong(groups, width, like):
        mask = right(groups, width, like).clone()
        mask[:, :groups] = float("-inf")
        return mask

    monkeypatch.setattr(attention, "_branch_mask", wrong)
    found = {case.name: case for case in backends.cases(settings)}
    assert not found["llama"].run()["same"]


def test_training_proofs_are_experiments_of_the_package() -> None:
    for name, models in (("multiplication", {"icot"}), ("graphs", set())):
        config = load_config(training.HERE / f"{name}.yaml", training.FIVE if name == "multiplication" else [])
        assert {*config.models()} == {"cot", "stage1", "latent-sft", "latent-spans"} | models
        assert config.model.tiny.hidden_size == 768 and config.precision("stage2") == "bf16"
        assert {s.split(".")[0] for s in training._sections(training.HERE / f"{name}.yaml")} == {
            *("cot", "stage1", "stage2", "spans"),
            *models,
        }


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--part", "mfe"], "expected some of backends, sync"), ([], "no CUDA device")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    assert main(["--list", "--part", "mfu"]) == 0
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_a_cpu_can_show(tmp_path: Path) -> None:
    """Also ZeRO-3 by DeepSpeed, and the training proofs on a few rows."""
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == {part.name for part in PARTS}
