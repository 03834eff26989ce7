"""A saved state is restored bit for bit, on any mesh; damaged checkpoints are reported and skipped."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile

import jax
import numpy as np
import pytest

from molmo2_jax import checkpoint
from molmo2_jax import optim
from molmo2_jax import state as state_lib
from molmo2_jax.model import molmo2
from tests import tiny

MODEL = molmo2.Molmo2(tiny.MODEL)
TX = optim.make(optim.OptimConfig(), 10)


def bits(state):
    return jax.tree.map(np.asarray, state._replace(rng=jax.random.key_data(state.rng)))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.cache
def abstract(model, tx, mesh=None):
    """Returns state_lib.abstract, on one device by default; cached, because tracing takes a second."""
    return state_lib.abstract(model, tx, mesh or tiny.mesh())


def random_state(step, model=MODEL, mesh=None):
    """Returns a state of random values, drawn with numpy to avoid compilation."""
    rng = np.random.default_rng(step)
    def draw(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.fold_in(jax.random.key(7), step), leaf.sharding)
        values = rng.normal(size=leaf.shape) * 1e3 if leaf.dtype == np.float32 else np.full(leaf.shape, step)
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract(model, TX, mesh))


@pytest.fixture
def manager(tmp_path):
    """Returns a function that opens managers of the folder; they are closed when the test ends."""
    made = []

    def make(keep=3):
        made.append(checkpoint.Manager(str(tmp_path), keep))
        return made[-1]
    yield make
    for one in made:
        one.close()


def batches_at(number):
    batches = tiny.Batches()
    batches.set_state({"next": number})
    return batches


def save(manager, *steps):
    for step in steps:
        manager.save(step, random_state(step), batches_at(10 * step))
    manager.wait()


def assert_restores(manager, step, mesh=None):
    wanted, batches = abstract(MODEL, TX, mesh), tiny.Batches()
    restored = manager.restore(wanted, batches)
    assert_equal(bits(restored), bits(random_state(step)))
    assert batches.get_state() == {"next": 10 * step}
    for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == like.dtype and leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    return restored


@pytest.fixture
def small_disk():
    """Mounts disks of a given size, where that is permitted."""
    mounted = []

    def mount(kilobytes):
        folder = tempfile.mkdtemp()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder],
                              capture_output=True, check=False, timeout=60)
        if done.returncode:
            os.rmdir(folder)
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return pathlib.Path(folder)
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True, timeout=60)
        os.rmdir(folder)


def resize(disk, kilobytes):
    subprocess.run(["mount", "-o", f"remount,size={int(kilobytes)}k", str(disk)], check=True, timeout=60)


# Kilobytes; the metadata of a checkpoint, whose size varies, takes more than 130.
@pytest.mark.parametrize(("has_saved", "room"), [(False, 128), (True, 8), (True, 64), (True, 128)])
def test_a_full_disk_is_reported_in_one_sentence_that_says_what_is_kept(small_disk, has_saved, room):
    disk = small_disk(4096)
    if has_saved:
        first = checkpoint.Manager(str(disk), 3)
        save(first, 1)
        first.close()   # waits for pending deletions
    resize(disk, shutil.disk_usage(disk).used / 1024 + room)
    full = checkpoint.Manager(str(disk), 3)
    with pytest.raises(Exception) as caught:
        save(full, 2 if has_saved else 1, 3)
    with contextlib.suppress(Exception):
        full.close()
    told = str(checkpoint.explain(str(disk), caught.value))
    kept = "the checkpoint of step 1" if has_saved else "no checkpoint yet"
    assert f"could not write to {disk}: No space left on device (" in told and "\n" not in told
    assert f"kept: {kept}. Once" in told
    if has_saved:
        resize(disk, 4096)
        again = checkpoint.Manager(str(disk), 3)
        assert_restores(again, 1)
        save(again, 2)
        again.close()


@pytest.mark.parametrize("keep", [1, 3])
def test_a_failed_background_save_is_noticed_without_another_save_and_the_last_one_is_kept(
        manager, monkeypatch, keep):
    first = manager(keep)
    save(first, 1)
    first.check()   # the save succeeded
    monkeypatch.setattr(checkpoint._Write, "result", no_space)
    failing = manager(keep)
    failing.save(2, random_state(2), batches_at(20))
    with pytest.raises(OSError, match="No space left"):
        while True:
            failing.check()
    with contextlib.suppress(OSError):
        failing.close()
    monkeypatch.undo()
    assert_restores(manager(keep), 1)


def no_space(self, timeout=None):
    self._future.result(timeout)
    self._failures.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    raise self._failures[0]


def test_the_error_of_a_background_write_is_noted_before_anything_is_waited_for(manager, monkeypatch):
    """Orbax itself reports it after a barrier of all processes."""
    one = manager()
    failing = concurrent.futures.Future()
    failing.set_exception(OSError(errno.EROFS, os.strerror(errno.EROFS)))
    with pytest.raises(OSError, match="Read-only"):
        checkpoint._Write(failing, one._failures).result()
    monkeypatch.setattr(one._manager, "is_saving_in_progress", lambda: True)
    with pytest.raises(OSError, match="Read-only"):
        one.check()


def test_other_errors_are_not_blamed_on_the_disk(tmp_path):
    assert checkpoint.explain(str(tmp_path), ValueError("shapes differ")) is None


@pytest.mark.slow(6)
def test_moments_move_between_the_devices_and_the_hosts_memory(manager):
    saved, there = random_state(1), abstract(MODEL, optim.offloaded(TX))
    one = manager()
    one.save(1, saved, batches_at(10))
    one.wait()
    moved = one.restore(there, tiny.Batches())
    assert_equal(bits(moved), bits(saved))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(moved.opt_state) if x.ndim} == {"pinned_host"}
    one.save(2, moved._replace(step=saved.step + 1), batches_at(20))
    one.wait()
    back = one.restore(abstract(MODEL, TX), tiny.Batches())
    assert int(back.step) == 2
    assert_equal(back.opt_state, saved.opt_state)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(back.opt_state)} == {"device"}


def test_a_state_is_restored_bit_for_bit_with_its_data_position(manager):
    save(manager(), 1, 2)
    restored = assert_restores(manager(), 2)
    assert (jax.random.bits(restored.rng, (4,)) == jax.random.bits(random_state(2).rng, (4,))).all()


def test_a_state_may_be_restored_on_another_mesh(manager):
    one = manager()
    one.save(1, random_state(1, mesh=tiny.mesh(fsdp=2)), batches_at(10))
    one.wait()
    restored = assert_restores(manager(), 1, tiny.mesh(data=2, fsdp=2, tensor=2))
    assert len(restored.params["head"].sharding.device_set) == 8


class SharedBatches(tiny.Batches):
    """Batches that resume at the largest position of several processes."""

    def set_states(self, states):
        self.set_state({"next": max(state["next"] for state in states)})


def test_data_positions_of_another_number_of_processes_are_passed_on_together(manager, tmp_path):
    save(manager(), 1)
    folder = tmp_path / "checkpoints/1/data"
    (folder / "process_0-of-1.json").rename(folder / "process_0-of-2.json")
    (folder / "process_0-of-1.crc32").rename(folder / "process_0-of-2.crc32")
    (folder / "process_1-of-2.json").write_text('{"next": 30}')
    batches = SharedBatches()
    manager().restore(abstract(MODEL, TX), batches)
    assert batches.get_state() == {"next": 30}


def test_only_the_newest_are_kept(manager):
    one = manager(keep=2)
    save(one, 1, 2, 3)
    assert one.steps() == [2, 3]


def test_an_empty_folder_has_nothing_to_restore(manager):
    assert manager().restore(abstract(MODEL, TX), tiny.Batches()) is None


def test_a_state_of_another_model_is_refused_with_every_path_that_differs(manager):
    save(manager(), 1)
    text = dataclasses.replace(tiny.MODEL.text, mlp_width=20)
    other = molmo2.Molmo2(dataclasses.replace(tiny.MODEL, text=text))
    with pytest.raises(ValueError, match="checkpoint 1 must fit") as raised:
        manager().restore(abstract(other, TX), tiny.Batches())
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == 3 * 3  # three kernels, each with two moments
    assert sum("params/text/layers/mlp/down/kernel: saved ((2, 16, 12), 'float32'), wanted ((2, 20, 12)"
               in line for line in lines) == 1


def damage(folder: pathlib.Path):
    """Truncates every file of more than 200 bytes to half."""
    large = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 200]
    assert large
    for path in large:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def forget(folder):
    shutil.rmtree(folder)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def flip(folder):
    """Changes one byte in the middle of every file of array data, as storage may not read all of them."""
    large = [path for path in folder.rglob("ocdbt.process_*/d/*") if path.stat().st_size > 1000]
    assert large
    for path in large:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)


def cut(folder):
    """Removes the last byte of every file but the commit mark, as storage may not read all of them."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            path.write_bytes(path.read_bytes()[:-1])


