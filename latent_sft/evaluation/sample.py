"""Chains of thought of one's own: a model answers problems several times, and right chains become training rows.

    OUT.jsonl                    the rows that are kept, in the order of the problems; there only when whole
    OUT.sampled/manifest.json    what they were made from, and how many came out
    OUT.sampled/problems.jsonl   a line for every problem: how often it was solved, how long the right chains were, rows

What a problem's n-th sample draws is decided by the seed, its id and n, so neither batches nor a kill change a row.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from latent_sft.config.experiment import Config
from latent_sft.config.schema import EvalConfig
from latent_sft.data.formats import Record
from latent_sft.data.prompts import render_prompt
from latent_sft.data.records import Splits, load_splits
from latent_sft.errors import ArtefactError, ConfigError, DataError, did_you_mean
from latent_sft.evaluation.answers import answer_text, is_correct
from latent_sft.experiment.workspace import Workspace
from latent_sft.inference.engine import THINKERS, Decoded, Engine
from latent_sft.inference.noise import Sampling
from latent_sft.inference.show import load
from latent_sft.inference.solve import Thinker
from latent_sft.method.types import LatentSpec
from latent_sft.methods import MODELS, method_of
from latent_sft.models.load import weights_fingerprint
from latent_sft.runs import Step, exclusive, write_atomically

Keep = Literal["shortest", "first", "all"]
JOURNAL = "problems.jsonl"

log = logging.getLogger(__name__)


class Sampler(NamedTuple):
    """A model that writes chains of thought.

    Attributes:
        name: as given, for the rows.
        identity: of its weights.
        thinker: the model and how it thinks.
        spec: settings.
        tokenizer: its tokenizer.
    """

    name: str
    identity: Any
    thinker: Thinker
    spec: LatentSpec
    tokenizer: PreTrainedTokenizerBase


def of_checkpoint(checkpoint: str, out: Path) -> Sampler:
    """Load an exported checkpoint, or the `final` folder of a stage."""
    found = load(checkpoint)
    known = Path(checkpoint).is_dir()
    weights = weights_fingerprint(Path(checkpoint), sampled_folder(out) / "weights.json") if known else checkpoint
    return Sampler(checkpoint, weights, found.thinker, found.spec, found.tokenizer)


def of_run(config: Config, model: str, work: Workspace) -> Sampler:
    """Load a trained model of an experiment.

    Raises:
        ConfigError: the experiment trains no such model.
        ArtefactError: it is not trained yet.
    """
    stages = config.models()
    if model not in stages:
        raise ConfigError(
            f"--model: the experiment trains no {model!r}.{did_you_mean(model, stages, shown=len(stages))}"
        )
    source = work.step(stages[model][-1])
    results = source.results()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = config.settings(method_of(model).settings)
    thinker = MODELS[model].load(source.final, config.model, work.spec, own, device)
    identity = [source.outcome, results.get("ended")]
    return Sampler(f"{config.directory}: {model}", identity, thinker, work.spec, work.tokenizer)


def problems_of(config: Config, file: str) -> Splits:
    """Return splits whose `test` is a file of problems with answers; chains of thought in it are not needed."""
    data = dataclasses.replace(config.data, train=file, validation=file, test=file, test_format="", test_fields={})
    return load_splits(data)


def sample(
    sampler: Sampler,
    splits: Splits,
    split: str,
    out: Path,
    *,
    count: int,
    keep: Keep,
    longest: int,
    settings: EvalConfig,
    limit: int = 0,
) -> dict[str, Any]:
    """Answer every problem of a split and write the rows that are kept; goes on where an earlier call was stopped.

    Args:
        sampler: the model.
        splits: of the data.
        split: whose problems are answered.
        out: file to write, `.jsonl`.
        count: answers to each problem.
        keep: which of a problem's right chains: the shortest one in tokens, the first one, or all different ones.
        longest: tokens of a chain that may be kept; 0 does not limit them.
        settings: how answers are sampled and graded, chains ended, and rows batched.
        limit: only so many problems, the first ones; a later call with more goes on. 0 takes all.

    Returns:
        `problems`, `solved`, `rows`, `accuracy` of all samples, mean `tokens` of right and of kept chains.

    Raises:
        ConfigError: the model writes no text, or several samples would all be the same.
        DataError: the split is empty.
        ArtefactError: the place holds something else.
    """
    if not THINKERS[sampler.thinker.kind].readable or sampler.thinker.oracle is not None:
        raise ConfigError(f"sample: {sampler.name} writes no reasoning; expected a model that does, such as cot.")
    if count > 1 and settings.temperature <= 0:
        raise ConfigError(f"eval.temperature: got {settings.temperature}, expected > 0 for --n {count} samples.")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out: got {out}, expected a file that ends in .jsonl.")
    used = {key: getattr(settings, key) for key in ("temperature", "top_p", "seed", "grader", "max_cot_tokens")}
    inputs = {"model": sampler.identity, "spec": sampler.spec.to_dict(), "data": splits.sources.get(split), **used}
    step = Step(directory=sampled_folder(out), inputs={**inputs, "n": count, "keep": keep, "longest": longest})
    if out.exists() and step.manifest() is None:
        raise ArtefactError(f"{out}: exists, and was not made by this command; give another --out, or delete it.")
    with exclusive(step.directory):
        finished = step.is_finished() and out.exists()
        records: list[Record] = getattr(splits, split)[: limit or None]
        if not records:
            raise DataError(f"--split: there are no {split} problems; expected some to answer.")
        if finished and step.results()["summary"]["problems"] == len(records):
            log.info("%s: finished already, skipped", out)
            return step.results()["summary"]
        step.begin(settings.seed)
        found = _journal(step.directory / JOURNAL)
        rest = [record for record in records if record.id not in found]
        if found:
            log.info("%s: goes on, %d of %d problems are left", out, len(rest), len(records))
        with open(step.directory / JOURNAL, "a", encoding="utf-8") as journal:
            bar = tqdm(
                total=len(records),
                initial=len(records) - len(rest),
                desc=f"sample {split}",
                unit="problem",
                disable=None,
            )
            with bar:
                for record, samples in _answered(sampler, rest, count, settings):
                    found[record.id] = _graded(sampler, record, samples, keep, longest, settings)
                    journal.write(json.dumps(found[record.id], ensure_ascii=False) + "\n")
                    journal.flush()
                    bar.update(1)
        ordered = [found[record.id] for record in records]
        summary = _summary(ordered, count)
        about = {"model": sampler.name, "of": count, **used}
        rows = [
            _row(record, chain, about | {"correct": entry["correct"]}, chat=any(r.turns for r in records), keep=keep)
            for record, entry in zip(records, ordered, strict=True)
            for chain in entry["kept"]
        ]
        write_atomically(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        step.finish(summary=summary)
    return summary


def sampled_folder(out: Path) -> Path:
    """Return the folder beside the rows that says what they were made from."""
    return out.with_suffix(".sampled")


def as_text(summary: dict[str, Any], out: Path) -> str:
    """Return a summary in two lines."""
    return (
        f"{summary['solved']:,} of {summary['problems']:,} problems solved at least once; {summary['accuracy']:.1%} of "
        f"all samples right, {summary['right_tokens_mean']:.1f} tokens of CoT in the mean\n"
        f"{summary['rows']:,} rows kept, {summary['kept_tokens_mean']:.1f} tokens of CoT in the mean: {out}"
    )


def _answered(
    sampler: Sampler, records: Sequence[Record], count: int, settings: EvalConfig
) -> Iterator[tuple[Record, list[Decoded]]]:
    """Yield every problem with its samples, as soon as they are there."""
    if not records:
        return
    how, spec = sampler.thinker, sampler.spec
    prompts = [render_prompt(sampler.tokenizer, spec, record.problem, record.turns) for record in records]
    asked: dict[int, tuple[int, int]] = {}  # request -> problem, sample
    samples: dict[int, dict[int, Decoded]] = {}
    with Engine(
        how.lm,
        spec,
        thinker=how.kind,
        longest=max(map(len, prompts)),
        batch_size=min(settings.batch_size, len(prompts) * count),
        sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed),
        max_cot_tokens=settings.max_cot_tokens,
        thoughts=how.thoughts,
        mixture=how.mixture,
    ) as engine:
        coming = iter(range(len(records)))
        more = True
        while more or engine.busy():
            while more and len(engine.queue) < settings.batch_size:
                problem = next(coming, -1)
                more = problem >= 0
                for number in range(count) if more else ():
                    draws = random.Random(f"{records[problem].id}/{number}").getrandbits(48)
                    asked[engine.add(prompts[problem], number=draws)] = problem, number
            for request, decoded in engine.step(more=more).items():
                problem, number = asked.pop(request)
                samples.setdefault(problem, {})[number] = decoded
                if len(samples[problem]) == count:
                    done = samples.pop(problem)
                    yield records[problem], [done[number] for number in range(count)]


def _graded(
    sampler: Sampler, record: Record, samples: Sequence[Decoded], keep: Keep, longest: int, settings: EvalConfig
) -> dict[str, Any]:
    tokenizer, right = sampler.tokenizer, []
    for number, decoded in enumerate(samples):
        answer = answer_text(tokenizer, decoded.answer_ids)
        if not decoded.finished or not is_correct(answer, record.answer, settings.grader):
            continue
        thought = answer_text(tokenizer, decoded.thought_ids).strip()
        whole = len(decoded.thought_ids) < settings.max_cot_tokens  # else it was ended for it
        chain = {"sample": number, "tokens": len(decoded.thought_ids), "cot": thought, "cot_answer": answer.strip()}
        right.append(chain | {"usable": bool(thought) and whole and chain["tokens"] <= (longest or chain["tokens"])})
    usable = {chain["cot"]: chain for chain in reversed(right) if chain.pop("usable")}  # of equal ones the first
    kept = sorted(usable.values(), key=lambda chain: (chain["tokens"] if keep == "shortest" else 0, chain["sample"]))
    return {
        "id": record.id,
        "correct": len(right),
        "tokens": [chain["tokens"] for chain in right],
        "kept": kept if keep == "all" else kept[:1],
    }


def _row(record: Record, chain: dict[str, Any], about: dict[str, Any], *, chat: bool, keep: Keep) -> dict[str, Any]:
    name = f"{record.id}/{chain['sample']}" if keep == "all" else record.id
    row = {"id": name, "answer": record.answer}
    sampled = {**about, "sample": chain["sample"], "tokens": chain["tokens"]}
    if not chat:
        return {
            **row,
            "problem": record.problem,
            "cot": chain["cot"],
            "cot_answer": chain["cot_answer"],
            "sampled": sampled,
        }
    turns = [{"role": role, "content": text} for role, text in record.turns or (("user", record.problem),)]
    reply = {"role": "assistant", "content": chain["cot_answer"], "reasoning_content": chain["cot"]}
    return {**row, "messages": [*turns, reply], "sampled": sampled}


def _journal(path: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each problem; a line that a kill cut off is taken away."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        return {entry["id"]: entry for entry in map(json.loads, whole.splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: damaged ({error}); delete {path.parent} to sample again.") from error


def _summary(entries: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    right = [tokens for entry in entries for tokens in entry["tokens"]]
    kept = [chain["tokens"] for entry in entries for chain in entry["kept"]]
    return {
        "problems": len(entries),
        "solved": sum(entry["correct"] > 0 for entry in entries),
        "rows": len(kept),
        "accuracy": len(right) / (len(entries) * count),
        "right_tokens_mean": sum(right) / max(1, len(right)),
        "kept_tokens_mean": sum(kept) / max(1, len(kept)),
    }
