"""Checkpoints on the Hugging Face Hub while a stage trains, and back from there on a machine that has none.

    README.md  config.yaml                     what this is, and the experiment
    <stage>/manifest.json  metrics.jsonl       as in the run folder
    <stage>/checkpoint-*   final               complete ones only

A push is one commit that replaces what the stage had there, so whoever reads finds parts that belong together, also
where a push was cut off. It runs in the background and never ends training: what failed is sent with the next
checkpoint, and once more at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.utils import disable_progress_bars

from latent_sft.config.experiment import Config
from latent_sft.config.load import to_yaml
from latent_sft.errors import ArtefactError, LatentSFTError, TrainingError
from latent_sft.experiment.workspace import Workspace
from latent_sft.hub import explained
from latent_sft.methods.base import Callback, TrainState
from latent_sft.runs import MANIFEST, Step, write_atomically
from latent_sft.train.interruption import MARKER, last_checkpoint

UNREACHABLE = "or train without the Hub: hub.repo= (nothing is pushed, and nothing resumed from there)."

log = logging.getLogger(__name__)


def restore(work: Workspace, name: str) -> None:
    """Fetch a stage that has no checkpoint here, and what it starts from, where `hub.repo` has them.

    Raises:
        ArtefactError: what is there belongs to another experiment.
        TrainingError: the Hub does not answer or refuses the token; starting anew might replace what is there.
    """
    source = work.source_name(name)
    if source is not None:
        restore(work, source)
    step, repo = work.step(name), work.config.hub.repo
    if step.is_finished() or last_checkpoint(step.directory) is not None:
        return
    with explained(repo, TrainingError, UNREACHABLE):
        disable_progress_bars()
        api = HfApi(library_name="latent_sft")
        # it has to be made sooner or later, and this asks whether the token may write
        api.create_repo(repo, private=work.config.hub.private, exist_ok=True)
        if not api.file_exists(repo, f"{name}/{MANIFEST}"):
            return
        part = step.directory.parent / ".hub" / f"{name}.in"
        shutil.rmtree(part, ignore_errors=True)
        # file by file: `snapshot_download` takes what is in the folder where the list of files cannot be had
        files = [path for path in api.list_repo_files(repo) if path.startswith(f"{name}/")]
        api.hf_hub_download(repo, f"{name}/{MANIFEST}", local_dir=part)
        try:
            Step(directory=part / name, inputs=step.inputs).is_finished()
        except ArtefactError as error:
            changed = str(error).partition("(")[2].rpartition(")")[0]
            raise ArtefactError(
                f"hub.repo: {repo} holds {name} of another experiment ({changed}). Nothing was overwritten. Use "
                "another hub.repo, or restore the settings."
            ) from error
        for path in files:
            api.hf_hub_download(repo, path, local_dir=part)
        log.info("%s: fetched from %s", name, repo)
    step.directory.mkdir(parents=True, exist_ok=True)
    # the manifest last: until then this counts as not begun, and is fetched again
    for path in sorted((part / name).iterdir(), key=lambda path: path.name == MANIFEST):
        place = step.directory / path.name
        if place.is_dir():
            shutil.rmtree(place)
        shutil.move(path, place)
    shutil.rmtree(part)


class Uploads(Callback):
    """Pushes the checkpoints of a stage, in a `with` block; at its end also what is not there yet.

    Args:
        config: the experiment.
        step: of the stage.
        state: where its training stands.
    """

    def __init__(self, config: Config, step: Step, state: TrainState) -> None:
        disable_progress_bars()
        self.config, self.hub, self.step, self.state = config, config.hub, step, state
        self.api = HfApi(library_name="latent_sft")
        self.running: Future[None] | None = None
        self.saved, self.sent = state.global_step, 0  # optimizer steps of the newest checkpoint, here and there

    def __enter__(self) -> Uploads:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for a push that runs, then push what is new."""
        if self.running is not None:
            self.running.result()
        if self.sent < self.saved or self.step.final.is_dir():
            self._push(f"{self.step.directory.name}: step {self.saved}, at the end")

    def on_save(self, state: TrainState) -> None:
        """Begin to push the newest checkpoint, unless an earlier push still runs or it is not due."""
        self.saved = state.global_step
        idle = self.running is None or self.running.done()
        if idle and self.saved - self.sent >= self.hub.every:
            self._push(f"{self.step.directory.name}: step {self.saved} of {state.max_steps}", background=True)

    def _push(self, message: str, background: bool = False) -> None:
        with self._warned():
            folder = self._collected()
            if not background:
                self._send(folder, message, self.saved)
                return
            self.running = self.api.run_as_future(self._try_send, folder, message, self.saved)

    def _try_send(self, folder: Path, message: str, saved: int) -> None:
        with self._warned():
            self._send(folder, message, saved)

    def _send(self, folder: Path, message: str, saved: int) -> None:
        with explained(self.hub.repo, TrainingError, "training goes on."):
            self.api.create_repo(self.hub.repo, private=self.hub.private, exist_ok=True)
            self.api.upload_folder(
                repo_id=self.hub.repo,
                folder_path=folder,
                commit_message=message,
                delete_patterns=f"{self.step.directory.name}/*",  # those that are not sent again
            )
        self.sent = saved

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except LatentSFTError as error:
            log.warning("not pushed: %s", error)
        except Exception as error:  # a file of the folder, or a surprise of a library: training is worth more
            log.warning("%s: not pushed (%s)", self.hub.repo, type(error).__name__)
        else:
            return
        log.warning(
            "It is sent with the next checkpoint and at the end of the stage; by hand: `hf upload %s %s %s`",
            self.hub.repo, self.step.directory, self.step.directory.name,
        )  # fmt: skip

    def _collected(self) -> Path:
        """Return a folder of what is sent: links, since old checkpoints are deleted while a push runs."""
        name, out = self.step.directory.name, self.step.directory.parent / ".hub" / f"{self.step.directory.name}.out"
        shutil.rmtree(out, ignore_errors=True)
        (out / name).mkdir(parents=True)
        folders = [path.parent for path in self.step.directory.glob(f"checkpoint-*/{MARKER}")]
        for folder in [*folders, *([self.step.final] if self.step.final.is_dir() else [])]:
            shutil.copytree(folder, out / name / folder.name, copy_function=_link)
        for file in (MANIFEST, "metrics.jsonl"):
            if (self.step.directory / file).exists():
                shutil.copyfile(self.step.directory / file, out / name / file)
        write_atomically(out / "config.yaml", to_yaml(self.config))
        write_atomically(out / "README.md", self._card())
        return out

    def _card(self) -> str:
        base, best = self.config.model.name_or_path, self.state.best_metric
        data = ModelCardData(
            library_name="transformers",
            license=self.config.export.license,
            base_model=base if base and not Path(base).exists() else None,
            tags=["latent-reasoning", "checkpoint"],
        )
        accuracy = "none yet" if best is None else f"{best:.1%}"
        return (
            f"---\n{data.to_yaml()}\n---\n\n# {self.config.name}\n\nCheckpoints of a training run of `latent_sft`. "
            f"Newest: stage `{self.step.directory.name}` at step {self.saved}, best validation accuracy {accuracy}. "
            f"`latent-sft run config.yaml`, with the file of that name here, goes on from them.\n"
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
