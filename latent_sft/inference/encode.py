"""Stage-1 models on disk, and the store of what their encoder makes of every training row.

Two steps read such a store: stage 2 its labels, and the decoder phase of stage 1 the latents of its frozen encoder.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from latent_sft.config.schema import SECTIONS, Config
from latent_sft.data.labels import LabelRow, LabelWriter
from latent_sft.errors import ArtefactError, ConfigError
from latent_sft.inference.solve import gold_latents
from latent_sft.models.load import add_lora, initial_marker, load_lm, twin
from latent_sft.models.stage1 import Stage1Model
from latent_sft.runs import Step
from latent_sft.workspace import STAGE1_PHASES, Workspace, processes

MARKER_FILE = "marker.safetensors"
ADAPTERS_FILE = "adapters.safetensors"  # of both halves, where they share a backbone

log = logging.getLogger(__name__)


def load_stage1(work: Workspace, folder: Path, reader: str = "label") -> Stage1Model:
    """Load encoder, decoder and marker from a finished phase, for what `reader` does with them.

    Raises:
        ArtefactError: the folder is incomplete.
    """
    if not (folder / MARKER_FILE).exists():
        raise ArtefactError(f"{folder / MARKER_FILE}: missing; run that stage-1 phase again.")
    return _stage1(work, reader, folder / "encoder", folder / "decoder", load_file(folder / MARKER_FILE)["marker"])


def phase_start(work: Workspace, reader: str) -> Stage1Model:
    """Return encoder, decoder and marker as a phase of stage 1, or `label`, finds them.

    Those of the phase before; the first phase starts with two copies of the base model (or the `cot` stage's) and the
    initial marker.
    """
    source = work.source_of(reader)
    if source is not None and (source.directory.name in STAGE1_PHASES or (source.final / MARKER_FILE).exists()):
        return load_stage1(work, source.final, reader)
    start = work.start_of(reader)
    return _stage1(work, reader, start, start)


def _stage1(
    work: Workspace, reader: str, encoder: str | Path, decoder: str | Path, marker: Tensor | None = None
) -> Stage1Model:
    def loaded(path: str | Path, half: str) -> nn.Module:
        trained = reader in (f"stage1-{half}", "stage1-union")
        return load_lm(path, work.config.trained_model if trained else work.config.model)

    first = loaded(encoder, "encoder")
    marker = initial_marker(first, work.spec) if marker is None else marker
    return Stage1Model(first, loaded(decoder, "decoder"), marker, work.spec, attention=work.config.stage1.attention)


def shared_start(work: Workspace, phase: str) -> Stage1Model:
    """Return encoder and decoder as two sets of adapters on one frozen model, as a phase of stage 1 finds them.

    Adapters go on from the phase before; they are not folded into the weights, which both halves share.

    Raises:
        ArtefactError: the phase before was trained with two models.
    """
    config, source = work.config, work.source_of(phase)
    first = next((p for p in STAGE1_PHASES if config.stage(p).enabled), phase)
    root = work.source_of(first)
    if root is not None and (root.final / MARKER_FILE).exists():
        raise ConfigError(
            f"{SECTIONS[first]}.start_from: {root.final} holds an encoder and a decoder, expected one model where "
            "stage1.share_backbone is true. Give one of its two folders."
        )
    encoder = load_lm(work.start_of(first), config.model)
    decoder = twin(encoder)
    marker = initial_marker(encoder, work.spec)
    model = Stage1Model(encoder, decoder, marker, work.spec, attention=config.stage1.attention)
    model.encoder = add_lora(model.encoder, config.model.lora)
    model.decoder = add_lora(model.decoder, config.model.lora)
    if phase != first and source is not None:
        path = source.final / ADAPTERS_FILE
        if not path.exists():
            raise ArtefactError(f"{path}: missing; that phase was trained without stage1.share_backbone. Run it again.")
        model.load_state_dict(load_file(path), strict=False)
    return model


def store_latents(work: Workspace, reader: str) -> Step:
    """Store the latents of the training set, shard by shard, or return at once where they are finished.

    Resumable. The work is shared by the processes of this job; where it has one, by `labels.num_processes` of its own.
    The encoder runs as for validation: no dropout, no noise, weights in the dtype they were loaded in.

    Args:
        work: the opened experiment.
        reader: who will read them: `label` (that is, stage 2) or `stage1-decoder`.

    Raises:
        ArtefactError: stage 1 is not finished, or the store belongs to another experiment.
    """
    config, job, step = work.config, processes(), work.labels_step(reader)
    name = step.directory.name
    # a shard that was deleted because it was damaged makes a finished store unfinished
    finished = step.is_finished() and not _writer(work, reader).missing_shards()
    job.wait_for_everyone()
    if finished:
        log.info("%s: finished already, skipped (%s)", name, step.directory)
        return step
    source = work.source_of(reader)
    if source is not None:
        source.results()
    with job.main_process_first():
        if job.is_main_process:
            step.begin(config.seed)
        writer = _writer(work, reader)
    workers = min(config.labels.num_processes, max(1, len(writer.missing_shards())))
    if job.num_processes == 1 and workers > 1:
        log.info("%s: %d processes", name, workers)
        # each process opens the experiment by itself: nothing but the configuration is sent
        torch.multiprocessing.spawn(_worker, args=(workers, config, reader), nprocs=workers, daemon=True)
    else:
        _write_missing(work, reader, job.process_index, job.num_processes)
    job.wait_for_everyone()
    if job.is_main_process:
        writer.finish()
        step.finish(num_rows=len(work.data["train"]))
    job.wait_for_everyone()
    return step


def _worker(rank: int, world_size: int, config: Config, reader: str) -> None:
    work = Workspace(config)
    torch.set_num_threads(config.launch.cpu_threads or max(1, torch.get_num_threads() // world_size))
    _write_missing(work, reader, rank, world_size)


def _writer(work: Workspace, reader: str) -> LabelWriter:
    step = work.labels_step(reader)
    return LabelWriter(
        step.directory / "store",
        work.labels_made_from(reader),
        top_k=work.spec.top_k,
        dtype=step.inputs["dtype"],
        shard_size=step.inputs["shard_size"],
        num_rows=len(work.data["train"]),
    )


def _write_missing(work: Workspace, reader: str, rank: int, world_size: int) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    model = phase_start(work, reader).to(device)
    writer, train = _writer(work, reader), work.data["train"]
    missing = writer.missing_shards(rank, world_size)
    total = sum(len(writer.rows_of(s)) for s in missing)
    with tqdm(total=total, desc=work.labels_step(reader).directory.name, unit="row", disable=rank > 0) as bar:
        for shard in missing:
            rows = list(train.select(writer.rows_of(shard)))
            # similar lengths together, then back into order
            order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
            batch_size = work.config.labels.batch_size
            latents = dict(zip(order, gold_latents(model, [rows[i] for i in order], batch_size), strict=True))
            writer.write(
                shard,
                [LabelRow(id=r["id"], hash=r["hash"], latents=latents[i]) for i, r in enumerate(rows)],
            )
            bar.update(len(rows))
