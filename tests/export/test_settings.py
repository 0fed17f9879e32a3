"""What callers of `generate` pass: settings of the answer work as in `transformers`, the rest is refused, in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from latent_sft.data.prompts import render_prompt
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.method.types import LatentSpec, Superposition
from latent_sft.models.backbone import embed, mix_latents

NEUTRAL: dict[str, Any] = {
    "num_return_sequences": 1,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "top_k": 50,
    "output_scores": False,
    "use_cache": True,
    "renormalize_logits": False,
    "synced_gpus": False,
    "token_type_ids": None,
    "logits_processor": [],
    "early_stopping": False,
}


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = export_checkpoint(checkpoint, tmp_path_factory.mktemp("settings") / "export")
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def inputs(problems: list[str], tokenizer: PreTrainedTokenizerBase, spec: LatentSpec) -> dict[str, Tensor]:
    """Return left-padded prompts."""
    prompts = [render_prompt(tokenizer, spec, problem) for problem in problems]
    return dict(tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt"))


@pytest.fixture(scope="module")
def plain(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    return model.generate(**inputs, return_latents=True)


def reference(model: PreTrainedModel, spec: LatentSpec, inputs: dict[str, Tensor], plain: Any, **how: Any) -> list[Any]:
    """Let `transformers` itself write the answers after the latents; return each with its delimiter."""
    answers = []
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        closed = torch.cat([ids[mask.bool()], torch.tensor(spec.end_think_ids)])[None]
        count = int(plain.num_latents[row])
        latents = Superposition(plain.latent_ids[row, :count], plain.latent_weights[row, :count])
        embeds = embed(model, closed)
        end = len(spec.end_think_ids)
        embeds = torch.cat([embeds[:, :-end], mix_latents(model, latents)[None], embeds[:, -end:]], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        out = GenerationMixin.generate(
            model, input_ids=closed, inputs_embeds=embeds, attention_mask=mask, **{"max_new_tokens": 7, **how}
        )
        answers.append([*spec.end_think_ids, *out[0, closed.shape[1] :].tolist()])
    return answers


def written(sequences: Tensor, inputs: dict[str, Tensor], pad: int = 0) -> list[list[int]]:
    """Return what follows each prompt, without the padding behind it."""
    rows = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: max((i + 1 for i, token in enumerate(row) if token != pad), default=0)] for row in rows]


def favour(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that looks at ids: the token after the last one becomes likelier."""
    return scores.scatter_add(1, (ids[:, -1:] + 1) % 16, torch.full((len(ids), 1), 3.0))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[5], [9, 8]]},
        {"suppress_tokens": [1]},
        {"begin_suppress_tokens": [7, 8, 9]},
        {"min_new_tokens": 4},
        {"forced_eos_token_id": 6},
        {"sequence_bias": [[[7], 2.0]]},
        {"eos_token_id": [1, 8, 12]},
        {"eos_token_id": 8},
        {"max_new_tokens": 3},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "min_p": 1.0},
        {"do_sample": True, "top_p": 1e-4, "repetition_penalty": 1.7},
        {"do_sample": True, "temperature": 1e-4},
    ],
    ids=str,
)
def test_settings_apply_to_the_answer_as_in_transformers(
    how: dict[str, Any], inside: bool, model: PreTrainedModel, spec: LatentSpec, inputs: dict[str, Tensor], plain: Any
) -> None:
    given = {"generation_config": GenerationConfig(**how)} if inside else how
    found = written(model.generate(**inputs, **given), inputs)
    expected = reference(model, spec, inputs, plain, **how)
    assert found == expected
    if how and not how.get("do_sample"):
        assert found != written(plain.sequences, inputs)  # or the comparison would mean nothing


