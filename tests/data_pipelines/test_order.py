import collections
import pickle

import numpy as np
import pytest

from data_pipelines import order

SHARE_ERROR = 0.02  # of 20,000 draws; three standard deviations are 0.011


def test_every_example_of_a_data_set_comes_once_per_epoch():
    stream = order.Order([7, 3], [0.5, 0.5], seed=3)
    seen = collections.Counter(stream(number) for number in range(4000))
    epochs = [max(epoch for dataset, _, epoch in seen if dataset == which) for which in (0, 1)]
    assert set(seen.values()) == {1}
    for which, size in ((0, 7), (1, 3)):
        finished = range(epochs[which])
        full = {(index, epoch) for dataset, index, epoch in seen if dataset == which and epoch in finished}
        assert full == {(index, epoch) for index in range(size) for epoch in finished}


def test_a_number_means_the_same_in_whatever_sequence_it_is_asked_for():
    forward = order.Order([11, 5, 2], [3, 2, 1], seed=8)
    expected = [forward(number) for number in range(10000)]
    backward = pickle.loads(pickle.dumps(forward))
    assert [backward(number) for number in range(9999, -1, -1)] == expected[::-1]


def test_data_sets_are_drawn_by_their_rates():
    stream = order.Order([100, 100, 100], [1, 2, 5], seed=0)
    drawn = np.bincount([stream(number)[0] for number in range(20000)]) / 20000
    np.testing.assert_allclose(drawn, [1 / 8, 2 / 8, 5 / 8], atol=SHARE_ERROR)


def test_epochs_and_seeds_have_different_orders():
    def epoch_of(seed, epoch):
        stream = order.Order([50], [1.0], seed)
        return [stream(number)[1] for number in range(50 * epoch, 50 * epoch + 50)]
    assert epoch_of(0, 0) != epoch_of(0, 1) != epoch_of(1, 1)
    assert epoch_of(0, 1) == epoch_of(0, 1)


def test_the_order_is_that_of_frozen_generators():
    """Draws and permutations as in the reference, recomputed with numpy's legacy generators alone."""
    stream = order.Order([6, 4], [0.25, 0.75], seed=11)
    random = np.random.RandomState(11)
    uses = collections.Counter()
    for number in range(100):
        dataset = random.choice(2, p=[0.25, 0.75])
        epoch, place = divmod(uses[dataset], (6, 4)[dataset])
        uses[dataset] += 1
        shuffle = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(11, spawn_key=(epoch, 1))))
        assert stream(number) == (dataset, shuffle.permutation((6, 4)[dataset])[place], epoch)


@pytest.mark.parametrize("arguments, rule", [
    (([], [], 0), "at least one example"), (([3, 0], [1, 1], 0), "at least one example"),
    (([3], [0.0], 0), "positive"), (([3], [float("nan")], 0), "positive"), (([3], [1, 1], 0), "one positive"),
    (([3], [1], -1), "seed"), (([3], [1], 2**32), "seed")])
def test_what_has_no_order_is_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        order.Order(*arguments)
