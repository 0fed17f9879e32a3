"""Loading an experiment: layers and their order, every kind of user mistake, and the round trip through YAML."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from latent_sft.config.experiment import Config
from latent_sft.config.load import dotted_keys, load_config, to_yaml
from latent_sft.config.schema import LatentConfig
from latent_sft.config.training import TrainDefaults
from latent_sft.errors import ConfigError
from latent_sft.methods import SECTIONS, STAGES

GOLDEN = Path(__file__).with_name("dotted_keys.txt")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a YAML file and return its path."""

    def to_file(text: str, name: str = "experiment.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def test_nothing_given_is_the_defaults() -> None:
    assert load_config() == Config()


def test_yaml_overrides_defaults_and_arguments_override_yaml(write: Any) -> None:
    path = write("seed: 3\nlatent:\n  rate: 4\n  top_k: 5\n")
    config = load_config(path, ["latent.top_k=7", "latent.top_k=8"])
    assert (config.seed, config.latent.rate, config.latent.top_k) == (3, 4, 8)
    assert config.latent.temperature == LatentConfig().temperature


def test_an_empty_file_is_the_defaults(write: Any) -> None:
    assert load_config(write("")) == Config()


def test_values_arrive_as_the_schemas_types() -> None:
    overrides = ["stage1={}", "stage2.learning_rate=1e-3", "latent.noise_clip=[-1,2]", "name=123", "eval.splits=[test]"]
    config = load_config(None, overrides)
    assert config.stage2.learning_rate == 1e-3
    assert config.latent.noise_clip == (-1.0, 2.0)
    assert config.name == "123"
    assert config.eval.splits == ("test",)


def test_an_empty_value_is_the_empty_string_and_a_value_may_hold_an_equals_sign() -> None:
    config = load_config(None, ["data.test=", "data.train=/data/rate=2.jsonl"])
    assert config.data.test == ""
    assert config.data.train == "/data/rate=2.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown key, with a suggestion
        ("latent.rat=3", "override 'latent.rat=3': unknown key 'latent.rat'. Did you mean 'latent.rate'?"),
        ("latnt.rate=2", "unknown key 'latnt.rate'. Did you mean 'latent.rate'?"),
        ("zzz=1", "unknown key 'zzz'. Known: "),
        # wrong type
        ("latent.rate=two", "override 'latent.rate=two': latent.rate: Value 'two' of type 'str' could not be"),
        ("seed=1.5", "seed: Value '1.5' of type 'float' could not be converted to Integer"),
        ("latent.top_k=null", "latent.top_k: Incompatible value 'None' for field of type 'int'"),
        ("latent.noise_clip=5", "latent.noise_clip: Invalid value assigned"),
        ("latent.noise_clip=[1,2,3]", "latent.noise_clip: TupleConfig length 3 does not match"),
        ("stage2=5", "override 'stage2=5': stage2: "),
        # not one of the choices
        ("latent.projection=output", "latent.projection: Invalid value 'output', expected one of ['input', 'head']"),
        ("data.on_error=ignore", "data.on_error: Invalid value 'ignore', expected one of ['raise', 'skip']"),
        # out of range
        ("latent.rate=0", "latent.rate: got 0, expected an integer >= 1 (CoT tokens per latent)."),
        ("latent.top_k=-1", "latent.top_k: got -1, expected 0 (the whole vocabulary) or an integer >= 1."),
        ("latent.temperature=0", "latent.temperature: got 0.0, expected a number > 0."),
        ("latent.decode_temperature=-1", "latent.decode_temperature: got -1.0, expected a number > 0."),
        ("latent.noise_clip=[3,1]", "latent.noise_clip: got (3.0, 1.0), expected [low, high] with low < high."),
        ("latent.min_latents=500", "latent.min_latents: got 500, expected 0 to max_latents=128."),
        ("stage2.max_steps=-1", "stage2.max_steps: got -1, expected 0 (train `epochs`) or a number of steps."),
        ("no_cot.micro_batch_size=0", "no_cot.micro_batch_size: got 0, expected an integer >= 1."),
        ("stage1.union.learning_rate=nan", "stage1.union.learning_rate: got nan, expected a number > 0."),
        ("data.synthetic.min_steps=9", "data.synthetic.min_steps: got 9, expected 1 to max_steps=5."),
        ("model.tiny.num_heads=3", "model.tiny.num_heads: got 3, expected a divisor of hidden_size."),
        ("eval.splits=[train]", "eval.splits: got ['train'], expected validation and/or test."),
        ("name=a/b", "name: got 'a/b', expected a name without '/'."),
        # not key=value at all
        ("latent.rate", "override 'latent.rate': expected key=value, for example latent.rate=4."),
        ("=4", "override '=4': expected key=value"),
        ('name="a', "override 'name=\"a': the value is not valid YAML; quote it."),
    ],
)
def test_a_mistake_is_one_clear_error(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage1.init: got 'cot', expected cot.enabled=true"):
        load_config(None, ["stage1.init=cot", "cot.enabled=false"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent:\n  rat: 3\n", "experiment.yaml: unknown key 'latent.rat'. Did you mean 'latent.rate'?"),
        ("latent:\n  rate: two\n", "experiment.yaml: latent.rate: Value 'two'"),
        ("latent: 3\n", "experiment.yaml: latent: "),
        ("latent:\n  rate: 0\n", "latent.rate: got 0"),
        ("latent: [unclosed\n", "experiment.yaml: not valid YAML: "),
        ("- just\n- a list\n", "experiment.yaml: expected a mapping of sections at the top level."),
    ],
)
def test_a_mistake_in_the_file_names_the_file(write: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(text))


def test_a_missing_file_suggests_its_neighbour(write: Any, tmp_path: Path) -> None:
    write("", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"quickstrat.yaml: no such configuration file.* Did you mean '.*quickstart"):
        load_config(tmp_path / "quickstrat.yaml")


def test_a_missing_folder_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: no such configuration file, and no preset of that name"):
        load_config(tmp_path / "nowhere" / "a.yaml")


def test_the_resolved_configuration_reads_back_as_itself(write: Any) -> None:
    overrides = ["latent.noise_clip=[-2.0,1.0]", "eval.splits=[test]", "data.test=", "name=x y", "cot.beta2=0.98"]
    config = load_config(None, overrides)
    again = load_config(write(to_yaml(config)))
    assert again == config
    assert isinstance(again.latent.noise_clip, tuple) and isinstance(again.eval.splits, tuple)
    assert load_config(write(to_yaml(Config()))) == Config()


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().latent.rate = 4  # type: ignore[misc]


def test_every_stage_has_its_own_settings() -> None:
    for number, stage in enumerate(STAGES):
        config = load_config(None, ["cot={}", "stage1={}", f"{SECTIONS[stage]}.max_steps={100 + number}"])
        steps = {name: config.stage(name).max_steps for name in STAGES}
        assert steps.pop(stage) == 100 + number
        assert set(steps.values()) == {0}


def test_run_directory_is_named_after_the_experiment_unless_given() -> None:
    assert load_config(None, ["name=gsm8k"]).directory == "runs/gsm8k"
    assert load_config(None, ["name=gsm8k", "run_dir=/data/x"]).directory == "/data/x"


def documented_keys() -> list[str]:
    """Return every key that has a meaning of its own: those that each stage has stand once, in `train`."""
    shared = {f"{section}.{f.name}" for section in SECTIONS.values() for f in dataclasses.fields(TrainDefaults)}
    return [key for key in dotted_keys() if key not in shared]


def test_keys_are_the_golden_list() -> None:
    """Every key a user can set, so that adding, renaming or removing one is seen in review."""
    golden = GOLDEN.read_text(encoding="utf-8").split()
    found = documented_keys()
    added, removed = sorted(set(found) - set(golden)), sorted(set(golden) - set(found))
    assert found == golden, (
        f"configuration keys changed: added {added}, removed {removed}. If that is meant, note it in CHANGELOG.md and "
        f"write the list again: python {Path(__file__).relative_to(ROOT)}"
    )


@dataclass(frozen=True, kw_only=True)
class WithLiteral:
    """As the schema uses choices."""

    choice: Literal["a", "b"] = "a"


def test_omegaconf_knows_literal() -> None:
    """The schema depends on it; OmegaConf before 2.4 refuses `Literal` fields."""
    node = OmegaConf.merge(OmegaConf.structured(WithLiteral), {"choice": "b"})
    assert OmegaConf.to_object(node) == WithLiteral(choice="b")
    with pytest.raises(ValidationError, match="expected one of"):
        OmegaConf.merge(OmegaConf.structured(WithLiteral), {"choice": "c"})


def test_compat_published_changes_defaults_and_nothing_else_wins_less(tmp_path) -> None:
    """defaults <- published <- file <- command line."""
    path = tmp_path / "c.yaml"
    path.write_text("compat: published\nlatent: {marker_positions: transparent}\n")
    config = load_config(path, ["latent.noise_scale=0.5"])
    assert (config.latent.exclude_end, config.latent.temperature) == (False, 1.0)
    assert config.latent.marker_positions == "transparent"
    assert config.latent.noise_scale == 0.5
    assert load_config(None).latent.exclude_end is True
    assert load_config(None, ["compat=published"]).latent.marker_positions == "stretched"
    assert load_config(path, ["compat=none"]).latent.exclude_end is True


@pytest.mark.parametrize(
    ("overrides", "trained", "precision"),
    [
        ([], "float32", "no"),
        (["cot.mixed_precision=bf16"], "float32", "bf16"),
        (["model.dtype=bfloat16"], "float32", "bf16"),
        (["model.dtype=bfloat16", "model.lora.rank=4"], "bfloat16", "no"),
        (["model.dtype=bfloat16", "launch.zero=2"], "bfloat16", "no"),
        (["model.dtype=float16"], "float32", "fp16"),
        (["model.dtype=float16", "model.lora.rank=4"], "float16", "fp16"),
    ],
)
def test_what_is_trained_is_float32_or_has_copies_of_it(overrides: list[str], trained: str, precision: str) -> None:
    config = load_config(None, overrides)
    assert (config.trained_model.dtype, config.precision("cot")) == (trained, precision)


def test_adapters_count_twice_unless_said() -> None:
    """alpha / rank is 2 at every rank, and the file of a run says which number that was."""
    for rank in (2, 64):
        config = load_config(None, [f"model.lora.rank={rank}"])
        assert config.model.lora.alpha == 2 * rank
        assert f"alpha: {2.0 * rank}" in to_yaml(config)
    assert load_config(None, ["model.lora.rank=8", "model.lora.alpha=4"]).model.lora.alpha == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cot.global_batch_size=-1"], "cot.global_batch_size: got -1, expected 0 or a number of examples"),
        (["cot.global_batch_size=64", "cot.max_tokens=99"], "cot.global_batch_size: got 64, expected 0, where max_tok"),
        (
            ["cot.global_batch_size=64", "cot.gradient_accumulation_steps=2"],
            "cot.gradient_accumulation_steps: got 2, expected 1, or global_batch_si",
        ),
    ],
)
def test_a_global_batch_is_the_only_one_to_say_what_a_step_takes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, overrides)


