"""The store of what a model's encoder makes of every training row; stages that read it find a row by its id.

A store is a step of its own (`label`), or is made by the stage that reads it before it begins.
"""

from __future__ import annotations

import logging

import torch
from tqdm import tqdm

from latent_sft.config.experiment import Config
from latent_sft.data.labels import LabelRow, LabelWriter
from latent_sft.experiment.workspace import Workspace, processes
from latent_sft.methods import STAGES
from latent_sft.methods.base import Store
from latent_sft.runs import Step

log = logging.getLogger(__name__)


def make_labels(config: Config, work: Workspace | None = None) -> None:
    """Make every store of an experiment that is a step of its own, or return at once where they are finished.

    Raises:
        ArtefactError: the model that makes them is not finished, or a store belongs to another experiment.
    """
    work = work or Workspace(config)
    for name, stage in STAGES.items():
        if stage.reads is not None and stage.reads.name and config.stage(name).enabled:
            store_latents(work, name)


def store_latents(work: Workspace, name: str) -> Step:
    """Store the latents of the training set, shard by shard, or return at once where they are finished.

    Resumable. The work is shared by the processes of this job; where it has one, by `labels.num_processes` of its own.
    The encoder runs as for validation: no dropout, no noise, weights in the dtype they were loaded in.

    Args:
        work: the opened experiment.
        name: of the stage that will read them.

    Raises:
        ArtefactError: stage 1 is not finished, or the store belongs to another experiment.
    """
    config, job, store = work.config, processes(), _read_by(name)
    step = work.store_step(store)
    # a shard that was deleted because it was damaged makes a finished store unfinished
    finished = step.is_finished() and not _writer(work, store).missing_shards()
    job.wait_for_everyone()
    if finished:
        log.info("%s: finished already, skipped (%s)", store.folder, step.directory)
        return step
    source = work.store_source(store)
    if source is not None:
        source.results()
    with job.main_process_first():
        if job.is_main_process:
            step.begin(config.seed)
        writer = _writer(work, store)
    workers = min(config.labels.num_processes, max(1, len(writer.missing_shards())))
    if job.num_processes == 1 and workers > 1:
        log.info("%s: %d processes", store.folder, workers)
        # each process opens the experiment by itself: nothing but the configuration is sent
        torch.multiprocessing.spawn(_worker, args=(workers, config, name), nprocs=workers, daemon=True)
    else:
        _write_missing(work, name, job.process_index, job.num_processes)
    job.wait_for_everyone()
    if job.is_main_process:
        writer.finish()
        step.finish(num_rows=len(work.data["train"]))
    job.wait_for_everyone()
    return step


def _worker(rank: int, world_size: int, config: Config, name: str) -> None:
    work = Workspace(config)
    torch.set_num_threads(config.launch.cpu_threads or max(1, torch.get_num_threads() // world_size))
    _write_missing(work, name, rank, world_size)


def _read_by(name: str) -> Store:
    store = STAGES[name].reads
    assert store is not None
    return store


def _writer(work: Workspace, store: Store) -> LabelWriter:
    step = work.store_step(store)
    return LabelWriter(
        step.directory / "store",
        work.store_made_from(store),
        top_k=work.spec.top_k,
        dtype=step.inputs["dtype"],
        shard_size=step.inputs["shard_size"],
        num_rows=len(work.data["train"]),
    )


def _write_missing(work: Workspace, name: str, rank: int, world_size: int) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    store = _read_by(name)
    model = store.model(work.store_setup(store)).to(device)
    writer, train = _writer(work, store), work.data["train"]
    missing = writer.missing_shards(rank, world_size)
    total = sum(len(writer.rows_of(s)) for s in missing)
    with tqdm(total=total, desc=store.folder, unit="row", disable=rank > 0) as bar:
        for shard in missing:
            rows = list(train.select(writer.rows_of(shard)))
            # similar lengths together, then back into order
            order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
            batch_size = work.config.labels.batch_size
            latents = dict(zip(order, store.encode(model, [rows[i] for i in order], batch_size), strict=True))
            writer.write(shard, [LabelRow(id=r["id"], hash=r["hash"], latents=latents[i]) for i, r in enumerate(rows)])
            bar.update(len(rows))
