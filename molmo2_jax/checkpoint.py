"""Train state and data position, saved and restored together with Orbax.

A work directory holds `checkpoints/<step>/{state,data,sums}`: `state` through TensorStore, `data` the
position of the loader, one file per process with a checksum next to it, and `sums` a checksum of every array:
without it, storage returns corrupted bytes silently. A step is complete only if all three exist.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from molmo2_jax import files
from molmo2_jax import finetune
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax.model import molmo2

ITEMS = ("state", "data", "sums")   # a step without one of them is incomplete
PART_BYTES = 1 << 30                # of parameters that are restored at a time, where they are cast


class _DataHandler(grain.checkpoint.CheckpointHandler):
    """Saves one iterator per process, and also restores what a different number of processes saved.

    For that, iterators need `set_states`, which takes the states of all processes.
    """

    def save(self, directory, item=None, args=None):
        super().save(directory, item, args)
        own = directory / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        own.with_suffix(".crc32").write_text(_crc(own))

    def restore(self, directory, item=None, args=None):
        item = item or args.item
        own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        if (directory / own).exists() or not hasattr(item, "set_states"):
            return super().restore(directory, item, args)
        paths = sorted(directory.glob("process_*-of-*.json"))
        item.set_states([json.loads(path.read_text()) for path in paths])
        return item


@ocp.args.register_with_handler(_DataHandler, for_save=True)
@dataclasses.dataclass
class _DataSave(grain.checkpoint.CheckpointSave):
    pass


@ocp.args.register_with_handler(_DataHandler, for_restore=True)
@dataclasses.dataclass
class _DataRestore(grain.checkpoint.CheckpointRestore):
    pass


class _Write:
    """A future of Orbax that notes an error in `failures` as soon as it occurs.

    Orbax itself reports it only after a barrier of all processes, which can take minutes.
    """

    def __init__(self, future, failures: list[BaseException]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None):
        try:
            return self._future.result(timeout)
        except BaseException as error:
            self._failures.append(error)
            raise

    def cancel(self):
        return self._future.cancel()


def _state_handler(failures: list[BaseException]) -> ocp.PyTreeCheckpointHandler:
    """Returns a handler whose background writes note their errors in `failures`."""
    handler = ocp.PyTreeCheckpointHandler()
    save = handler.async_save

    async def async_save(*args, **kwargs):
        return [_Write(one, failures) for one in await save(*args, **kwargs) or ()]

    handler.async_save = async_save  # a subclass would be another type in the checkpoint's metadata
    return handler


def _crc(path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def _damage_of_data(directory) -> str:
    """Returns what is wrong with the data positions of a step, "" if nothing is."""
    found = {path.name: path for path in directory.glob("process_*-of-*.json")}
    counts = {name.removesuffix(".json").rpartition("-of-")[2] for name in found}
    wanted = {f"process_{index}-of-{count}.json" for count in counts for index in range(int(count))}
    if len(counts) != 1 or wanted != set(found):
        return f"its data positions {sorted(found)} are not those of all processes"
    for name, path in found.items():
        sum_file = path.with_suffix(".crc32")
        if sum_file.exists() and sum_file.read_text() != _crc(path):
            return f"the data position in {name} is not the one that was saved"
    return ""


class Manager:
    """Saves and restores TrainState and a grain iterator under `<workdir>/checkpoints`."""

    def __init__(self, workdir: str, keep: int = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = files.path(workdir) / "checkpoints"
        self._failures: list[BaseException] = []   # of background writes of this process
        handlers = {"state": _state_handler(self._failures), "data": _DataHandler(),
                    "sums": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def steps(self, items: tuple[str, ...] = ITEMS) -> list[int]:
        """Returns the steps that have all `items`, oldest first; others are logged and skipped."""
        complete = []
        for step in sorted(self._manager.all_steps()):
            missing = _missing(self._folder, step, items)
            if missing:
                logging.warning("checkpoint %d is incomplete, skipping it: no %s", step, missing)
            else:
                complete.append(step)
        return complete

    def save(self, step: int, train_state: state_lib.TrainState, batches) -> None:
        """Saves in the background; the last batch taken from `batches` must be that of update `step`.

        Raises:
          ValueError: the step exists already.
        """
        self._write(step, _storable(train_state), {"data": _DataSave(batches)})

    def save_params(self, params, step: int = 0) -> None:
        """Saves parameters alone: for answering or to start a run, not to resume one. A step that exists
        is left as it is."""
        if step not in self.steps(("state",)):
            self._write(step, {"params": params}, {})

    def _write(self, step, tree, items):
        self._manager.save(step, force=True, args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), sums=ocp.args.JsonSave(_checksums(tree)), **items))

    def restore(self, abstract: state_lib.TrainState, batches=None):
        """Returns the newest complete TrainState, or None; moves `batches` to its position.

        Newer steps that cannot be read are renamed to `<step>.damaged`, because the run will save them again.

        Raises:
          ValueError: shapes or dtypes differ from `abstract` (the message names every such path), the data
            position belongs to other data, or steps exist and none can be read.
        """
        target = _storable_shapes(abstract)
        steps = self.steps()
        for step in reversed(steps):
            damage = _damage_of_data(self._folder / str(step) / "data")
            if damage:
                logging.error("checkpoint %d cannot be read, trying the one before: %s", step, damage)
                continue
            tree = self._read(step, target)
            if tree is not None:
                self._manager.restore(step, args=ocp.args.Composite(
                    data=_DataRestore(batches)))
                logging.info("restored step %d from %s", step, self._folder)
                self._set_aside_after(step)
                return _from_storable(tree)
        damaged = [step for step in sorted(self._manager.all_steps()) if step]
        if steps or damaged:
            raise ValueError("a run can resume only from a checkpoint that can be read; got none among "
                             f"{damaged or steps} in {self._folder} (move that folder away to start over)")
        return None

    def _set_aside_after(self, step):
        for damaged in [one for one in self._manager.all_steps() if one > step]:
            aside = self._folder / f"{damaged}.damaged"
            if jax.process_index() == 0:
                if aside.exists():
                    aside.rmtree()
                (self._folder / str(damaged)).rename(aside)
            logging.error("renamed a damaged checkpoint to %s", aside)
        multihost_utils.sync_global_devices("damaged checkpoints renamed")
        self._manager.reload()

    def restore_params(self, params, kept: Callable[[str, jax.Array], Any] | None = None):
        """Returns the newest parameters, with the shapes and shardings of the abstract tree `params`.

        Args:
          kept: (path of a parameter, its array) -> what is returned in its place, such as a cast. Then
            PART_BYTES are restored at a time, so that the parameters never exist whole as they were saved.

        Raises:
          ValueError: there are none, or their shapes or dtypes differ.
        """
        for step in reversed(self.steps(("state",))):
            found = self._read_parts(step, params, kept)
            if found is not None:
                return found
        raise ValueError(f"a work directory must hold a checkpoint to load; got none in {self._folder}")

    def _read_parts(self, step, params, kept):
        """Returns the parameters of a step, or what `kept` makes of them; None if its files are damaged."""
        if kept is None:
            tree = self._read(step, {"params": params})
            return None if tree is None else tree["params"]
        if not self._fits(step, {"params": params}):
            return None
        flat = traverse_util.flatten_dict(params, sep="/")
        for paths in _parts(flat):
            target = {"params": traverse_util.unflatten_dict({path: flat[path] for path in paths}, sep="/")}
            tree = self._read(step, target)
            if tree is None:
                return None
            for path, value in traverse_util.flatten_dict(tree["params"], sep="/").items():
                flat[path] = kept(path, value)
        return traverse_util.unflatten_dict(flat, sep="/")

    def _fits(self, step, target) -> bool:
        """Returns whether the description of a step can be read.

        Raises:
          ValueError: shapes or dtypes in it differ from `target`.
        """
        try:
            saved = _describe(self._manager.item_metadata(step)["state"].tree)
        except Exception as error:  # Orbax passes on all errors of its readers
            logging.error("checkpoint %d cannot be read, trying the one before: %s", step, error)
            return False
        wanted = _describe(target)
        wrong = [f"{path}: saved {saved.get(path, 'nothing')}, wanted {what}"
                 for path, what in wanted.items() if saved.get(path) != what]
        if wrong:
            raise ValueError(f"checkpoint {step} must fit this run; got {len(wrong)} differences:\n  "
                             + "\n  ".join(wrong[:40]))
        return True

    def _read(self, step, target):
        """Returns the part `target` of a step's state, or None if its files are damaged.

        Raises:
          ValueError: shapes or dtypes differ from `target`.
        """
        if not self._fits(step, target):
            return None
        has_sums = files.has_content(self._folder / str(step) / "sums")
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    target, restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True),
                **({"sums": ocp.args.JsonRestore()} if has_sums else {})))
        except Exception as error:
            logging.error("checkpoint %d cannot be read, trying the one before: %s", step, error)
            return None
        if has_sums:
            changed = [path for path, value in _checksums(restored["state"]).items()
                       if restored["sums"].get(path) != value]
            if changed:
                logging.error("checkpoint %d cannot be read, trying the one before: values differ from those "
                              "that were saved in %s", step, ", ".join(changed[:10]))
                return None
        return restored["state"]

    def check(self) -> None:
        """Raises the error of a background save that has failed; never waits for one that is running."""
        if self._failures:
            raise self._failures[0]
        if not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()

    def wait(self) -> None:
        """Waits for the last save to finish and raises its error, if any."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save to finish, unless it failed here and other processes still write."""
        if not (self._failures and jax.process_count() > 1):
            self._manager.close()


