"""The store of soft labels: what the encoder says each chunk of a CoT means, written once and read while training.

    <store>/manifest.json          format, made_from, k, dtype, shard_size, num_rows
    <store>/labels-00000.arrow     rows (id, hash, ids, weights) of one shard, Arrow IPC, memory-mapped for reading
    <store>/labels-00000.json      its sidecar {rows, bytes, sha256}, written last: a shard without one does not count

Any number of processes may write different shards, and a killed one loses at most the shard it was writing. Readers
find a row by its id and check its hash, never by position, so labels cannot slip onto another example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from latent_sft.errors import ArtefactError
from latent_sft.method.types import Superposition
from latent_sft.runs import MANIFEST, file_sha256, read_json, write_atomically, write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRow:
    """The latents of one example.

    Attributes:
        id: of the example.
        hash: of its tokens (the `hash` column of the tokenized rows).
        latents: `[N, K]`, one row per latent.
    """

    id: str
    hash: str
    latents: Superposition


class LabelWriter:
    """Writes the shards of a store; opening it again continues where an earlier process stopped.

    Args:
        directory: folder of the store; made if missing.
        made_from: what decides the labels (fingerprints of encoder, tokenizer and spec, rate, ...), flat.
        top_k: entries of a latent.
        dtype: of the weights on disk.
        shard_size: rows a shard.
        num_rows: rows of the whole store, in the order of the data set.

    Raises:
        ArtefactError: the folder holds labels made from something else; nothing is changed.
    """

    def __init__(
        self,
        directory: str | Path,
        made_from: Mapping[str, str | int | float],
        *,
        top_k: int,
        dtype: Literal["float16", "float32"],
        shard_size: int,
        num_rows: int,
    ) -> None:
        self._dir = Path(directory)
        self._k, self._dtype, self._shard_size, self._num_rows = top_k, dtype, shard_size, num_rows
        settings = {"k": top_k, "dtype": dtype, "shard_size": shard_size, "num_rows": num_rows}
        path = self._dir / MANIFEST
        if path.exists():
            found = _read_manifest(self._dir)
            changed = _changes(found["made_from"], made_from) + _changes(found, settings, only_new=True)
            if changed:
                raise ArtefactError(
                    f"{self._dir}: holds labels made from something else ({'; '.join(changed)}). Nothing was "
                    "overwritten. Restore the settings, use another run_dir, or delete that folder."
                )
        else:
            write_json(path, {"format": FORMAT, "made_from": dict(made_from), **settings})

    @property
    def num_shards(self) -> int:
        """Number of shards of the whole store."""
        return _num_shards(self._num_rows, self._shard_size)

    def rows_of(self, shard: int) -> range:
        """Return the row numbers of the data set that belong in a shard."""
        return _rows_of(shard, self._num_rows, self._shard_size)

    def missing_shards(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the unfinished shards that process `rank` of `world_size` has to write."""
        return [s for s in range(rank, self.num_shards, world_size) if self._problem(s)]

    def write(self, shard: int, rows: Sequence[LabelRow]) -> None:
        """Write one shard: data, then its sidecar, each atomically.

        Args:
            shard: number of the shard.
            rows: labels of `rows_of(shard)`, in that order.

        Raises:
            ArtefactError: a full disk (finished shards stay), or latents that are not a superposition.
            ValueError: not the rows of this shard.
        """
        if len(rows) != len(self.rows_of(shard)):
            raise ValueError(f"shard {shard} holds {len(self.rows_of(shard))} rows, got {len(rows)}")
        data = self._encode(rows)
        write_atomically(_shard_path(self._dir, shard), data)
        sidecar = {"rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_json(_sidecar_path(self._dir, shard), sidecar)

    def finish(self) -> None:
        """Check that every shard is there and remove what killed processes left; call once, after the last write.

        Raises:
            ArtefactError: a shard is missing.
        """
        missing = self.missing_shards()
        if missing:
            raise ArtefactError(_incomplete(self._dir, missing, self.num_shards, self._problem(missing[0])))
        for part in self._dir.glob(".*.part"):
            part.unlink(missing_ok=True)

    def _problem(self, shard: int) -> str:
        return _shard_problem(self._dir, shard, len(self.rows_of(shard)))

    def _encode(self, rows: Sequence[LabelRow]) -> bytes:
        for row in rows:
            _check_row(row, self._k)
        sizes = [row.latents.ids.numel() for row in rows]
        # 64-bit offsets: a full-vocabulary store passes 2**31 entries within a shard
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())
        ids = torch.cat([row.latents.ids.reshape(-1).cpu() for row in rows]).to(torch.int32).numpy()
        weights = torch.cat([row.latents.weights.detach().reshape(-1).cpu() for row in rows])
        batch = pa.record_batch(
            {
                "id": pa.array([row.id for row in rows], pa.string()),
                "hash": pa.array([row.hash for row in rows], pa.string()),
                "ids": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
                "weights": pa.LargeListArray.from_arrays(
                    offsets, pa.array(weights.to(getattr(torch, self._dtype)).numpy())
                ),
            }
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()


class _Shard(NamedTuple):
    # views into the memory map; row i is ids[offsets[i]:offsets[i + 1]]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    weights: NDArray[np.floating[Any]]
    hashes: pa.StringArray


class LabelStore:
    """Finished labels, read through a memory map.

    Opening it checks that no shard is missing or damaged. Pickling carries the index only; a worker process maps
    the files again when it first reads, and does not repeat the checks.

    Args:
        directory: folder that a `LabelWriter` filled.
        expect: fields of `made_from` that must be as given; None checks none.

    Raises:
        ArtefactError: missing, incomplete or damaged store, or one made from something else.
    """

    def __init__(self, directory: str | Path, expect: Mapping[str, str | int | float] | None = None) -> None:
        self._dir = Path(directory)
        manifest = _read_manifest(self._dir)
        changed = _changes(manifest["made_from"], expect or {}, only_new=True)
        if changed:
            raise ArtefactError(
                f"{self._dir}: these labels belong to another experiment ({'; '.join(changed)}). Restore the "
                f"settings, or delete that folder and run {_maker(self._dir)} again."
            )
        self.made_from: dict[str, str | int | float] = manifest["made_from"]
        self.top_k: int = manifest["k"]
        num_rows, shard_size = manifest["num_rows"], manifest["shard_size"]
        self._num_shards = _num_shards(num_rows, shard_size)
        problems = {
            s: _shard_problem(self._dir, s, len(_rows_of(s, num_rows, shard_size))) for s in range(self._num_shards)
        }
        missing = [s for s, problem in problems.items() if problem]
        if missing:
            raise ArtefactError(_incomplete(self._dir, missing, self._num_shards, problems[missing[0]]))
        self._shards: dict[int, _Shard] = {}
        self._where: dict[str, tuple[int, int]] = {}
        for shard in range(self._num_shards):
            self._verify(shard)
            for row, name in enumerate(_map_shard(_shard_path(self._dir, shard)).column("id").to_pylist()):
                if name in self._where:
                    raise ArtefactError(
                        f"{self._dir}: id {name!r} occurs twice; ids of the training data must be unique."
                    )
                self._where[name] = (shard, row)

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids, in the order of the data set."""
        return iter(self._where)

    def __contains__(self, id: object) -> bool:
        return id in self._where

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def get(self, id: str, hash: str) -> Superposition:
        """Return the latents of one example.

        Args:
            id: of the example.
            hash: of its tokens now; must be the one the labels were made from.

        Returns:
            Superposition of ids `[N, K]` int64 and weights `[N, K]` float32, each row summing to 1.

        Raises:
            ArtefactError: unknown id, or the example has changed since.
        """
        if id not in self._where:
            raise ArtefactError(
                f"{self._dir}: no labels for the example with id {id!r}. The training data has changed since the "
                f"labels were made; delete that folder and run {_maker(self._dir)} again."
            )
        number, row = self._where[id]
        shard = self._open(number)
        found = shard.hashes[row].as_py()
        if found != hash:
            raise ArtefactError(
                f"{self._dir}: the labels of id {id!r} were made from other tokens (hash {found}, now {hash}). The "
                f"data or the tokenizer has changed; delete that folder and run {_maker(self._dir)} again."
            )
        span = slice(shard.offsets[row], shard.offsets[row + 1])
        ids = torch.from_numpy(shard.ids[span].astype(np.int64)).view(-1, self.top_k)
        weights = torch.from_numpy(shard.weights[span].astype(np.float32)).view(-1, self.top_k)
        return Superposition(ids, weights / weights.sum(-1, keepdim=True))  # float16 rounds the sum away from 1

    def _open(self, number: int) -> _Shard:
        if number not in self._shards:
            batch = _map_shard(_shard_path(self._dir, number))
            ids, weights = batch.column("ids"), batch.column("weights")
            self._shards[number] = _Shard(
                ids.offsets.to_numpy(), ids.values.to_numpy(), weights.values.to_numpy(), batch.column("hash")
            )
        return self._shards[number]

    def _verify(self, shard: int) -> None:
        path = _shard_path(self._dir, shard)
        if file_sha256(path) != read_json(_sidecar_path(self._dir, shard))["sha256"]:
            raise ArtefactError(
                f"{path}: this label shard is damaged (its content is not what was written); "
                f"delete it and run {_maker(self._dir)} again."
            )


def _check_row(row: LabelRow, top_k: int) -> None:
    ids, weights = row.latents
    if ids.ndim != 2 or ids.shape != weights.shape or ids.shape[1] != top_k:
        raise ValueError(
            f"id {row.id!r}: latents of shape {[*ids.shape]}, {[*weights.shape]}, expected [N, {top_k}] twice"
        )
    if not torch.isfinite(weights).all() or (weights < 0).any() or (weights.sum(-1) <= 0).any():
        raise ArtefactError(
            f"id {row.id!r}: the encoder gave weights that are not finite, non-negative and of positive sum; "
            "its training has diverged, train stage 1 again with a lower learning rate."
        )


def _map_shard(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _shard_path(directory: Path, shard: int) -> Path:
    return directory / f"labels-{shard:05d}.arrow"


def _sidecar_path(directory: Path, shard: int) -> Path:
    return directory / f"labels-{shard:05d}.json"


def _num_shards(num_rows: int, shard_size: int) -> int:
    return -(-num_rows // shard_size)


def _rows_of(shard: int, num_rows: int, shard_size: int) -> range:
    return range(shard * shard_size, min((shard + 1) * shard_size, num_rows))


def _shard_problem(directory: Path, shard: int, num_rows: int) -> str:
    """Return what is wrong with a shard at first sight, or nothing; contents are checked by `LabelStore`."""
    data, sidecar = _shard_path(directory, shard), _sidecar_path(directory, shard)
    if not data.exists() or not sidecar.exists():
        return f"{(sidecar if data.exists() else data).name} is missing"
    try:
        found = read_json(sidecar)
        if found["rows"] != num_rows or data.stat().st_size != found["bytes"] or len(found["sha256"]) != 64:
            return f"{data.name} is not of the size its sidecar says"
    except (ArtefactError, KeyError, TypeError):
        return f"{sidecar.name} is damaged"
    return ""


def _incomplete(directory: Path, missing: list[int], num_shards: int, first: str) -> str:
    return (
        f"{directory}: the labels are incomplete, {len(missing)} of {num_shards} shards are not finished ({first}); "
        f"run {_maker(directory)} again, it writes only those."
    )


def _maker(directory: Path) -> str:
    # <run>/labels/store or <run>/<stage>-latents/store
    stage, _, kind = directory.parent.name.rpartition("-")
    return f"latent-sft train {stage}" if kind == "latents" else "latent-sft label"


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.exists():
        raise ArtefactError(f"{directory}: no labels here; run {_maker(directory)} first.")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtefactError(
            f"{path}: not a label store of format {FORMAT}; delete {directory} and run {_maker(directory)} again."
        )
    absent = {"made_from", "k", "dtype", "shard_size", "num_rows"} - found.keys()
    if absent:
        raise ArtefactError(f"{path}: lacks {sorted(absent)}; delete {directory} and run {_maker(directory)} again.")
    return found


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], *, only_new: bool = False) -> list[str]:
    keys = sorted(new if only_new else old.keys() | new.keys())
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
