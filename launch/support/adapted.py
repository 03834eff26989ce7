"""adapter.json in the work directory of a run that trains adapters: which base they belong to.

Checkpoints of such a run hold what is trained. The base is read again from its own folder, and refused if its
weights are not those that the run began with.
"""

import dataclasses
import os
from typing import NamedTuple

import jax

from launch.support import places
from molmo2_jax import files
from molmo2_jax import finetune
from molmo2_jax.hf import processor

NAME = "adapter.json"  # in a work directory


class Note(NamedTuple):
    """The base's folder (a work directory or a Hugging Face folder), the fingerprint of its parameters, and
    the adapters' settings."""
    base: str
    fingerprint: str
    lora: finetune.LoraConfig


def read(folder: str | os.PathLike) -> Note | None:
    """Returns the note of a work directory; None if its checkpoints hold whole models.

    Raises:
      ValueError: the file is damaged.
    """
    path = files.path(folder) / NAME
    if not path.is_file():
        return None
    values = processor.read_json(path)
    try:
        lora = values["lora"] | {"full": tuple(values["lora"]["full"])}
        return Note(values["base"], values["fingerprint"], finetune.LoraConfig(**lora))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{NAME} must hold base, fingerprint and lora; {path}: {error!r}") from error


def write(folder: str | os.PathLike, note: Note) -> None:
    """Writes the note of a work directory."""
    target = files.path(folder)
    target.mkdir(parents=True, exist_ok=True)
    processor.write_json(target / NAME, note._asdict() | {"lora": dataclasses.asdict(note.lora)})


def whole(path: str | os.PathLike) -> str:
    """Returns the path of a base as it is noted: independent of the current folder."""
    path = places.model(os.fspath(path))
    return path if files.is_remote(path) else os.path.abspath(path)


def check(folder: str | os.PathLike, note: Note, found: str) -> None:
    """Checks that the fingerprint of a base is the one that a work directory's adapters belong to.

    Raises:
      ValueError: it is not.
    """
    if found != note.fingerprint:
        raise ValueError(f"the adapters in {folder} belong to the base with the fingerprint "
                         f"{note.fingerprint}, which was in {note.base}; the weights there, or of "
                         f"--init_from, have {found}")


def begin(workdir, start: str | None, lora: finetune.LoraConfig) -> str:
    """Returns the folder of a run's base: `start`, or the one that the run began with.

    Raises:
      ValueError: there is neither, or the run began with adapters of other settings. Dropout may change.
    """
    note = read(workdir)
    if note is None:
        if not start:
            raise ValueError("a run that trains adapters (train.TrainConfig.lora) needs --init_from, the "
                             "work directory or Hugging Face folder of its base; got none")
        return whole(start)
    before = dataclasses.replace(note.lora, dropout=lora.dropout)
    if before != lora:
        raise ValueError(f"a run must resume with the adapters that it began with, {before}; got {lora} "
                         "(another --workdir starts anew)")
    return whole(start) if start else note.base


def keep(workdir, base: str, lora: finetune.LoraConfig, fingerprint: str) -> None:
    """Notes the base when a run begins, and checks it when it resumes.

    Raises:
      ValueError: the base is not the one that the run began with.
    """
    note = read(workdir)
    if note is not None:
        check(workdir, note, fingerprint)
    elif jax.process_index() == 0:
        write(workdir, Note(base, fingerprint, lora))
