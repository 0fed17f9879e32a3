"""Make the label store: the encoder's latents of every training row, shard by shard, resumable, by any number of
processes.
"""

from __future__ import annotations

import logging

import torch
from tqdm import tqdm

from latent_sft.config.schema import Config
from latent_sft.data.labels import LabelRow, LabelWriter
from latent_sft.inference.solve import gold_latents
from latent_sft.runs import Step
from latent_sft.train.stages import load_stage1
from latent_sft.workspace import Workspace

log = logging.getLogger(__name__)


def make_labels(config: Config, work: Workspace | None = None) -> Step:
    """Store the latents of the training set, or return at once where they are finished.

    Raises:
        ArtefactError: stage 1 is not finished, or the store belongs to another experiment.
    """
    work = work or Workspace(config)
    step = work.labels_step()
    if step.is_finished():
        log.info("label: finished already, skipped (%s)", step.directory)
        return step
    source = work.source_of("label")
    assert source is not None
    source.results()
    step.begin(config.seed)
    writer = _writer(config, work)
    workers = min(config.labels.num_processes, max(1, len(writer.missing_shards())))
    if workers > 1:
        log.info("label: %d processes", workers)
        # each process opens the experiment by itself: nothing but the configuration is sent
        torch.multiprocessing.spawn(_worker, args=(workers, config), nprocs=workers, join=True)
    else:
        _write_missing(config, work, 0, 1)
    writer.finish()
    step.finish(num_rows=len(work.data["train"]))
    return step


def _worker(rank: int, world_size: int, config: Config) -> None:
    work = Workspace(config)
    torch.set_num_threads(config.launch.cpu_threads or max(1, torch.get_num_threads() // world_size))
    _write_missing(config, work, rank, world_size)


def _writer(config: Config, work: Workspace) -> LabelWriter:
    return LabelWriter(
        work.labels_step().directory / "store",
        work.labels_made_from(),
        top_k=work.spec.top_k,
        dtype=config.labels.dtype,
        shard_size=config.labels.shard_size,
        num_rows=len(work.data["train"]),
    )


def _write_missing(config: Config, work: Workspace, rank: int, world_size: int) -> None:
    source = work.source_of("label")
    assert source is not None
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    model = load_stage1(work, source.final).to(device)
    writer, train = _writer(config, work), work.data["train"]
    missing = writer.missing_shards(rank, world_size)
    total = sum(len(writer.rows_of(s)) for s in missing)
    with tqdm(total=total, desc="label", unit="row", disable=rank > 0) as bar:
        for shard in missing:
            rows = list(train.select(writer.rows_of(shard)))
            # similar lengths together, then back into order
            order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
            latents = dict(
                zip(order, gold_latents(model, [rows[i] for i in order], config.labels.batch_size), strict=True)
            )
            writer.write(
                shard,
                [LabelRow(id=r["id"], hash=r["hash"], latents=latents[i]) for i, r in enumerate(rows)],
            )
            bar.update(len(rows))