def test_gradients_of_float16_need_their_scaler() -> None:
    with pytest.raises(ConfigError, match=r"cot.mixed_precision: got 'bf16', expected fp16, as model.dtype=float16"):
        load_config(None, ["model.dtype=float16", "cot.mixed_precision=bf16"])


@pytest.mark.parametrize(
    ("text", "overrides", "on"),
    [
        ("", [], []),
        ("cot: {}", [], ["cot"]),
        ("cot:", [], ["cot"]),
        ("cot: {max_steps: 5}", ["cot.enabled=false"], []),
        ("cot: {enabled: false}", ["cot.max_steps=5"], []),
        ("cot: {enabled: false, max_steps: 5}", ["cot.enabled=true"], ["cot"]),
        ("", ["no_cot.max_steps=5"], ["no-cot"]),
        # a method's section names its stages, unless it picks some
        ("stage1: {noise_scale: 0.5}", [], ["stage1-encoder", "stage1-decoder", "stage1-union"]),
        ("stage1: {noise_scale: 0.5, union: {}}", [], ["stage1-union"]),
        ("stage1: {union: {}}", ["stage1.noise_scale=0.5", "stage2={}"], ["stage1-union", "stage2"]),
        ("stage1: {noise_scale: 0.5}", ["stage1.encoder.enabled=false"], ["stage1-decoder", "stage1-union"]),
        ("stage1: {decoder: {enabled: false}, union: {}}", ["stage1.union.max_steps=3"], ["stage1-union"]),
        # switching off does not name
        ("stage1: {encoder: {enabled: false}, decoder: {enabled: false}}", ["kava.train.enabled=false"], []),
        ("kava: {num_latents: 24}", [], ["kava"]),
        ("kava: {num_latents: 24, train: {enabled: false}}", ["kava.train.max_steps=3"], []),
        # what every stage has, and sections without a stage, name none
        ("train: {max_steps: 5}\nlabels: {batch_size: 4}\nlatent: {rate: 4}", ["train.micro_batch_size=3"], []),
    ],
)
def test_a_stage_trains_where_it_is_named(write: Any, text: str, overrides: list[str], on: list[str]) -> None:
    config = load_config(write(text), overrides)
    assert [stage for stage in STAGES if config.stage(stage).enabled] == on
    assert load_config(write(to_yaml(config))) == config  # the resolved file names all, and says which are on


