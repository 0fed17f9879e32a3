"""What is measured: every case, with the random models and rows of it, and the ways of doing it.

stage1      forward and backward of encoder and decoder against CoT length; `decoder`: the decoder alone
stage2      forward and backward with stored latents
labels      the encoder's latents of many examples
decode      problems per second; `step`, `quickstart`: latent against explicit thinking in the same engine
kava        a training step with and without terms, and with a teacher that is read twice as in published code
shared      memory of stage 1 with `stage1.share_backbone` against two models
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eval.speed import plain
from latent_sft.config.load import load_config
from latent_sft.data.collate import stage1_batch, stage2_batch
from latent_sft.experiment.workspace import Workspace
from latent_sft.inference.generate import generate
from latent_sft.method.layout import fixed_segments
from latent_sft.method.types import LatentSpec, Superposition, ThoughtSpec
from latent_sft.methods import STAGES
from latent_sft.methods.cot import ExplicitModel, explicit_batch
from latent_sft.methods.latent_sft import oracle_latents
from latent_sft.methods.self_distill import SelfDistillConfig, SelfDistillModel, distill_batch
from latent_sft.methods.self_distill import kava as kava_settings
from latent_sft.models.stage1 import Stage1Model
from latent_sft.models.stage2 import Stage2Model
from latent_sft.models.thoughts import Thoughts

TOP_K = 10
BOTH = ("plain", "fast")
# CoT tokens per latent -> CoT lengths; the plain path takes minutes per call and gigabytes beyond PLAIN_UP_TO
LENGTHS = {2: (128, 512, 2048), 4: (128, 512, 2048), 16: (128, 256, 512, 1024, 2048, 4096, 8192)}
PLAIN_UP_TO = {2: 512, 4: 512, 16: 4096}
LONGEST, LIMIT_GIB = 16_384, 8.0
LABEL_BATCH = 32
# the plain path as published projects the markers only; this one every position, as a model with a head does
FULL_LOGITS = "plain, logits everywhere"
# </think> and EOS get the head rows of other tokens times this, so that a random model stops after varied lengths, as a
# trained one does; times 0 they are never the largest, and all rows run as long as they may
STOPS, NEVER_STOPS = 2.5, 0.0
QUICKSTART_LATENTS, QUICKSTART_TOKENS = 10, 21
KAVA = ("codi", "kava", "student", "published")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama with untied head and as many key heads as query heads."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int


FULL = Size(hidden=256, layers=4, heads=4, intermediate=768, vocab=32_000)
QUICKSTART = Size(hidden=64, layers=4, heads=4, intermediate=192, vocab=130)
TINY = Size(hidden=32, layers=2, heads=2, intermediate=64, vocab=512)
LARGER = Size(hidden=768, layers=10, heads=12, intermediate=2048, vocab=512)  # 71 million parameters


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table.

    Attributes:
        part: see the module docstring.
        name: unique within the part.
        size: of the model.
        paths: what is measured, interleaved.
        compared: reference and the path that must give the same numbers.
        items: problems or examples that one call of each path handles.
        prompt: tokens of a prompt; decoding draws 1/3 to 1 of it.
        cot: CoT tokens of each row; for decoding the cap of thinking steps.
        rate: CoT tokens per latent.
        answer: tokens of an answer, EOS included.
        timed: False where only memory is measured.
        memory: paths whose peak memory is measured, each in a process of its own.
        seed: of the random rows.
        limit_gib: where set, a process that grows beyond it is stopped and counts as not able.
    """

    part: str
    name: str
    size: Size
    paths: tuple[str, ...] = BOTH
    compared: tuple[str, str] = BOTH
    items: tuple[int, ...] = (1, 1)
    prompt: int = 64
    cot: tuple[int, ...] = ()
    rate: int = 4
    answer: int = 16
    timed: bool = True
    memory: tuple[str, ...] = ()
    seed: int = 0
    limit_gib: float = 0.0


class Way(NamedTuple):
    """One path of a case: the module whose gradients are cleared, what a data loader does, and what is timed."""

    module: nn.Module
    prepare: Callable[[], Any]
    step: Callable[[Any], Any]