def explain(workdir: str, error: BaseException) -> files.StorageError | None:
    """Returns the disk fault that ended a run as one sentence: cause, what is kept, how to resume.

    None if `error` is not a disk fault.
    """
    cause = files.storage_cause(error)
    if not cause:
        return None
    free = files.free_space(workdir)
    steps = saved_steps(workdir)
    kept, resumed = (f"the checkpoint of step {steps[-1]}", f"resumes after step {steps[-1]}") if steps else (
        "no checkpoint yet", "starts from the beginning")
    return files.StorageError(
        f"the run could not write to {workdir}: {cause}" + (f" ({free})" if free else "")
        + f"; kept: {kept}. Once the disk can be written again, the same command {resumed}; while a "
        "checkpoint is saved, the previous one still takes up space")


def saved_steps(workdir: str) -> list[int]:
    """Returns the steps of a work directory with complete checkpoints, oldest first; needs no Manager."""
    folder = files.path(workdir) / "checkpoints"
    try:
        numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        return [step for step in numbers if not _missing(folder, step, ITEMS)]
    except OSError:
        return []


def _missing(folder, step: int, items: tuple[str, ...]) -> list[str]:
    """Returns the items that a step in the folder of checkpoints lacks."""
    return [item for item in items if not files.has_content(folder / str(step) / item)]


