"""Training reads shards as it reads the folder they were made of, also in lessons and in resumed runs."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import pipeline
from data_pipelines.sources import lines
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from molmo2_jax.inputs import packers
from molmo2_jax.inputs import tokenizer as tokenizers
from tests.data_pipelines import drawn

SIZES = {"a": 9, "b": 7}
RATES = ((1.0, 0.2), (0.5, 2.0))   # of each, in two lessons
LESSON = 20                        # examples, after which the second begins: in the third batch
MEAN_ERROR = 0.3                   # of 255, of patches after JPEG; measured: 0.12 (empty ones included)
KINDS = {"reference": {}, "copy": {}, "frames": {"max_side": 378, "quality": 95}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: the two data folders}: as they were drawn ("lines"), and prepared in each way."""
    root, found = tmp_path_factory.mktemp("sets"), {}
    world = dataclasses.replace(world_config.quickstart_world(), frame_side=(32, 48), image_share=0.4)
    found["lines"] = [world_write.write(root / name, world, seed, size, "train", progress=False).parent
                      for seed, (name, size) in enumerate(SIZES.items())]
    for media, how in KINDS.items():
        found[media] = [drawn.prepare(folder, root / f"{media}_{folder.parent.name}", records_per_shard=4,
                                      media=media, **how) for folder in found["lines"]]
    return found


@pytest.fixture(scope="module")
def tokenizer(folders):
    return tokenizers.train_small((folders["lines"][0] / lines.FILE).read_text().splitlines(), 400)


@pytest.fixture
def start(folders, tokenizer):
    """Returns a function that starts a run of a kind on a number of hosts; ends all runs after the test."""
    made = []

    def run(kind, hosts=1, **fields):
        train = tuple((str(folder), rates) for folder, rates in zip(folders[kind], RATES, strict=True))
        data = drawn.data_config(train, lessons=(LESSON,), batch_rows=6, **fields)
        iterators = [pipeline.make_iterator(data, drawn.MODEL, drawn.INPUTS, tokenizer, shard_index=host,
                                            shard_count=hosts) for host in range(hosts)]
        made.extend(iterators)
        return iterators
    yield run
    for one in made:
        one.close()


def take(iterators, count):
    """Returns the next batches of all hosts."""
    return [next(one) for _ in range(count) for one in iterators]


def test_the_sets_have_videos_and_images(folders):
    for folder in folders["lines"]:
        text = (folder / lines.FILE).read_text()
        assert '"video"' in text and '"images"' in text


@pytest.mark.parametrize("media, fields", [
    ("reference", {}), ("copy", {"prefetch": 1}),
    ("copy", {"streams": 3, "packer": packers.Knapsack(buffer=5)})], ids=str)
def test_batches_are_equal_to_the_bit_in_every_lesson_of_a_mixture(start, media, fields):
    [wanted], [found] = start("lines", **fields), start(media, **fields)
    drawn.assert_equal(take([found], 7), take([wanted], 7))
    first, second = wanted.counters()["examples_by_task"].values()
    assert [first, second] == list(found.counters()["examples_by_task"].values())
    assert first + second > 2 * LESSON and first > SIZES["a"] and second > SIZES["b"]  # more than an epoch


@pytest.mark.parametrize("media", ["reference", "copy"])
def test_a_run_on_lines_goes_on_with_shards_of_them(start, media):
    wanted, found = start("lines"), start(media)
    take(wanted, 2)
    found[0].set_state(wanted[0].get_state())
    drawn.assert_equal(take(found, 3), take(wanted, 3))
    wanted[0].set_state(found[0].get_state())
    drawn.assert_equal(take(wanted, 2), take(found, 2))


@pytest.mark.parametrize("streams, hosts", [(None, (2, 3)), (6, (2, 1))])
def test_a_run_on_shards_moves_to_other_hosts_as_one_on_lines(start, streams, hosts):
    before, after = hosts
    states = {}
    for kind in ("lines", "copy"):
        one = start(kind, before, streams=streams)
        states[kind] = take(one, 2), [host.get_state() for host in one]
    drawn.assert_equal(states["copy"][0], states["lines"][0])
    moved = {}
    for kind, (_, saved) in states.items():
        moved[kind] = start(kind, after, streams=streams)
        for host in moved[kind]:
            host.set_states(saved)
    drawn.assert_equal(take(moved["copy"], 3), take(moved["lines"], 3))


def test_kept_frames_differ_in_pixels_alone_and_little(start):
    errors = []
    for one, other in zip(take(start("frames"), 5), take(start("lines"), 5), strict=True):
        for name, array in other._asdict().items():
            if name != "patches":
                np.testing.assert_array_equal(getattr(one, name), array, err_msg=name)
        errors.append(np.abs(one.patches.astype(int) - other.patches).mean())
    assert 0 < max(errors) < MEAN_ERROR
