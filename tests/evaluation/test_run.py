"""What decides an evaluation, what is done again, and what becomes of the results that were there."""

from __future__ import annotations

import json

import pytest

from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.evaluation import run
from latent_sft.evaluation.run import evaluate
from latent_sft.experiment.workspace import Workspace
from latent_sft.models.load import build_tiny, save_lm, save_thinker

SETTINGS = ("latent.noise_scale=1.0", "eval.splits=[validation]", "eval.limit=6", "eval.interventions=[]")
SAMPLED = ("eval.sample=true", "eval.temperature=3.0")


@pytest.fixture
def evaluated(tiny_config, monkeypatch):
    """Return a function: overrides -> result file of an untrained `latent-sft`; it counts decodings in `.calls`."""

    def done(*overrides: str) -> dict:
        config = tiny_config(*SETTINGS, "eval.latency_problems=0", *overrides)
        work = Workspace(config)
        step = work.step("stage2")
        if step.manifest() is None:
            save_lm(build_tiny(config.model.tiny, work.tokenizer, 1), step.final, work.tokenizer)
            save_thinker(step.final, work.spec, "latent")
            step.begin(0)
            step.finish()
        evaluate(config, ["latent-sft"], work=work)
        done.path = work.directory / "eval" / "latent-sft" / "validation.json"
        return json.loads(done.path.read_text())

    def counting(*args, **options):
        done.calls += 1
        return real(*args, **options)

    done.calls, real = 0, run.solve
    monkeypatch.setattr(run, "solve", counting)
    return done


def latents(result: dict) -> list:
    return [problem["latents"] for problem in result["problems"] if "latents" in problem]


def test_sampling_leaves_the_latents_alone_unless_they_are_to_be_noisy(evaluated):
    greedy, sampled = evaluated("eval.sample=false"), evaluated(*SAMPLED)
    assert len(latents(greedy)) == 4
    assert latents(sampled) == latents(greedy)
    answers = [[problem["prediction"] for problem in result["problems"]] for result in (greedy, sampled)]
    assert answers[0] != answers[1]
    assert latents(evaluated(*SAMPLED, "eval.latent_noise=true")) != latents(greedy)


def test_what_decides_an_answer_is_evaluated_anew_and_nothing_is_lost(evaluated, caplog):
    results = [evaluated()]
    for setting in ("latent.max_answer_tokens=2", "latent.max_latents=3", "eval.limit=5", "eval.max_cot_tokens=7"):
        results.append(evaluated(setting))
        assert evaluated.calls == len(results)
        name, value = setting.replace("latent.", "spec.").split("=")
        assert f"{name} was" in caplog.text and f"now {value}" in caplog.text
    assert len(results[1]["problems"][0]["latents"]) > len(results[2]["problems"][0]["latents"]) == 3
    folders = list(evaluated.path.with_suffix("").glob("*/"))
    kept = [json.loads((folder / "validation.json").read_text()) for folder in folders]
    assert len(kept) == 4 and all(result in kept for result in results[:4])
    assert all(json.loads((f / "manifest.json").read_text())["fingerprint"] == f.name for f in folders)


def test_what_decides_no_answer_is_not_evaluated_anew(evaluated):
    evaluated()
    evaluated("eval.batch_size=3", "eval.heatmap_problems=1", "eval.temperature=0.3", "eval.seed=7")
    assert evaluated.calls == 1


def test_sampling_settings_count_where_answers_are_sampled(evaluated):
    for number, setting in enumerate(("eval.top_p=0.95", "eval.top_p=0.5", "eval.seed=3", "eval.latent_noise=true")):
        evaluated(*SAMPLED, setting)
        assert evaluated.calls == number + 1


def test_an_evaluation_that_was_killed_blocks_no_other_settings(evaluated, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "solve", killed)
        evaluated("eval.sample=true")
    assert evaluated("eval.limit=5")["summary"]["num_examples"] == 5


def test_a_model_that_was_trained_anew_is_evaluated_anew(evaluated):
    evaluated()
    manifest = evaluated.path.parents[2] / "stage2" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"ended": "later"}))
    evaluated()
    assert evaluated.calls == 2


def test_a_model_of_other_settings_is_not_evaluated_under_these(evaluated):
    evaluated()
    with pytest.raises(ArtefactError, match=r"stage2: made by another experiment \(train.learning_rate was 0.003"):
        evaluated("stage2.learning_rate=1e-4")


@pytest.mark.parametrize("settings", [("latent.noise_scale=1.0",), ("latent.noise_scale=0", "eval.sample=true")])
def test_noise_that_would_not_be_there_is_refused(tiny_config, settings):
    with pytest.raises(ConfigError, match=r"eval\.latent_noise: got True"):
        tiny_config("eval.latent_noise=true", *settings)
