# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of many ranks: written completely or not at all, read only as they were written.

The format is that of ``torch.distributed.checkpoint`` (DCP), with ``checksums.json`` beside it.
DCP's own reader unpickles ``.metadata`` and every entry that is no tensor, which runs whatever code
a file names, and takes what a damaged one says for true; here nothing is unpickled before its
checksum is right, and then only the classes that DCP's metadata consist of.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from spikenm_fx.errors import CheckpointError, some_of

__all__ = ["CHECKSUMS", "load_distributed", "save_distributed"]

CHECKSUMS = "checksums.json"
METADATA = ".metadata"
VERSION = 1

_MODULES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # their name in Python 3.13
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
}
"""What DCP's metadata are made of; data types of torch besides."""

Group = dist.ProcessGroup | None


def save_distributed(
    state: dict[str, Any], folder: str | Path, *, process_group: Group = None
) -> None:
    """Write what all ranks hold to a folder that is not there yet.

    Every rank calls it.  Files are written into ``.NAME.part`` beside it, and the folder gets its
    name when all of them are there: a run that is killed meanwhile leaves older checkpoints and no
    half one.  Give each checkpoint a folder of its own, and remove old ones afterwards.

    Args:
        state: as ``dcp.save`` takes it, for instance of ``get_state_dict(model, optimizer)``.
        folder: on a disk that all ranks see.
        process_group: of the ranks; None for all.

    Raises:
        CheckpointError: on every rank, if the folder exists or any rank cannot write; what is
            there is as it was.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    ranks = _Ranks(process_group)
    ranks.agree(lambda: _make_room(folder, part) if ranks.first else None)
    writer = FileSystemWriter(part, overwrite=True)
    ranks.agree(lambda: _save(state, writer, process_group))
    sums = ranks.agree(lambda: _checksums(part, _files_of(part, ranks.rank)))
    ranks.agree(lambda: _finish(part, folder, sums) if ranks.first else None)


def load_distributed(
    state: dict[str, Any], folder: str | Path, *, process_group: Group = None
) -> None:
    """Read a checkpoint of any number of ranks into ``state``, in place; all of it or nothing.

    Every rank calls it.  All checksums are compared before anything is read.

    Args:
        state: as ``dcp.load`` takes it: tensors of the sizes that they shall have.
        folder: of :func:`save_distributed`.
        process_group: of the ranks; None for all.

    Raises:
        CheckpointError: on every rank, if the folder is none of :func:`save_distributed`, is
            damaged or incomplete, or does not hold what ``state`` asks for.
    """
    folder = Path(folder)
    ranks = _Ranks(process_group)
    ranks.agree(lambda: _check(folder, ranks))
    ranks.agree(lambda: _load(state, folder, process_group))


class _Ranks:
    """The ranks that save or load together; one alone where torch.distributed is not in use."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)
        self.first = self.rank == 0

    def agree(self, work: Callable[[], Any]) -> list[Any]:
        """Do ``work`` on each rank, and give the results of all; or one error on all of them."""
        result, wrong = None, ""
        try:
            result = work()
        except CheckpointError as error:
            wrong = str(error)
        except OSError as error:
            wrong = f"{error.filename or 'the disk'}: {error.strerror or error}"
        if self.alone:
            told = [(result, wrong)]
        else:
            told = [(None, "")] * self.size
            dist.all_gather_object(told, (result, wrong), group=self.group)
        errors = list(dict.fromkeys(wrong for _, wrong in told if wrong))
        if errors:
            raise CheckpointError("; ".join(errors))
        return [result for result, _ in told]


def _make_room(folder: Path, part: Path) -> None:
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists already; give each checkpoint a folder of its own, and remove old "
            "ones when the new one is complete"
        )
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)


def _save(state: dict[str, Any], writer: FileSystemWriter, group: Group) -> None:
    try:
        with _quiet():
            save(state, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(
            f"{writer.path} could not be written: {_reasons(error)}; older checkpoints are as they "
            "were"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns of one process alone, which is all right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reasons(error: CheckpointException) -> str:
    found = (f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
    return "; ".join(dict.fromkeys(found))


def _files_of(folder: Path, rank: int) -> list[Path]:
    """What a rank has written; the first one the metadata, too."""
    own = sorted(folder.glob(f"__{rank}_*"))
    return [*own, folder / METADATA] if rank == 0 else own


def _checksums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    found = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def _finish(part: Path, folder: Path, sums: list[dict[str, str]]) -> None:
    files = {name: digest for own in sums for name, digest in own.items()}
    with (part / CHECKSUMS).open("w", encoding="utf-8") as file:
        file.write(_text(VERSION, files))
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder)


def _text(version: object, sums: dict[str, str]) -> str:
    return json.dumps({"version": version, "sha256": sums}, separators=(",", ":"))


def _check(folder: Path, ranks: _Ranks) -> None:
    """Compare this rank's share of the checksums, and all names."""
    wanted = _wanted(folder)
    names = sorted(wanted)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: {some_of(missing)} missing; copy it again")
    share = {METADATA, *names[ranks.rank :: ranks.size]}
    try:
        found = _checksums(folder, [folder / name for name in sorted(share)])
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    other = sorted(name for name, digest in found.items() if digest != wanted[name])
    if other:
        raise CheckpointError(
            f"{folder} is not as it was written: {some_of(other)} differ from {CHECKSUMS}; copy it "
            "again, or take an older checkpoint"
        )


def _wanted(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CHECKSUMS}: it is no complete checkpoint of save_distributed.  One "
            "of torch's dcp.save runs code that it names when it is read; where you trust it, read "
            "it by dcp.load"
        )
    try:
        text = path.read_text("utf-8")
        found = json.loads(text)
        sums = {str(name): str(digest) for name, digest in found["sha256"].items()}
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy the checkpoint again") from error
    if version != VERSION:
        raise CheckpointError(f"{path} is of version {version!r}; version {VERSION} is read here")
    odd = text != _text(version, sums)  # something that was read past
    if odd or METADATA not in sums or any(Path(name).name != name for name in sums):
        raise CheckpointError(f"{path} is damaged: it does not name the files of a checkpoint")
    return sums


def _load(state: dict[str, Any], folder: Path, group: Group) -> None:
    reader, planner = _Reader(folder), _Planner()
    try:
        with _quiet():
            load(state, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be loaded: {_reasons(error)}") from error


class _Reader(FileSystemReader):
    """DCP's reader, whose metadata may only be made of their own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is where."""
        path = Path(self.path) / METADATA
        try:
            found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except CheckpointError:
            raise
        except Exception as error:  # arbitrary bytes make unpickling raise nearly anything
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if not isinstance(found, Metadata):
            raise CheckpointError(f"{path} holds a {type(found).__name__}, no metadata")
        for entry in (found.storage_data or {}).values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise CheckpointError(f"{path} names a file outside: {entry.relative_path}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The classes of :data:`_MODULES`."""
        if name in _MODULES.get(module, ()):
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise CheckpointError(
            f"{METADATA} names {module}.{name}, which DCP's metadata do not consist of: loading it "
            "might run foreign code"
        )


class _Planner(DefaultLoadPlanner):
    """DCP's planner, which reads no objects but plain ones."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Numbers, texts and containers."""
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{read_item.dest_index.fqn} is a Python object, which loading would run as code; "
                "only tensors, numbers, texts and their containers are read"
            ) from error
        value.seek(0)
        super().load_bytes(read_item, value)
