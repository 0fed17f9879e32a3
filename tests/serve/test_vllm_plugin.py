"""What vLLM is told before it loads anything: settings, refusals, names of blocks, and the text of a thought."""

from __future__ import annotations

import dataclasses
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from inference.test_generate import SPEC
from transformers import LlamaConfig

from latent_sft.errors import ConfigError
from latent_sft.models.load import save_thinker
from latent_sft.serve.vllm import launch, plugin
from latent_sft.serve.vllm.plugin import ExportConfig, Settings
from latent_sft.serve.vllm.reasoning import Reasoning, last, split
from latent_sft.serve.vllm.scheduler import name_own_blocks


@pytest.fixture
def version(monkeypatch):
    """Pretend that a version of vLLM is installed."""

    def pretend(number):
        monkeypatch.setattr(metadata, "version", lambda name: number)

    pretend(plugin.KNOWN[0])
    return pretend


def config_of(folder, **changes):
    parallel = {"pipeline_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_batch_sharded_sampling": None}
    model = SimpleNamespace(
        model=str(folder), override_generation_config={}, try_get_generation_config=lambda: {"do_sample": False}
    )
    config = SimpleNamespace(
        use_v2_model_runner=True,
        speculative_config=None,
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(policy="fcfs", scheduler_cls=None),
        additional_config={},
        model_config=model,
    )
    for name, value in changes.items():
        part = next(p for p in (config, config.parallel_config, config.scheduler_config, model) if hasattr(p, name))
        setattr(part, name, value)
    return config


def test_an_export_is_read_as_its_base_type_that_thinks(version):
    values = {"model_type": "latent_sft", "base_model_type": "llama", "auto_map": {"AutoConfig": "latent_model.A"}}
    found = ExportConfig.from_dict({**values, "architectures": ["LlamaForCausalLM"], "hidden_size": 64})
    assert type(found) is LlamaConfig and found.hidden_size == 64
    assert found.architectures == ["LatentLlamaForCausalLM"] and not hasattr(found, "auto_map")


def test_unknown_versions_are_refused_where_an_export_is_read(version):
    version("0.34.1")
    with pytest.raises(ConfigError, match=r"vllm: found version 0\.34\.1, expected 0\.32\.0 or 0\.33\.0;.*own engine"):
        ExportConfig.from_dict({"base_model_type": "llama", "architectures": []})
    version("0.33.0+cu130")
    plugin.check_version()


def test_thoughts_are_counted_and_answers_are_greedy_as_the_export_says(version, tmp_path):
    save_thinker(tmp_path, SPEC, "latent")
    config = config_of(tmp_path)
    Settings.verify_and_update_config(config)
    # 4 latents, 2 tokens of </think>, 4 of the answer
    assert config.model_config.override_generation_config == {"max_new_tokens": 10, "temperature": 0.0}
    assert config.scheduler_config.scheduler_cls == "latent_sft.serve.vllm.scheduler.scheduler"
    config = config_of(
        tmp_path,
        override_generation_config={"max_new_tokens": 3},
        try_get_generation_config=lambda: {"do_sample": True},
    )
    Settings.verify_and_update_config(config)
    assert config.model_config.override_generation_config == {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("use_v2_model_runner", False, "VLLM_USE_V2_MODEL_RUNNER"),
        ("speculative_config", object(), "--speculative-config"),
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("enable_batch_sharded_sampling", True, "--enable-batch-sharded-sampling"),
        ("policy", "priority", "--scheduling-policy"),
        ("scheduler_cls", "mine.Scheduler", "--scheduler-cls"),
    ],
)
def test_what_would_run_wrong_is_refused_by_its_option(name, value, option, version, tmp_path):
    save_thinker(tmp_path, SPEC, "latent")
    with pytest.raises(ConfigError, match=rf"^{option}: models that think in latents do not run this way"):
        Settings.verify_and_update_config(config_of(tmp_path, **{name: value}))


def test_blocks_of_the_output_belong_to_their_request():
    def request(name):
        found = SimpleNamespace(request_id=name, _block_hasher=lambda it: [b"x" * 32, b"y" * 32])
        name_own_blocks(found)
        return found._block_hasher(found)

    first = request("a")
    assert first == request("a") and len({*first, *request("b"), b"x" * 32, b"y" * 32}) == 6
    plain = SimpleNamespace(request_id="a", _block_hasher=None)
    name_own_blocks(plain)
    assert plain._block_hasher is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <b", ("a <b", None)),
        ("a </", ("a ", None)),
        ("a </thinker", ("a </thinker", None)),
        ("a </think>", ("a ", "")),
        ("a </think>7 </think>", ("a ", "7 </think>")),
        ("", ("", None)),
    ],
)
def test_a_text_that_is_still_written_is_split_where_it_is_certain(text, expected):
    assert split(text, "</think>") == expected


class Base:
    def __init__(self, tokenizer):
        self.model_tokenizer = tokenizer


class Parser(Reasoning, Base):
    pass


def test_the_reasoning_of_an_output_ends_at_its_first_closing_delimiter(tmp_path):
    save_thinker(tmp_path, dataclasses.replace(SPEC, think_ids=(2, 5)), "latent")
    texts = {(2, 5): " <think>", (3, 4): " </think>"}
    parser = Parser(SimpleNamespace(name_or_path=str(tmp_path), decode=lambda ids: texts[tuple(ids)]))
    assert (parser.reasoning_start_str, parser.reasoning_end_str) == ("<think>", "</think>")
    assert not parser.adjust_request(SimpleNamespace(skip_special_tokens=True)).skip_special_tokens
    assert parser.is_reasoning_end_streaming([7, 3, 4, 8], [8])
    assert last([1, 3, 4, 3, 4, 9], [3, 4]) == 5 and last([3], [3, 4]) == -1
    assert parser.is_reasoning_end([2, 5, 7, 3, 4, 8]) and not parser.is_reasoning_end([3, 4, 2, 5, 7])
    assert parser.extract_content_ids([7, 3, 4, 8, 1]) == [8, 1] and parser.extract_content_ids([7]) == []
    assert parser.count_reasoning_tokens([7, 9, 3, 4, 8]) == 2 and parser.count_reasoning_tokens([7, 9]) == 2
    assert parser.extract_reasoning("<think> 4 <think> 5 </think> 9", None) == ("4  5 ", "9")
    assert parser.extract_reasoning("4 5", None) == ("4 5", None)


def test_the_command_serves_an_export(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'latent_sft\[vllm\]'"):
        launch.command(tmp_path)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="not an export, which vLLM needs"):
        launch.command(tmp_path)
    found = launch.command("someone/model", port=9000, more=["--dtype", "float32"])
    assert found[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "someone/model"]
    assert found[5:] == "--host 127.0.0.1 --port 9000 --reasoning-parser latent_sft --dtype float32".split()
