"""Random inputs of scores that public packages also compute. Needs numpy only, as their environments do."""

import numpy as np

TRACK_SEEDS, MASK_SEEDS, POINT_SEEDS, COUNT_SEEDS = range(24), range(24), range(12), range(12)
WIDTH, HEIGHT = 48, 36
FRAMES, POINTS = 12, 5


def tracks(seed):
    """Returns (objects, {frame: {object: box}}, {frame: {track: (x, y)}}); a box is (x0, y0, x1, y1)."""
    rng = np.random.RandomState(seed)
    objects = [f"o{n}" for n in range(rng.randint(1, 5))]
    boxes, given = {}, {}
    for frame in range(rng.randint(1, 10)):
        shown = {name: _box(rng) for name in objects if rng.uniform() < 0.8}
        boxes[frame] = shown
        given[frame] = {}
        for track in range(rng.randint(1, 5)):
            if shown and rng.uniform() < 0.6:
                # mostly the object of the same number, so that identities are partly right
                own = objects[track % len(objects)]
                left, top, right, bottom = shown.get(own, next(iter(shown.values())))
                place = rng.randint(left, right), rng.randint(top, bottom)
            else:
                place = rng.randint(WIDTH), rng.randint(HEIGHT)
            given[frame][f"t{track}"] = tuple(map(float, place))
    return objects, boxes, given


def _box(rng):
    left, top = rng.randint(WIDTH - 12), rng.randint(HEIGHT - 10)
    return left, top, left + rng.randint(3, 12), top + rng.randint(3, 10)


def mask_of(box):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def mask_pair(seed):
    """Returns two masks bool[H, W] of overlapping shapes, some empty, touching an edge, or full."""
    rng = np.random.RandomState(seed)
    height, width = rng.randint(20, 90, size=2)
    rows, columns = np.mgrid[:height, :width]

    def shape():
        kind = rng.randint(8)
        if kind == 0:
            return np.zeros((height, width), bool)
        if kind == 1:
            return np.ones((height, width), bool)
        center, radii = rng.uniform(0, (height, width)), rng.uniform(3, 25, 2)
        inside = ((rows - center[0]) / radii[0]) ** 2 + ((columns - center[1]) / radii[1]) ** 2 < 1
        return inside | (rng.uniform(size=(height, width)) < 0.01)

    first = shape()
    second = np.roll(first, rng.randint(-3, 4, size=2), (0, 1)) if rng.uniform() < 0.6 else shape()
    return first, second


def point_tracks(seed):
    """Returns (query frames [N], true xy [N, F, 2], hidden [N, F], given xy, given hidden), 256 x 256."""
    rng = np.random.RandomState(seed)
    true = rng.uniform(0, 256, size=(POINTS, FRAMES, 2))
    given = true + rng.normal(size=true.shape) * rng.choice(
        [0.3, 2.0, 8.0, 40.0], size=(POINTS, FRAMES, 1)
    )
    hidden = rng.uniform(size=(2, POINTS, FRAMES)) < 0.3
    hidden[0, :, -1] = False
    return rng.randint(0, FRAMES - 1, size=POINTS), true, hidden[0], given, hidden[1]


def counts(seed):
    """Returns (hits, predicted points, true points) of one example."""
    rng = np.random.RandomState(seed)
    predicted, true = rng.randint(1, 12, size=2)
    return int(rng.randint(0, min(predicted, true) + 1)), int(predicted), int(true)


def texts(seed):
    """Returns (accepted answers, answer) as damaged copies of each other."""
    rng = np.random.RandomState(seed)
    accepted = ["".join(rng.choice(list("abcDE_12"), size=rng.randint(1, 9))) for _ in range(3)]
    answer = list(accepted[rng.randint(3)])
    for _ in range(rng.randint(4)):
        answer.insert(rng.randint(len(answer) + 1), rng.choice(list("xyz")))
    return accepted, "".join(answer)