def lose(folder):
    """Removes the data position of one process."""
    next(folder.glob("process_*.json")).unlink()


def turn(folder):
    """Changes a digit of a data position, which stays readable."""
    path = next(folder.glob("process_*.json"))
    path.write_text(path.read_text().replace("2", "3"))


@pytest.mark.parametrize("harm, item, words", [
    (forget, "data", "incomplete"), (forget, "state", "incomplete"), (forget, "sums", "incomplete"),
    (empty, "state", "incomplete"), (empty, ".", "incomplete"),
    (damage, "state", "cannot be read"), (cut, "state", "cannot be read"), (flip, "state", "cannot be read"),
    (cut, "data", "cannot be read"), (turn, "data", "cannot be read"), (lose, "data", "cannot be read")])
@pytest.mark.slow(9)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_taken(
        harm, item, words, manager, tmp_path, caplog):
    save(manager(), 1, 2)
    harm(tmp_path / "checkpoints" / "2" / item)
    with caplog.at_level(logging.WARNING):
        again = manager()
        assert_restores(again, 1)
    assert any(words in record.getMessage() and "2" in record.getMessage() for record in caplog.records)
    save(again, 2, 3)  # a run that resumes from step 1 saves step 2 again
    assert_restores(manager(), 3)
    assert manager().steps() == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(manager, tmp_path):
    save(manager(), 1, 2)
    for step in "12":
        damage(tmp_path / "checkpoints" / step / "state")
    with pytest.raises(ValueError, match=r"none among \[1, 2\] in .*move that folder away"):
        manager().restore(abstract(MODEL, TX), tiny.Batches())
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_run_whose_checkpoints_are_all_incomplete_does_not_start_over_either(manager, tmp_path):
    save(manager(), 1, 2)
    forget(tmp_path / "checkpoints" / "1" / "data")
    empty(tmp_path / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"none among \[1, 2\] in .*move that folder away"):
        manager().restore(abstract(MODEL, TX), tiny.Batches())


