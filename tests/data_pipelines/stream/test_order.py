import collections
import pickle

import numpy as np
import pytest

from data_pipelines.stream import order

SHARE_ERROR = 0.02  # of 20,000 draws; three standard deviations are 0.011


def mixed(*rates):
    """Returns the lessons of a stream with one mixture."""
    return [(0, rates)]


def test_every_example_of_a_data_set_comes_once_per_epoch():
    stream = order.Order([7, 3], mixed(0.5, 0.5), seed=3)
    seen = collections.Counter(stream(number) for number in range(4000))
    epochs = [max(epoch for dataset, _, epoch in seen if dataset == which) for which in (0, 1)]
    assert set(seen.values()) == {1}
    for which, size in ((0, 7), (1, 3)):
        finished = range(epochs[which])
        full = {(index, epoch) for dataset, index, epoch in seen if dataset == which and epoch in finished}
        assert full == {(index, epoch) for index in range(size) for epoch in finished}


def test_a_number_means_the_same_in_whatever_sequence_it_is_asked_for():
    forward = order.Order([11, 5, 2], [(0, (3, 2, 1)), (5000, (1, 0, 4))], seed=8)
    expected = [forward(number) for number in range(10000)]
    backward = pickle.loads(pickle.dumps(forward))
    assert [backward(number) for number in range(9999, -1, -1)] == expected[::-1]


def test_data_sets_are_drawn_by_their_rates():
    stream = order.Order([100, 100, 100], mixed(1, 2, 5), seed=0)
    drawn = np.bincount([stream(number)[0] for number in range(20000)]) / 20000
    np.testing.assert_allclose(drawn, [1 / 8, 2 / 8, 5 / 8], atol=SHARE_ERROR)


def test_epochs_and_seeds_have_different_orders():
    def epoch_of(seed, epoch):
        stream = order.Order([50], mixed(1.0), seed)
        return [stream(number)[1] for number in range(50 * epoch, 50 * epoch + 50)]
    assert epoch_of(0, 0) != epoch_of(0, 1) != epoch_of(1, 1)
    assert epoch_of(0, 1) == epoch_of(0, 1)


def test_the_order_is_that_of_frozen_generators():
    """Recomputes draws and permutations as in the reference, with numpy's legacy generators only."""
    stream = order.Order([6, 4], mixed(0.25, 0.75), seed=11)
    random = np.random.RandomState(11)
    uses = collections.Counter()
    for number in range(100):
        dataset = random.choice(2, p=[0.25, 0.75])
        epoch, place = divmod(uses[dataset], (6, 4)[dataset])
        uses[dataset] += 1
        shuffle = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(11, spawn_key=(epoch, 1))))
        assert stream(number) == (dataset, shuffle.permutation((6, 4)[dataset])[place], epoch)


def test_each_lesson_draws_by_its_own_rates_from_its_first_number_on():
    lessons = [(0, (1, 0, 0)), (4000, (0, 1, 3)), (4500, (1, 0, 1))]  # within, and across, blocks of draws
    stream = order.Order([10, 100, 100], lessons, seed=0)
    drawn = [stream(number)[0] for number in range(24_500)]
    assert set(drawn[:4000]) == {0} and set(drawn[4000:4500]) == {1, 2} and set(drawn[4500:]) == {0, 2}
    np.testing.assert_allclose(np.bincount(drawn[4500:]) / 20_000, [0.5, 0, 0.5], atol=SHARE_ERROR)
    np.testing.assert_allclose(np.mean(np.equal(drawn[4000:4500], 1)), 0.25, atol=0.1)


def test_a_data_set_at_rate_zero_resumes_where_it_stopped():
    stream = order.Order([7, 5], [(0, (1, 0)), (10, (0, 1)), (20, (1, 0))], seed=4)
    always = order.Order([7, 5], mixed(1, 0), seed=4)
    assert [stream(number) for number in (*range(10), *range(20, 30))] == [always(n) for n in range(20)]


def test_later_lessons_change_nothing_before_them():
    one = order.Order([9, 9], mixed(1, 2), seed=6)
    two = order.Order([9, 9], [(0, (1, 2)), (300, (5, 1))], seed=6)
    assert [one(number) for number in range(300)] == [two(number) for number in range(300)]
    assert [one(number) for number in range(300, 400)] != [two(number) for number in range(300, 400)]


@pytest.mark.parametrize("sizes, lessons, seed, rule", [
    ([], mixed(), 0, "at least one example"), ([3, 0], mixed(1, 1), 0, "at least one example"),
    ([3], mixed(0.0), 0, "not all of them 0"), ([3], mixed(float("nan")), 0, "one number >= 0"),
    ([3], mixed(1, 1), 0, "one number >= 0"), ([3, 3], mixed(2, -1), 0, "one number >= 0"),
    ([3, 3], [(0, (1, 1)), (5, (0, 0))], 0, "not all of them 0"),
    ([3], [], 0, "lessons must begin"), ([3], [(1, (1,))], 0, "lessons must begin"),
    ([3], [(0, (1,)), (5, (1,)), (5, (1,))], 0, "lessons must begin"),
    ([3], [(0, (1,)), (5, (1,)), (4, (1,))], 0, "lessons must begin"),
    ([3], mixed(1), -1, "seed"), ([3], mixed(1), 2**32, "seed")])
def test_what_has_no_order_is_refused(sizes, lessons, seed, rule):
    with pytest.raises(ValueError, match=rule):
        order.Order(sizes, lessons, seed)