def test_processors_of_the_caller_are_called(
    model: PreTrainedModel, spec: LatentSpec, inputs: dict[str, Tensor], plain: Any
) -> None:
    found = written(model.generate(**inputs, logits_processor=[favour]), inputs)
    assert found == reference(model, spec, inputs, plain, logits_processor=[favour])
    assert found != written(plain.sequences, inputs)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_sampling_does_not_depend_on_the_batch(
    batch_size: int, model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any
) -> None:
    def answers(**how: Any) -> list[list[int]]:
        torch.manual_seed(0)
        return model.generate(**inputs, do_sample=True, temperature=2.0, top_p=0.9, **how).tolist()

    assert answers(batch_size=batch_size) == answers()
    assert answers() != plain.sequences.tolist()
    torch.manual_seed(0)
    many = model.generate(**inputs, do_sample=True, temperature=2.0, num_return_sequences=4)
    assert len(many) == 4 * len(inputs["input_ids"])
    assert torch.equal(many[::4, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert len({tuple(row) for row in many[:4].tolist()}) > 1


def test_every_token_can_be_sampled_unless_top_k_says_otherwise(model: PreTrainedModel) -> None:
    """`transformers` keeps 50 by default, more than this vocabulary has: so what it is given is looked at."""
    made = []
    prepare = GenerationMixin.generate

    def spy(*args: Any, **how: Any) -> Any:
        made.append(how["generation_config"].top_k)
        return prepare(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", spy)
        for how in ({}, {"top_k": 5}, {"generation_config": GenerationConfig(top_k=6)}):
            model.generate(torch.tensor([[7, 5, 8]]), do_sample=True, **how)
    assert made == [0, 5, 6]


def test_neutral_values_change_nothing(model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any) -> None:
    assert torch.equal(model.generate(**inputs, **NEUTRAL), plain.sequences)
    assert torch.equal(model.generate(**inputs, generation_config=GenerationConfig()), plain.sequences)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 2}, "num_beams: not available"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams: not available"),
        ({"guidance_scale": 2.0}, "guidance_scale: not available"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: not available"),
        ({"output_hidden_states": True}, "output_hidden_states: not available"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "inputs_embeds: not available"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids: not available"),
        ({"assistant_model": 1, "negative_prompt_ids": 1}, "assistant_model, negative_prompt_ids: not available"),
        ({"custom_generate": "some/where"}, "custom_generate: not available"),
        ({"batch_size": 0}, "batch_size: got 0, expected an integer >= 1"),
        ({"max_latents": -1}, "max_latents: got -1, expected an integer >= 0"),
        ({"min_latents": -1}, "min_latents: got -1, expected an integer >= 0"),
        ({"max_length": 4}, r"max_length: got 4, expected more than the 5 ids of the prompt and </think>"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"stop_strings": ["7"]}, "stop_strings: expected the tokenizer as well"),
        ({"eos_token_id": 99}, r"eos_token_id: got \[99\], expected ids below 16"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: got shape \[2, 3\], expected \[1, 3\]"),
    ],
)
def test_what_would_be_another_answer_is_refused(how: dict[str, Any], message: str, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[7, 5, 8]]), **how)


def test_padding_is_found_without_a_mask(model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any) -> None:
    assert (inputs["attention_mask"] == 0).any()
    assert torch.equal(model.generate(inputs["input_ids"]), plain.sequences)
    ends = {"pad_token_id": 1, "eos_token_id": 1}
    padded = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 1)
    with pytest.raises(ValueError, match="attention_mask: needed here, since the pad id 1 is an end of sequence too"):
        model.generate(padded, **ends)
    found = model.generate(padded, attention_mask=inputs["attention_mask"], **ends)
    width = padded.shape[1]
    for row, expected in zip(found[:, width:].tolist(), written(plain.sequences, inputs), strict=True):
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {1}


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value if value.dim() > 1 else value[:, None])

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_streamer_gets_the_prompts_and_every_token(
    batch_size: int, model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    kept = Kept()
    found = model.generate(**inputs, streamer=kept, batch_size=batch_size)
    assert torch.equal(found, plain.sequences) and kept.ended
    assert torch.equal(torch.cat(kept.parts, dim=1), plain.sequences)
    assert torch.equal(kept.parts[0], inputs["input_ids"])
    one = {key: value[3:4] for key, value in inputs.items()}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**one, streamer=streamer)
    text = tokenizer.decode(written(plain.sequences[3:4], one)[0])
    assert "".join(streamer) == text


def test_tokens_are_streamed_while_they_are_written(model: PreTrainedModel) -> None:
    class Impatient(BaseStreamer):
        def __init__(self) -> None:
            self.calls = 0

        def put(self, value: Tensor) -> None:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.tensor([[7, 5, 8]]), max_latents=1, min_latents=1, streamer=Impatient(), eos_token_id=15)
    hook.remove()
    assert len(passes) == 3  # the prompt, a latent, </think>; the rest of the answer was never computed