def save_params(workdir: str, params, step: int = 0) -> None:
    """Writes parameters alone into a work directory; its earlier steps are removed then."""
    manager = Manager(workdir)
    try:
        manager.save_params(params, step)
    finally:
        manager.close()


def _parts(flat) -> list[list[str]]:
    """Returns the paths of arrays in groups of at most PART_BYTES, or of one array."""
    groups: list[list[str]] = []
    room = 0
    for path, leaf in flat.items():
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = PART_BYTES
        groups[-1].append(path)
        room -= size
    return groups


def load_params(workdir: str, model: molmo2.Molmo2, mesh=None,
                kept: Callable[[str, jax.Array], Any] | None = None, lora: finetune.LoraConfig | None = None):
    """Returns the newest parameters that a work directory holds, without optimiser state.

    Args:
      kept: as in `Manager.restore_params`.
      lora: of the run, if it trained adapters: only what it trained is in its checkpoints.

    Raises:
      ValueError: there are none, or they do not have the model's shapes.
    """
    if not (files.path(workdir) / "checkpoints").is_dir():
        raise ValueError(f"a work directory must hold a checkpoint to load; got none in {workdir}")
    manager = Manager(workdir)
    try:
        mesh = mesh or sharding.make_mesh(sharding.MeshConfig())
        return manager.restore_params(state_lib.abstract_params(model, mesh, lora), kept)
    finally:
        manager.close()


def _named(tree) -> dict:
    """Returns path -> array, independent of the types of the containers."""
    def name(key):
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    return {"/".join(map(name, path)): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if hasattr(leaf, "shape")}


def _describe(tree) -> dict[str, tuple]:
    """Returns path -> (shape, dtype) of every array."""
    return {path: (tuple(leaf.shape), str(jnp.dtype(leaf.dtype))) for path, leaf in _named(tree).items()}


@jax.jit
def _sums(tree):
    """Returns the sum of each array's 32-bit words modulo 2^32: the same on every mesh."""
    def words(x):
        return jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else x.astype(jnp.uint32)
    return jax.tree.map(lambda x: words(x).sum(dtype=jnp.uint32), tree)


def _checksums(tree) -> dict[str, int]:
    return {path: int(value) for path, value in _sums(_named(tree)).items()}


def _storable(train_state):
    """Returns a plain tree; a typed key becomes its bits."""
    return train_state._replace(rng=jax.random.key_data(train_state.rng))._asdict()


def _storable_shapes(abstract):
    bits = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), abstract.rng.dtype))
    bits = jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=abstract.rng.sharding)
    return abstract._replace(rng=bits)._asdict()


def _from_storable(tree):
    return state_lib.TrainState(tree["step"], tree["params"], tree["opt_state"],
                                jax.random.wrap_key_data(jnp.asarray(tree["rng"])))
