"""Train state and data position, saved together and taken back together, on Orbax.

A work directory holds `checkpoints/<step>/{state,data,sums}`: `state` through TensorStore, `data` the
position of the loader, one file per process with a checksum beside it, `sums` a checksum of every array:
storage alone hands out a changed byte without a word. A step counts only when all three are there.
"""

import dataclasses
import json
import zlib

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from molmo2_jax import files
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax.model import molmo2

ITEMS = ("state", "data", "sums")   # a step that lacks one is incomplete


class _DataHandler(grain.checkpoint.CheckpointHandler):
    """Saves an iterator per process, and restores those that another number of processes saved.

    For the latter, iterators have `set_states`, which takes the states of all processes.
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


def _crc(path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def _damage_of_data(directory) -> str:
    """Returns what is wrong with the positions of all processes in a step, "" if nothing is."""
    found = {path.name: path for path in directory.glob("process_*-of-*.json")}
    counts = {name.removesuffix(".json").rpartition("-of-")[2] for name in found}
    wanted = {f"process_{index}-of-{count}.json" for count in counts for index in range(int(count))}
    if len(counts) != 1 or wanted != set(found):
        return f"there are data positions {sorted(found)}, not those of all processes"
    for name, path in found.items():
        sum_file = path.with_suffix(".crc32")
        if sum_file.exists() and sum_file.read_text() != _crc(path):
            return f"it holds another data position than was saved in {name}"
    return ""


class Manager:
    """Saves and restores TrainState and a grain iterator under `<workdir>/checkpoints`."""

    def __init__(self, workdir: str, keep: int = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = files.path(workdir) / "checkpoints"
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": _DataHandler(),
                    "sums": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def steps(self, items: tuple[str, ...] = ITEMS) -> list[int]:
        """Returns the steps that hold all `items`, oldest first; others are reported and passed over."""
        complete = []
        for step in sorted(self._manager.all_steps()):
            missing = _missing(self._folder, step, items)
            if missing:
                logging.warning("checkpoint %d is incomplete, passing it over: no %s", step, missing)
            else:
                complete.append(step)
        return complete

    def save(self, step: int, train_state: state_lib.TrainState, batches) -> None:
        """Saves in the background; `batches` must stand right behind the batch of update `step`.

        Raises:
          ValueError: the step exists already.
        """
        self._write(step, _storable(train_state), {"data": _DataSave(batches)})

    def save_params(self, params) -> None:
        """Saves parameters alone, as step 0: to answer with or to start a run from, not to continue one."""
        self._write(0, {"params": params}, {})

    def _write(self, step, tree, items):
        self._manager.save(step, force=True, args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), sums=ocp.args.JsonSave(_checksums(tree)), **items))

    def restore(self, abstract: state_lib.TrainState, batches=None):
        """Returns the newest complete TrainState, or None; moves `batches` to its position.

        Newer steps that cannot be used are set aside as `<step>.damaged`: the run comes by them again.

        Raises:
          ValueError: shapes or dtypes differ from `abstract` (every path that does is named), the data
            position belongs to other data, or there are steps and none can be read.
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
            raise ValueError("a run can only go on from a checkpoint that can be read; got none among "
                             f"{damaged or steps} in {self._folder} (move that folder away to start anew)")
        return None

    def _set_aside_after(self, step):
        for damaged in [one for one in self._manager.all_steps() if one > step]:
            aside = self._folder / f"{damaged}.damaged"
            if jax.process_index() == 0:
                if aside.exists():
                    aside.rmtree()
                (self._folder / str(damaged)).rename(aside)
            logging.error("set aside %s", aside)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()

    def restore_params(self, params):
        """Returns the newest parameters, with the shapes and shardings of the abstract tree `params`.

        Raises:
          ValueError: there are none, or they do not fit.
        """
        for step in reversed(self.steps(("state",))):
            tree = self._read(step, {"params": params})
            if tree is not None:
                return tree["params"]
        raise ValueError(f"a work directory must hold a checkpoint to load; got none in {self._folder}")

    def _read(self, step, target):
        """Returns the part `target` of a step's state, or None if its files are damaged."""
        try:
            saved = _describe(self._manager.item_metadata(step)["state"].tree)
        except Exception as error:  # Orbax raises whatever its readers meet
            logging.error("checkpoint %d cannot be read, trying the one before: %s", step, error)
            return None
        wanted = _describe(target)
        wrong = [f"{path}: saved {saved.get(path, 'nothing')}, wanted {what}"
                 for path, what in wanted.items() if saved.get(path) != what]
        if wrong:
            raise ValueError(f"checkpoint {step} must fit this run; got {len(wrong)} differences:\n  "
                             + "\n  ".join(wrong[:40]))
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
                logging.error("checkpoint %d cannot be read, trying the one before: it holds other values "
                              "than were saved in %s", step, ", ".join(changed[:10]))
                return None
        return restored["state"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def explain(workdir: str, error: BaseException) -> files.StorageError | None:
    """Returns a fault of the disk that ended a run, in a sentence: its cause, what is kept, how to resume.

    None if `error` is of another kind.
    """
    cause = files.storage_cause(error)
    if not cause:
        return None
    free = files.free_space(workdir)
    steps = _complete_steps(files.path(workdir) / "checkpoints")
    kept, resumed = (f"the checkpoint of step {steps[-1]}", f"resumes after step {steps[-1]}") if steps else (
        "no checkpoint yet", "starts from the beginning")
    return files.StorageError(
        f"the run could not write to {workdir}: {cause}" + (f" ({free})" if free else "")
        + f"; kept: {kept}. Once the disk can be written again, the same command {resumed}; while a "
        "checkpoint is saved, the one before it needs its room too")


def _complete_steps(folder) -> list[int]:
    """Returns the steps on disk that hold all items, oldest first; needs no Manager."""
    try:
        numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        return [step for step in numbers if not _missing(folder, step, ITEMS)]
    except OSError:
        return []


def _missing(folder, step: int, items: tuple[str, ...]) -> list[str]:
    """Returns which items a step in the folder of checkpoints lacks."""
    return [item for item in items if not files.has_content(folder / str(step) / item)]


def save_params(workdir: str, params) -> None:
    """Writes parameters alone into a work directory."""
    manager = Manager(workdir)
    try:
        manager.save_params(params)
    finally:
        manager.close()


def load_params(workdir: str, model: molmo2.Molmo2, mesh=None):
    """Returns the newest parameters of a work directory, without optimiser state.

    Raises:
      ValueError: there are none, or they do not have the model's shapes.
    """
    if not (files.path(workdir) / "checkpoints").is_dir():
        raise ValueError(f"a work directory must hold a checkpoint to load; got none in {workdir}")
    manager = Manager(workdir)
    try:
        return manager.restore_params(
            state_lib.abstract_params(model, mesh or sharding.make_mesh(sharding.MeshConfig())))
    finally:
        manager.close()


def _named(tree) -> dict:
    """Returns path -> array; the containers' kinds do not matter."""
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