class AllHave(StoppingCriteria):
    """Like those of lm-eval: remembers rows by their place, and answers for all of them at once."""

    def __init__(self, token: int, width: int, rows: int) -> None:
        self.token, self.width, self.done = token, width, [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        for row in range(len(self.done)):
            self.done[row] = self.done[row] or self.token in input_ids[row, self.width :].tolist()
        return all(self.done)


class RowsHave(StoppingCriteria):
    """Like those of `transformers`: each row for itself."""

    def __init__(self, token: int, width: int) -> None:
        self.token, self.width = token, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids[:, self.width :] == self.token).any(-1)


def test_stop_strings_and_criteria_cut_the_answer(
    model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = written(plain.sequences, inputs)
    stop = next(row[2] for row in whole if len(row) > 3)
    text = tokenizer.decode([stop]).strip()
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert expected != whole
    how = {"stop_strings": [text], "tokenizer": tokenizer}
    assert written(model.generate(**inputs, **how), inputs) == expected
    inside = GenerationConfig(stop_strings=[text])
    assert written(model.generate(**inputs, generation_config=inside, tokenizer=tokenizer), inputs) == expected
    criteria = [RowsHave(stop, inputs["input_ids"].shape[1])]
    for batch_size in (2, 64):
        found = model.generate(
            **inputs, stopping_criteria=criteria, batch_size=batch_size, return_dict_in_generate=True
        )
        assert written(found.sequences, inputs) == expected

    rows = [row for row in range(len(whole)) if stop in whole[row]][:2]
    some = {key: value[rows] for key, value in inputs.items()}
    last = max(whole[row].index(stop) for row in rows) + 1
    all_have = AllHave(stop, some["input_ids"].shape[1], len(rows))
    found = written(model.generate(**some, stopping_criteria=[all_have]), some)
    assert found == [whole[row][:last] for row in rows]


def test_time_and_length_are_limits(model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any) -> None:
    width = inputs["input_ids"].shape[1]
    found = model.generate(**inputs, max_length=width + 4)
    assert torch.equal(found, plain.sequences[:, : width + 4])
    assert torch.equal(model.generate(**inputs, max_length=500), plain.sequences)  # as long as trained, at most
    late = model.generate(**inputs, max_time=1e-9)
    assert torch.equal(late, plain.sequences[:, : width + 2])  # </think>, and the one token that was on its way


def test_scores_come_with_every_token(model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any) -> None:
    how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "suppress_tokens": [5]}
    found = model.generate(**inputs, **how)
    assert isinstance(found, GenerateDecoderOnlyOutput) and found.attentions is None
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(found.scores) == len(found.logits) == tokens.shape[1]
    for column, (scores, logits) in enumerate(zip(found.scores, found.logits, strict=True)):
        real = tokens[:, column] != 0
        assert torch.equal(scores.argmax(-1)[real], tokens[real, column])
        if column:
            assert (scores[real, 5] == float("-inf")).all() and logits[real, 5].isfinite().all()


def test_settings_of_the_model_itself_count(model: PreTrainedModel, inputs: dict[str, Tensor], plain: Any) -> None:
    own = model.generation_config
    model.generation_config = GenerationConfig(**{**own.to_diff_dict(), "max_new_tokens": 2, "num_beams": 1})
    try:
        found = model.generate(**inputs)
    finally:
        model.generation_config = own
    assert torch.equal(found, plain.sequences[:, : found.shape[1]])
    assert found.shape[1] == inputs["input_ids"].shape[1] + 3


def test_names_of_refused_settings_exist(model: PreTrainedModel) -> None:
    """A setting that this version of `transformers` does not know would be refused as unknown, by its name as well."""
    with pytest.raises(ValueError, match=re.escape("constraints: not available in latent decoding.")):
        model.generate(torch.tensor([[7, 5, 8]]), constraints=[1])


def test_a_model_with_hooks_of_device_map_decodes_the_same(
    checkpoint: Path, tmp_path: Path, inputs: dict[str, Tensor], plain: Any
) -> None:
    """One device is all there is here; the hooks are those that move tensors between several."""
    folder = export_checkpoint(checkpoint, tmp_path / "export")
    spread = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "lm_head": "cpu"}
    dispatch_model(spread, {**places, "model.norm": "cpu", "model.rotary_emb": "cpu"}, force_hooks=True)
    assert torch.equal(spread.generate(**inputs), plain.sequences)
    assert torch.equal(spread.generate(**inputs, stop_strings=["none"], tokenizer=Silent()), plain.sequences)


class Silent:
    def decode(self, ids: list[int]) -> str:
        return ""
