"""Train state and data position, saved together and taken back together, on Orbax.

A work directory holds `checkpoints/<step>/{state,data}`: `state` through TensorStore, `data` the position
of the loader, one file per process. A step counts only when both items are complete.
"""

import os

from absl import logging
import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from molmo2_jax import state as state_lib


class Manager:
    """Saves and restores TrainState and a grain iterator under `<workdir>/checkpoints`."""

    def __init__(self, workdir: str, keep: int = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = os.path.join(os.path.abspath(workdir), "checkpoints")
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps whose items are all there, oldest first; others are reported and passed over."""
        complete = []
        for step in sorted(self._manager.all_steps()):
            missing = [item for item in ("state", "data")
                       if not os.listdir_safe(os.path.join(self._folder, str(step), item))]
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
        saved = self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(_storable(train_state)), data=grain.checkpoint.CheckpointSave(batches)))
        if not saved:
            raise ValueError(f"checkpoint step {step} was not written: a step must be newer than all saved "
                             f"ones; got saved steps {sorted(self._manager.all_steps())}")

    def restore(self, abstract: state_lib.TrainState, batches=None):
        """Returns the newest complete TrainState, or None; moves `batches` to its position.

        Raises:
          ValueError: shapes or dtypes differ from `abstract`; every differing path is named.
        """
        for step in reversed(self.steps()):
            target = _storable_shapes(abstract)
            self._check(step, target)
            args = {"state": ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))}
            if batches is not None:
                args["data"] = grain.checkpoint.CheckpointRestore(batches)
            try:
                items = self._manager.restore(step, args=ocp.args.Composite(**args))
            except Exception as error:  # Orbax raises a bare Exception for damaged files
                logging.error("checkpoint %d cannot be read, trying the one before: %s", step, error)
                continue
            logging.info("restored step %d from %s", step, self._folder)
            return _from_storable(items["state"])
        return None

    def _check(self, step, target):
        saved = self._manager.item_metadata(step)["state"]
        saved = saved.tree if hasattr(saved, "tree") else saved
        describe = lambda tree: {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype))
                                 for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
        have, want = describe(saved), describe(ocp.utils.serialize_tree(target, keep_empty_nodes=False))
        wrong = [f"{path}: saved {have.get(path, 'nothing')}, wanted {want.get(path, 'nothing')}"
                 for path in sorted(have.keys() | want.keys()) if have.get(path) != want.get(path)]
        if wrong:
            raise ValueError(f"checkpoint {step} does not fit this run in {len(wrong)} places; got\n  "
                             + "\n  ".join(wrong[:40]))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


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