def test_a_save_that_was_killed_leaves_no_step_behind(manager, tmp_path):
    save(manager(), 1)
    partial = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", partial)
    assert_restores(manager(), 1)


def test_a_step_is_saved_once(manager):
    one = manager()
    save(one, 1)
    with pytest.raises(ValueError, match="step 1 already exists"):
        save(one, 1)


# Parameters alone


def test_parameters_are_loaded_from_a_run_and_from_parameters_alone(manager, tmp_path):
    save(manager(), 1)
    mesh = tiny.mesh(fsdp=2)
    loaded = checkpoint.load_params(str(tmp_path), MODEL, mesh)
    assert_equal(loaded, random_state(1).params)
    assert loaded["head"].sharding.mesh == mesh
    checkpoint.save_params(str(tmp_path / "alone"), loaded)
    assert_equal(checkpoint.load_params(str(tmp_path / "alone"), MODEL), random_state(1).params)


def test_parameters_alone_are_not_resumed(tmp_path, caplog):
    checkpoint.save_params(str(tmp_path), random_state(1).params)
    manager = checkpoint.Manager(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert manager.restore(abstract(MODEL, TX), tiny.Batches()) is None
    assert "incomplete" in caplog.text
    manager.close()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        checkpoint.load_params(str(tmp_path), MODEL)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        checkpoint.load_params(str(tmp_path), MODEL)


@pytest.mark.slow(9)
def test_parameters_are_cast_in_parts_while_they_are_loaded(manager, tmp_path, monkeypatch):
    save(manager(), 1)
    monkeypatch.setattr(checkpoint, "PART_BYTES", 2000)
    reads = []
    read = checkpoint.Manager._read
    monkeypatch.setattr(checkpoint.Manager, "_read", lambda self, step, target: (
        reads.append(sum(leaf.size for leaf in jax.tree.leaves(target))) or read(self, step, target)))
    mesh = tiny.mesh(fsdp=2)
    loaded = checkpoint.load_params(str(tmp_path), MODEL, mesh,
                                    lambda path, leaf: leaf.astype(
                                        "bfloat16" if path.endswith("kernel") else "float32"))
    wanted = random_state(1).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        assert leaf.dtype == ("bfloat16" if path[-1].key == "kernel" else "float32")
    assert_equal(jax.tree.map(lambda leaf: leaf.astype("float32"), loaded),
                 jax.tree.map(lambda leaf, like: leaf.astype(like.dtype).astype("float32"), wanted, loaded))
    assert len(reads) > 3 and sum(reads) == sum(leaf.size for leaf in jax.tree.leaves(wanted))
    assert loaded["head"].sharding.mesh == mesh


@pytest.mark.slow(11)
def test_a_damaged_part_costs_the_step_and_the_one_before_is_loaded(manager, tmp_path, monkeypatch):
    one = manager(keep=2)
    save(one, 1)
    save(one, 2)
    monkeypatch.setattr(checkpoint, "PART_BYTES", 2000)
    read, reads = checkpoint.Manager._read, []

    def broken(self, step, target):
        reads.append(step)
        return None if step == 2 and reads.count(2) == 3 else read(self, step, target)

    monkeypatch.setattr(checkpoint.Manager, "_read", broken)
    loaded = checkpoint.load_params(str(tmp_path), MODEL, None, lambda path, leaf: leaf)
    assert_equal(loaded, random_state(1).params)
    assert reads[:4] == [2, 2, 2, 1]