def all_cases(quick: bool) -> list[Case]:
    """Return every case in the order of measurement."""
    size = TINY if quick else FULL

    def stage1(cot: tuple[int, ...], rate: int, paths: tuple[str, ...] = BOTH, **rest: Any) -> Case:
        rows = f"{len(cot)} rows, CoT {cot[0]}-{cot[-1]}" if len(cot) > 1 else f"CoT {cot[0]}"
        values = {"part": "stage1", "name": f"{rows}, r={rate}", "items": (1,) * len(paths), **rest}
        return Case(size=size, cot=cot, rate=rate, paths=paths, **values)

    found = []
    for rate, lengths in LENGTHS.items():
        for length in (8 * rate,) if quick else lengths:
            paths = BOTH if length <= PLAIN_UP_TO[rate] else ("fast",)
            # memory where the number of latents is smallest
            found.append(stage1((length,), rate, paths, memory=paths if rate == 16 and length >= 512 else ()))
    found.append(stage1((5, 9, 12) if quick else tuple(range(60, 257, 28)), 4))
    if not quick:
        found.append(stage1((LONGEST,), 16, memory=BOTH, timed=False, limit_gib=LIMIT_GIB))
    for length in (32, 64) if quick else (1024, 2048, 4096, 8192):
        found.append(stage1((length,), 16, ("fast",), part="decoder"))

    prompt, latents, rows = (12, 5, 2) if quick else (512, 64, 4)
    name = f"{rows} rows of prompt {prompt}, {latents} latents, answer 16"
    found.append(Case(part="stage2", name=name, size=size, prompt=prompt, cot=(latents,) * rows, rate=1, memory=BOTH))

    def labels(size: Size, count: int, low: int, high: int, rate: int, start: str = "") -> Case:
        rng = random.Random(1)
        values = {"paths": ("plain", FULL_LOGITS, "fast"), "items": (count, max(1, count // 8), count)}
        values |= {"cot": tuple(rng.randint(low, high) for _ in range(count)), "memory": () if start else BOTH}
        name = f"{start}{count} examples, CoT {low}-{high}, r={rate}"
        return Case(part="labels", name=name, size=size, rate=rate, **values)

    full = (labels(FULL, 256, 64, 256, 4), labels(QUICKSTART, 256, 16, 28, 2, "hidden 64, "))
    found += (labels(TINY, 6, 4, 12, 4),) if quick else full

    batches = {1: 4, 4: 8} if quick else {1: 16, 16: 64, 64: 192, 256: 384}
    values = {"paths": ("plain", *(f"batch {b}" for b in batches)), "items": (4 if quick else 16, *batches.values())}
    values["memory"] = () if quick else ("plain", "batch 64", "batch 256")
    name = "latents up to 32, answers up to 16"
    found.append(Case(part="decode", name=name, size=size, prompt=60, cot=(32,), **values))
    two, steps = {"paths": ("explicit", "latent")}, 8 if quick else 96
    for b in (1, 4) if quick else (1, 64):
        values = {"part": "step", "name": f"batch {b}, {steps} steps each", "items": (b,) * 2, **two}
        found.append(Case(size=size, prompt=60, cot=(steps,), answer=1, **values))
    for b in (4,) if quick else (1, 64, 250):
        name = f"batch {b}, {QUICKSTART_TOKENS} tokens or {QUICKSTART_LATENTS} latents"
        values = {"name": name, "items": (b if quick else max(8, 2 * b),) * 2, **two}
        found.append(Case(part="quickstart", size=QUICKSTART, prompt=30, answer=2, **values))

    rows = 2 if quick else 8
    values = {"paths": KAVA, "compared": ("published", "kava"), "items": (rows,) * 4, "memory": KAVA, "answer": 8}
    for cot in (8,) if quick else (32, 128):
        found.append(Case(part="kava", name=f"{rows} rows, CoT {cot}", size=size, cot=(cot,) * rows, **values))
    name = "two models or one backbone, 71 M parameters"
    found.append(Case(part="shared", name=name, size=TINY if quick else LARGER, timed=False, memory=BOTH))
    return found


def small(case: Case) -> Case:
    """Return a case of the same kind that takes next to nothing, to warm up."""
    few = {"items": (2,) * len(case.items), "cot": (2 * case.rate,), "prompt": min(case.prompt, 12)}
    return dataclasses.replace(case, **few, size=TINY if case.part == "shared" else case.size)


def build(case: Case, device: str) -> dict[str, Way]:
    """Return the ways of doing a case, on the same weights."""
    return PARTS[case.part](case, device)


def spec_of(size: Size, **changes: Any) -> LatentSpec:
    """Return the published settings: stretched positions, learned marker, no noise; `</think>` is three tokens."""
    ids = {"think_ids": (1, 2, 3), "end_think_ids": (4, 5, 6), "eos_id": 7, "pad_id": 0, "vocab_size": size.vocab}
    marker = {"marker_positions": "stretched", "marker_input": "learned"}
    return LatentSpec(**{**ids, **marker, "top_k": TOP_K, "exclude_end": False, **changes})


def build_lm(size: Size, seed: int, device: str) -> LlamaForCausalLM:
    """Return a random model in float32; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=7,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Return random tokenised rows, one for each length in `case.cot`."""
    rng, spec = random.Random(case.seed), spec_of(case.size)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(8, case.size.vocab) for _ in range(count)]

    rows = []
    for number, length in enumerate(case.cot):
        row: dict[str, Any] = {"id": str(number), "hash": f"{number:016x}"}
        row["prompt"] = [*tokens(case.prompt - len(spec.think_ids)), *spec.think_ids]
        row |= {"cot": tokens(length), "segment_lengths": fixed_segments(length, case.rate)}
        row |= {"step_lengths": [length // 4] * 4, "answer": [*tokens(case.answer - 1), spec.eos_id]}
        rows.append({**row, "length": len(row["prompt"]) + length + case.answer})
    return rows


def prompts_of(case: Case, path: str) -> list[list[int]]:
    """Return the prompts that a call of this path solves.

    They are the same few problems as often as it takes, so that a problem is as long for every path.
    """
    rng, prompts = random.Random(2), []
    for _ in range(min(case.items)):
        length = rng.randint(case.prompt // 3, case.prompt)
        prompts.append([*(rng.randrange(8, case.size.vocab) for _ in range(length - 3)), 1, 2, 3])
    return [prompts[i % len(prompts)] for i in range(case.items[case.paths.index(path)])]


@cache
def random_labels(count: int, vocab: int, seed: int) -> Superposition:
    """Return `count` random latents, distinct ids `[count, K]` with weights that sum to 1, as a label store would."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocab, (count, 1), generator=generator)
    ids = (first + torch.arange(TOP_K) * (vocab // TOP_K)) % vocab
    return Superposition(ids, torch.softmax(torch.randn(count, TOP_K, generator=generator), dim=-1))


@torch.no_grad()
def without_ties(case: Case, device: str, tries: int = 5) -> Case:
    """Return a stage-1 case with rows for which both paths keep the same entries in every latent.

    Among many latents, two logits may be so near each other that rounding decides which of them is the k-th. Then the
    paths differ in that latent, and rightly so; such rows say nothing and are drawn again. Paths that always differ are
    left as they are.
    """
    fast, slow = _stage1_models(case.size, device)
    for seed in range(tries):
        drawn = dataclasses.replace(case, seed=seed)
        ways = build(drawn, device)
        found = fast.encode(ways["fast"].prepare()).ids.sort(-1).values
        expected = [latent.ids.sort(-1).values for latent in slow.encode(ways["plain"].prepare())]
        if all(torch.equal(ids, found[b, : len(ids)]) for b, ids in enumerate(expected)):
            return drawn
    return case


@cache
def _stage1_models(size: Size, device: str) -> tuple[Stage1Model, plain.PlainStage1]:
    marker = 0.02 * torch.randn(size.hidden, generator=torch.Generator().manual_seed(2))
    fast, slow = (
        kind(build_lm(size, 0, device), build_lm(size, 1, device), marker, spec_of(size)).to(device).train()
        for kind in (Stage1Model, plain.PlainStage1)
    )
    return fast, slow


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _stage1(case: Case, device: str) -> dict[str, Way]:
    fast, slow = _stage1_models(case.size, device)
    rows, given = rows_of(case), {}
    if case.part == "decoder":
        latents = random_labels(-(-case.cot[0] // case.rate), case.size.vocab, 0)
        given["label_of"] = lambda _id, _hash: latents
    batch = partial(stage1_batch, rows, fast.spec, loss_reduction="token", **given)
    inputs = partial(plain.stage1_inputs, rows, fast.spec)

    def step(batch: dict[str, Tensor]) -> Tensor:
        return _backward(fast(**batch).loss_sums["ce"] / batch["count_ce"])

    return {
        "plain": Way(slow, lambda: send_to_device(inputs(), device), lambda b: _backward(slow(b))),
        "fast": Way(fast, lambda: send_to_device(batch(), device), step),
    }


def _stage2(case: Case, device: str) -> dict[str, Way]:
    # a CoT of rate 1 stands for as many latents
    fast, slow = Stage2Model(build_lm(case.size, 0, device), spec_of(case.size)).train(), build_lm(case.size, 0, device)
    rows = rows_of(case)
    labels = {row["id"]: random_labels(len(row["cot"]), case.size.vocab, i) for i, row in enumerate(rows)}
    batch = partial(stage2_batch, rows, fast.spec, label_of=lambda row, _: labels[row], loss_reduction="token")
    inputs = partial(plain.stage2_inputs, rows, list(labels.values()), fast.spec)

    def step(batch: dict[str, Tensor]) -> Tensor:
        sums = fast(**batch).loss_sums
        return _backward(sums["ce"] / batch["count_ce"] + sums["kl"] / batch["count_kl"])

    return {
        "plain": Way(slow, lambda: send_to_device(inputs(), device), lambda b: _backward(plain.stage2_loss(slow, b))),
        "fast": Way(fast.lm, lambda: send_to_device(batch(), device), step),
    }


def _labels(case: Case, device: str) -> dict[str, Way]:
    # layout and masks are part of the step
    fast, slow = _stage1_models(case.size, device)
    rows = rows_of(case)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])  # as the `label` stage does

    def step(_: Any) -> list[Superposition]:
        found = dict(zip(order, oracle_latents(fast, [rows[i] for i in order], LABEL_BATCH), strict=True))
        return [found[i] for i in range(len(rows))]

    some = rows[: case.items[1]]
    return {
        "plain": Way(slow, list, lambda _: plain.labels(slow, rows)),
        FULL_LOGITS: Way(slow, list, lambda _: plain.labels(slow, some, full_logits=True)),
        "fast": Way(fast, list, step),
    }


def _decode(case: Case, device: str) -> dict[str, Way]:
    # a step solves `items` problems
    lm, quickstart = build_lm(case.size, 0, device).eval(), case.part == "quickstart"
    with torch.no_grad():  # the first token of </think>, and EOS
        lm.get_output_embeddings().weight[[4, 7]] *= STOPS if case.part == "decode" else NEVER_STOPS
    changes: dict[str, Any] = {"think_ids": (1,), "end_think_ids": (4,)} if quickstart else {}
    latents = QUICKSTART_LATENTS if quickstart else case.cot[0]
    spec = spec_of(case.size, max_latents=latents, max_answer_tokens=case.answer, **changes)
    ways = {}
    for path in case.paths:
        prompts = prompts_of(case, path)
        if path == "plain":
            ways[path] = Way(lm, list, lambda _, p=prompts: [plain.answer(lm, spec, one) for one in p])
            continue
        options = {
            "thinker": "explicit" if path == "explicit" else "latent",
            "max_cot_tokens": QUICKSTART_TOKENS if quickstart else case.cot[0],
            "batch_size": int((path if case.part == "decode" else case.name.split(",")[0]).split()[-1]),
        }
        ways[path] = Way(lm, list, lambda _, p=prompts, o=options: generate(lm, spec, p, **o))
    return ways


def distill_settings(path: str) -> SelfDistillConfig:
    """Return KaVa's settings (M = 24, T = 3) with the terms of a path."""
    every = kava_settings()
    kv = dataclasses.replace(every.kv, weight=0.0 if path in ("codi", "student") else every.kv.weight)
    others = 0.0 if path == "student" else 1.0
    teacher = 0.0 if path == "published" else others
    return dataclasses.replace(every, kv=kv, hidden_weight=every.hidden_weight * others, teacher_weight=teacher)


def _kava(case: Case, device: str) -> dict[str, Way]:
    """Build `kava`, all four terms; `codi`, no keys and values; `student`, its cross-entropy alone; and `published`.

    The last takes targets from a pass without gradient, and the teacher's cross-entropy from another one over prompt,
    steps and answer.
    """
    spec, rows = spec_of(case.size), rows_of(case)

    def way(path: str) -> Way:
        settings = distill_settings(path)
        shape = {"num_latents": settings.num_latents, "iterations": settings.iterations}
        thought_spec = ThoughtSpec(**shape, projection=settings.projection)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            thoughts = Thoughts(thought_spec, torch.randn(case.size.hidden) * 0.02).to(device)
        lm = build_lm(case.size, 0, device).train()
        model, explicit = SelfDistillModel(lm, thoughts, spec, settings), ExplicitModel(lm)
        weights = {"ce": 1.0, "teacher_ce": 1.0, "hidden": settings.hidden_weight, "kv": settings.kv.weight}

        def batches() -> list[Any]:
            batch = distill_batch(rows, spec, thought_spec, loss_reduction="token", drop_last_step=True, kv=settings.kv)
            shown = [{**row, "cot": row["cot"][: 3 * row["step_lengths"][0]]} for row in rows]
            again = explicit_batch(shown, spec, with_cot=True, loss_reduction="token")
            return send_to_device([batch, again], device)

        def step(both: list[Any]) -> Tensor:
            batch, again = both
            sums = model(**batch).loss_sums
            if path == "published":
                sums["teacher_ce"] = explicit(**again).loss_sums["ce"]
            losses = [weights[name] * total / batch[f"count_{name}"] for name, total in sums.items()]
            return _backward(torch.stack(losses).sum())

        return Way(model, batches, step)

    return {path: way(path) for path in case.paths}


def _shared(case: Case, device: str) -> dict[str, Way]:
    # the model is built by `prepare`, so that its weights count
    sizes = {"hidden_size": case.size.hidden, "num_layers": case.size.layers, "num_heads": case.size.heads}
    sizes |= {"num_kv_heads": case.size.heads, "intermediate_size": case.size.intermediate}
    settings = [f"model.tiny.{key}={value}" for key, value in sizes.items()] + ["model.lora.rank=16"]
    settings += ["data.synthetic.num_train=20", "data.synthetic.num_validation=4", "data.synthetic.num_test=4"]
    settings += ["stage1.encoder.enabled=false", "stage1.decoder.enabled=false"]

    def way(share: str) -> Way:
        holder, folder = nn.ModuleList(), tempfile.TemporaryDirectory()
        work = Workspace(load_config(None, [*settings, f"run_dir={folder.name}", f"stage1.share_backbone={share}"]))
        batch = stage1_batch(work.data["train"].select(range(2)).to_list(), work.spec, loss_reduction="token")
        setup = work.setup("stage1-union")

        def prepare() -> nn.Module:
            with folder:
                return holder.append(STAGES["stage1-union"].model(setup).to(device))[0]

        return Way(holder, prepare, lambda m: _backward(m(**send_to_device(batch, device)).loss_sums["ce"]))

    return {"plain": way("false"), "fast": way("true")}


PARTS = {"stage1": _stage1, "decoder": _stage1, "stage2": _stage2, "labels": _labels, "kava": _kava, "shared": _shared}
PARTS |= dict.fromkeys(("decode", "step", "quickstart"), _decode)