def test_a_method_that_trains_nothing_is_named_too() -> None:
    assert load_config(None, ["cot={}", "soft_thinking.top_k=3"]).soft_thinking.enabled
    assert not load_config(None, ["soft_thinking.top_k=3", "soft_thinking.enabled=false"]).soft_thinking.enabled


def test_train_is_for_every_stage_and_a_stage_says_what_differs(write: Any) -> None:
    config = load_config(write("cot: {micro_batch_size: 4}\ntrain: {micro_batch_size: 8, max_steps: 7}\n"))
    assert (config.cot.micro_batch_size, config.cot.max_steps) == (4, 7)
    assert {config.stage(stage).micro_batch_size for stage in STAGES if stage != "cot"} == {8}
    assert config.train.micro_batch_size == 8
    # a later layer is stronger, of either kind
    config = load_config(
        write("cot: {micro_batch_size: 4, max_steps: 7}\n"), ["train.max_steps=2", "no_cot.max_steps=3"]
    )
    found = (config.cot.max_steps, config.cot.micro_batch_size, config.no_cot.max_steps, config.stage2.max_steps)
    assert found == (2, 4, 3, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=two", "override 'train.max_steps=two': train.max_steps: Value 'two'"),
        ("train.micro_batch_size=0", "train.micro_batch_size: got 0, expected an integer >= 1."),
        ("train.max_step=1", "unknown key 'train.max_step'. Did you mean 'train.max_steps'?"),
        ("train.enabled=true", "unknown key 'train.enabled'"),
        ("train=5", "override 'train=5': train: "),
    ],
)
def test_a_mistake_in_train_is_reported_there(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


def test_files_inherit(write: Any, tmp_path: Path) -> None:
    """Later ones win, whoever says `defaults`; of what two inherit, one is not undone by the other's copy of it."""
    (tmp_path / "sub").mkdir()
    write("seed: 1\nname: root\nlatent: {rate: 4, top_k: 3}\neval: {limit: 1}\n", "root.yaml")
    write("defaults: [../root.yaml]\nlatent: {rate: 5}\n", "sub/left.yaml")
    write("defaults: [root]\neval: {limit: 2}\n", "right.yaml")
    config = load_config(write("defaults: [sub/left.yaml, right.yaml]\nseed: 9\n"), ["latent.top_k=6"])
    found = (config.name, config.seed, config.latent.rate, config.latent.top_k, config.eval.limit)
    assert found == ("root", 9, 5, 6, 2)


def test_what_a_base_names_is_on_unless_the_file_says_otherwise(write: Any) -> None:
    write("train: {micro_batch_size: 8}\ncot: {micro_batch_size: 4}\nno_cot: {}\n", "base.yaml")
    config = load_config(write("defaults: [base.yaml]\nno_cot: {enabled: false}\ntrain: {max_steps: 3}\n"))
    assert (config.cot.enabled, config.no_cot.enabled) == (True, False)
    assert (config.cot.micro_batch_size, config.cot.max_steps, config.stage2.micro_batch_size) == (4, 3, 8)


def test_a_preset_and_its_bases_can_be_inherited(write: Any) -> None:
    config = load_config(write("defaults: [quickstart, bases/compare]\nname: mine\n"))
    assert (config.name, config.data.synthetic.num_train, len(config.compare.variants)) == ("mine", 30_000, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [nowhere.yaml]", "experiment.yaml: defaults: 'nowhere.yaml' is no file beside it, and no preset."),
        ("defaults: [bass]", "defaults: 'bass' is no file beside it, and no preset. Did you mean 'base'?"),
        ("defaults: base.yaml", "experiment.yaml: defaults: got 'base.yaml', expected a list of files"),
        ("defaults: [experiment.yaml]", "experiment.yaml: inherits itself: "),
        ("defaults: [base.yaml]", "base.yaml: latent.rate: Value 'two'"),
        ("defaults: [a.yaml]", "a.yaml -> {folder}/b.yaml -> {folder}/a.yaml; take it out of one of their `defaults`."),
    ],
)
def test_a_mistake_in_what_is_inherited_names_the_files(write: Any, tmp_path: Path, text: str, message: str) -> None:
    write("latent: {rate: two}", "base.yaml")
    write("defaults: [b.yaml]", "a.yaml")
    write("defaults: [a.yaml]", "b.yaml")
    with pytest.raises(ConfigError, match=re.escape(message.format(folder=tmp_path))):
        load_config(write(text))


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(documented_keys()) + "\n", encoding="utf-8")
