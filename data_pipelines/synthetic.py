"""A world with known answers: videos, stills and image sets of moving shapes, written as a data folder.

    folder/SPLIT/annotations.jsonl, media/000000.mp4, media/000001.png, media/000002_1.png ...

The folder is in the format every user brings (docs/data_format.md), so reading it is reading user data.
Example `index` of a split depends on (seed, split, index, WorldConfig) alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import fractions
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import zlib
from typing import Literal

import av
import numpy as np
from PIL import Image

from data_pipelines import synthetic_annotations
from data_pipelines import synthetic_scene
from molmo2_jax import bars
from molmo2_jax import config as configs
from molmo2_jax import files
from molmo2_jax.inputs import video_file

ENCODER_OPTIONS = {"preset": "ultrafast", "crf": "18"}
HOPS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]   # cells, to a neighbour
LAST_FRAME_GAP = 0.15   # seconds between the last grid time and the end, unless they coincide


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What the drawn world looks like and what is asked about it. Ranges include both ends."""
    objects: tuple[int, int] = (1, 6)
    object_rates: tuple[float, ...] = ()   # of each number of objects, the smallest first; (): all alike
    kinds: tuple[str, ...] = synthetic_scene.KINDS
    colours: tuple[str, ...] = tuple(synthetic_scene.COLOURS)
    unique: Literal["colour", "phrase", "none"] = "phrase"   # what no two objects of a scene share
    radius: tuple[float, float] = (0.08, 0.2)                # of the short side
    speed: tuple[float, float] = (0.0, 0.4)                  # short sides per second
    lattice: float | None = None   # centres rest on multiples of this share of the sides, hop between them
    is_apart: bool = False                                   # objects never touch
    leave_share: float = 0.2                                 # of the objects pass through the border
    frame_side: tuple[int, int] = (96, 192)                  # pixels, each side drawn alone, made even
    fps: tuple[int, ...] = (6, 8, 10, 12, 15, 24)
    duration: tuple[float, float] = (2.0, 6.0)               # seconds
    gop: tuple[int, int] = (4, 48)                           # frames from keyframe to keyframe
    vfr_share: float = 0.1                                   # of the videos have a variable frame rate
    texture: float = 0.6                                     # of the background, 0 to 1
    tone: tuple[float, float] = (50.0, 200.0)                # of the background, grey levels
    tint: float = 14.0                                       # most that its colour strays from grey
    image_share: float = 0.2                                 # of the examples are one still
    image_set_share: float = 0.1                             # ... or several
    images_per_set: tuple[int, int] = (2, 4)
    branches: tuple[int, int] = (3, 8)                       # annotations per example
    annotations: tuple[tuple[str, float], ...] = (
        ("points", 4.0), ("tracks", 2.0), ("count", 1.0), ("choice", 2.0), ("qa", 1.0), ("caption", 0.5))
    phrases: tuple[str, ...] = synthetic_annotations.PHRASE_FORMS
    point_modes: tuple[str, ...] = ("bare", "point_count")
    point_time: Literal["first", "random"] = "first"         # which grid time shows the object
    absent_share: float = 0.1                                # of the examples may ask for what is not there

    def __post_init__(self):
        for name in ("objects", "radius", "speed", "frame_side", "duration", "gop", "images_per_set",
                     "branches"):
            low, high = getattr(self, name)
            configs.require(0 <= low <= high, f"{name} must be a range 0 <= low <= high", (low, high))
        configs.require(self.lattice is None or 0 < self.lattice <= 0.25, "lattice must lie in (0, 0.25]",
                        self.lattice)
        configs.require(self.objects[0] >= 1, "objects must be >= 1", self.objects)
        configs.require(len(self.object_rates) in (0, self.objects[1] - self.objects[0] + 1)
                        and min(self.object_rates, default=1) >= 0 and sum(self.object_rates or (1,)) > 0,
                        "object_rates must give a rate >= 0 to each number of objects", self.object_rates)
        configs.require(self.radius[0] > 0 and self.radius[1] * synthetic_scene.REACH < 0.5,
                        "radius must be > 0 and fit into the frame (below 0.4)", self.radius)
        configs.require(self.frame_side[0] >= 32, "frame_side must be >= 32 pixels", self.frame_side)
        configs.require(self.duration[0] >= 0.5, "duration must be >= 0.5 seconds", self.duration)
        configs.require(self.gop[0] >= 1, "gop must be >= 1 frame", self.gop)
        for name, known in (("kinds", synthetic_scene.KINDS), ("colours", tuple(synthetic_scene.COLOURS)),
                            ("phrases", synthetic_annotations.PHRASE_FORMS),
                            ("point_modes", ("bare", "point_count", "count_point", "count"))):
            values = getattr(self, name)
            configs.require(values and set(values) <= set(known), f"{name} must be some of {known}", values)
        kinds = dict(self.annotations)
        configs.require(set(kinds) <= set(synthetic_annotations.ANNOTATION_KINDS) and sum(kinds.values()) > 0
                        and min(kinds.values()) >= 0,
                        f"annotations must give rates >= 0 of {synthetic_annotations.ANNOTATION_KINDS}",
                        self.annotations)
        configs.require(self.unique in ("colour", "phrase", "none"), "unique must be colour, phrase or none",
                        self.unique)
        configs.require(self.point_time in ("first", "random"), "point_time must be first or random",
                        self.point_time)
        available = {"colour": len(self.colours), "phrase": len(self.colours) * len(self.kinds)}
        configs.require(self.objects[1] <= available.get(self.unique, self.objects[1]),
                        f"objects must not exceed the different {self.unique}s", self.objects)


def quickstart_world() -> WorldConfig:
    """One large object, sometimes two, of four colours, kept apart, that rest or hop over a lattice.

    Simple enough to be learnt from nothing in minutes on two cores; all of the path is the real one. Which of
    two objects was asked for is hardly learnt in that time (benchmarks/README.md), so two are the rarer case.
    """
    return WorldConfig(
        objects=(1, 2), object_rates=(3.0, 1.0), colours=("red", "green", "blue", "yellow"), unique="colour",
        radius=(0.17, 0.22), lattice=0.1, is_apart=True, leave_share=0.0, frame_side=(96, 112),
        fps=(8, 10, 12), duration=(1.0, 2.0), vfr_share=0.05, texture=0.15, tone=(85.0, 115.0), tint=5.0,
        image_share=0.3, image_set_share=0.05, images_per_set=(2, 2), branches=(4, 8),
        annotations=(("points", 5.0), ("tracks", 1.0), ("count", 0.5), ("choice", 0.5)),
        phrases=("colour_kind", "any"), absent_share=0.0)


def quickstart_lessons() -> dict[str, tuple[WorldConfig, int]]:
    """Returns name -> (world, number of examples) of the quickstart's curriculum, the easiest first.

    A model that has never pointed learns it on one object, in stills and clips of two frames; then which of
    two was asked for; then whole clips with tracks, counts and choices.
    """
    world = quickstart_world()
    short = dataclasses.replace(world, duration=(0.5, 0.5), image_set_share=0.0, point_modes=("bare",))
    one = dataclasses.replace(short, objects=(1, 1), object_rates=(), image_share=0.6, branches=(1, 2),
                              annotations=(("points", 5.0), ("tracks", 0.5), ("count", 0.2)))
    two = dataclasses.replace(short, objects=(2, 2), object_rates=(), image_share=0.5, branches=(3, 5),
                              phrases=("colour_kind", "colour", "any"),
                              annotations=(("points", 6.0), ("count", 0.3)))
    return {"one": (one, 6000), "two": (two, 6000), "clips": (world, 6000)}


def full_world() -> WorldConfig:
    """One to six objects that rest or hop over a lattice, cross, hide each other, enter and leave.

    Without the lattice an hour on two cores taught which object is meant, but not its place to better than
    0.05 of the frame (benchmarks/README.md).
    """
    return WorldConfig(colours=("red", "green", "blue", "yellow", "purple", "cyan"), unique="colour",
                       radius=(0.14, 0.22), lattice=0.1, texture=0.4, tone=(70.0, 150.0),
                       fps=(6, 8, 10, 12, 15), duration=(1.5, 5.0))


def full_lessons() -> dict[str, tuple[WorldConfig, int]]:
    """Returns name -> (world, number of examples) of a curriculum of the full world, the easiest first.

    For a model that can point at one object: which of two of six colours was asked for, at rest on a lattice;
    then a few that keep apart; then all of it.
    """
    world = full_world()
    two = dataclasses.replace(quickstart_lessons()["two"][0], colours=world.colours)
    few = dataclasses.replace(world, objects=(1, 3), radius=(0.15, 0.22), is_apart=True, leave_share=0.0,
                              texture=0.3, duration=(0.5, 2.0), absent_share=0.0)
    return {"two": (two, 8000), "few": (few, 10000), "many": (world, 16000)}


# Name -> (world, lessons) of a drawn world.
WORLDS = {"quickstart": (quickstart_world, quickstart_lessons), "full": (full_world, full_lessons)}


def sample_scene(rng: np.random.Generator, config: WorldConfig, times: np.ndarray, duration: float,
                 size: tuple[int, int]) -> synthetic_scene.Scene:
    """Returns a scene in which every object is well visible at a grid time at least once."""
    for _ in range(100):
        shapes = _sample_shapes(rng, config, times, size)
        if shapes is None:
            continue
        scene = synthetic_scene.Scene(
            background=synthetic_scene.background(rng, size[1], size[0], config.texture, config.tone,
                                                  config.tint),
            shapes=shapes, times=times, duration=duration)
        if config.is_apart and not config.leave_share or _all_well_visible(scene):
            return scene
    raise ValueError("objects, radius and speed must leave room for every object to be seen; found no such "
                     f"scene of {size[0]}x{size[1]} pixels in 100 draws of {config}")


def _all_well_visible(scene: synthetic_scene.Scene) -> bool:
    grid = synthetic_annotations.grid(scene.duration)[:-1] if scene.duration else np.zeros(1)
    shares = [synthetic_scene.owners(scene, scene.frame_at(time))[1] for time in grid]
    return bool((np.max(shares, axis=0) >= synthetic_annotations.WELL_SHARE).all())


def _sample_shapes(rng, config: WorldConfig, times, size) -> tuple[synthetic_scene.Shape, ...] | None:
    """Returns shapes that keep their distance if they must, or None if some shape found no place."""
    short = min(size)
    number = int(rng.integers(config.objects[0], config.objects[1] + 1))
    if config.object_rates:
        rates = np.array(config.object_rates, float)
        number = config.objects[0] + int(rng.choice(len(rates), p=rates / rates.sum()))
    names = _sample_names(rng, config, number)
    shrink = 1.0
    for _ in range(12):
        shapes = []
        for colour, kind in names:
            low, high = config.radius
            radius = short * (low + rng.random() * (high - low) * shrink)
            centres = _sample_path(rng, config, times, size, kind, radius, shapes)
            if centres is None:
                break
            tint = rng.integers(-12, 13, 3)
            red, green, blue = np.clip(np.array(synthetic_scene.COLOURS[colour]) + tint, 0, 255).tolist()
            shapes.append(synthetic_scene.Shape(kind=kind, colour=colour, rgb=(red, green, blue),
                                                radius=radius, angle=rng.uniform(-0.15, 0.15),
                                                centres=centres))
        if len(shapes) == number:
            return tuple(shapes)
        shrink *= 0.7
    return None


def _sample_names(rng, config: WorldConfig, number: int) -> list[tuple[str, str]]:
    kinds = [config.kinds[i] for i in rng.integers(len(config.kinds), size=number)]
    if config.unique == "colour":
        return [(config.colours[i], kind) for i, kind in zip(rng.permutation(len(config.colours)), kinds)]
    if config.unique == "phrase":
        pairs = [(colour, kind) for colour in config.colours for kind in config.kinds]
        return [pairs[i] for i in rng.permutation(len(pairs))[:number]]
    colours = rng.integers(len(config.colours), size=number)
    return [(config.colours[i], kind) for i, kind in zip(colours, kinds)]


def _reach(kind: str, radius: float) -> float:
    return float(np.linalg.norm(synthetic_scene.OUTLINES[kind], axis=1).max()) * radius


def _sample_path(rng, config: WorldConfig, times, size, kind, radius, others) -> np.ndarray | None:
    """Returns float64[F, 2] centres that stay inside (or pass through the border), or None after 48 tries."""
    tries = 48 if config.is_apart else 1
    reach = _reach(kind, radius)
    speed = rng.uniform(*config.speed, (tries, 1)) * min(size)
    angle = rng.uniform(0, 2 * np.pi, (tries, 1))
    velocity = speed * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    low, high = np.full(2, reach), np.array(size) - 1 - reach
    start = low + rng.random((tries, 2)) * (high - low)
    if config.lattice is not None:
        leaves = config.leave_share > 0 and rng.random() < config.leave_share
        paths = _hop(rng, np.array(size) * config.lattice, low, high, times, tries, moves=config.speed[1] > 0,
                     leaves=leaves)
    elif rng.random() < config.leave_share:
        paths = start[:, None] + velocity[:, None] * (times - rng.uniform(0, times[-1]))[None, :, None]
    else:
        paths = _reflect(start[:, None] + velocity[:, None] * times[None, :, None], low, high)
    is_free = np.ones(tries, bool)
    for other in others if config.is_apart else ():
        distance = np.linalg.norm(paths - other.centres, axis=-1).min(axis=1)
        is_free &= distance > reach + _reach(other.kind, other.radius) + 1
    return paths[is_free.argmax()] if is_free.any() else None


def _hop(rng, step, low, high, times, tries: int, moves: bool, leaves: bool) -> np.ndarray:
    """Returns float64[tries, F, 2] centres that rest on multiples of `step` at every half second.

    Half of the shapes stay; the others hop to a neighbouring cell in the first 0.3 s of each half second,
    so that the frames which are sampled at 2 per second, the last one included, show them at rest. They turn
    round at the border; one that `leaves` always hops, and through the border.
    """
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    cells = np.floor(first + rng.random((tries, 2)) * (last - first + 1))
    velocity = rng.integers(-1, 2, (tries, 2)) * (rng.random((tries, 1)) < 0.5) * moves
    hops = np.floor(times / 0.5 + 1e-9)
    hops = hops + np.minimum((times - 0.5 * hops) / 0.3, 1)
    if leaves and moves:
        velocity = np.array(HOPS)[rng.integers(len(HOPS), size=tries)]
        hops = hops - rng.integers(0, np.floor(hops[-1]) + 1)
        return (cells[:, None] + velocity[:, None] * hops[None, :, None]) * step
    return _reflect(cells[:, None] + velocity[:, None] * hops[None, :, None], first, last) * step


def _reflect(positions, low, high):
    """Returns positions bounced back and forth between low and high."""
    span = np.maximum(high - low, 1e-9)
    folded = np.mod(positions - low, 2 * span)
    return low + np.minimum(folded, 2 * span - folded)


def _sample_times(rng, config: WorldConfig) -> tuple[np.ndarray, fractions.Fraction, int]:
    """Returns the ticks int64[F + 1] at which frames appear (and the last one ends), the length of a tick in
    seconds, and the keyframe interval."""
    fps = int(config.fps[rng.integers(len(config.fps))])
    tick = fractions.Fraction(1, 2 * fps)
    while True:
        wanted = rng.uniform(*config.duration)
        if config.lattice is not None:
            wanted = round(wanted * 2) / 2
        ticks = np.arange(0, max(round(wanted * fps), 2) + 1) * 2
        if rng.random() < config.vfr_share:
            steps = rng.integers(1, 5, size=len(ticks))
            ticks = np.concatenate([[0], np.cumsum(steps)])
            ticks = ticks[:max(int(np.searchsorted(ticks, wanted * 2 * fps)), 2) + 1]
            ticks[-1] = ticks[-2] + 2  # the muxer gives the last frame the nominal duration
        rest = float(ticks[-1] * tick) % 0.5
        if rest == 0 or rest >= LAST_FRAME_GAP:
            return ticks, tick, int(rng.integers(config.gop[0], config.gop[1] + 1))


def encode(path: str | os.PathLike, images, ticks, tick: fractions.Fraction, gop: int) -> None:
    """Writes uint8[H, W, 3] images as H.264; image i appears at ticks[i], the last one ends at ticks[-1]."""
    with av.open(video_file.url(path), "w") as container:
        stream = None
        for image, start, end in zip(images, ticks[:-1], ticks[1:]):
            if stream is None:
                stream = container.add_stream("libx264", rate=1 / (2 * tick), options=ENCODER_OPTIONS)
                (stream.height, stream.width), stream.pix_fmt = image.shape[:2], "yuv420p"
                stream.gop_size = gop
                stream.thread_count = 1
                stream.codec_context.time_base = tick
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.duration, frame.time_base = int(start), int(end - start), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make_example(folder: str, config: WorldConfig, seed: int, split: str, has_masks: bool,
                 index: int) -> dict:
    """Returns the record of one example (a line of annotations.jsonl) and writes its media below `folder`."""
    entropy = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(split.encode()), index))
    rng = np.random.default_rng(entropy)
    draw = rng.random()
    width, height = rng.integers(config.frame_side[0], config.frame_side[1] + 1, 2).tolist()
    sides = (width // 2 * 2, height // 2 * 2)
    is_video = draw >= config.image_share + config.image_set_share
    if is_video:
        ticks, tick, gop = _sample_times(rng, config)
        times = ticks * float(tick)
        scene = sample_scene(rng, config, times[:-1], float(ticks[-1] * tick), sides)
        name = f"media/{index:06d}.mp4"
        encode(os.path.join(folder, name), synthetic_scene.draw(scene), ticks, tick, gop)
        observations = [synthetic_annotations.observe(scene, synthetic_annotations.grid(scene.duration))]
        record = {"video": name, "size": sides}
    else:
        number = 1
        if draw >= config.image_share:
            number = int(rng.integers(config.images_per_set[0], config.images_per_set[1] + 1))
        names = [f"media/{index:06d}{f'_{n + 1}' if number > 1 else ''}.png" for n in range(number)]
        observations = []
        for name in names:
            scene = sample_scene(rng, config, np.zeros(1), 0.0, sides)
            still = Image.fromarray(next(synthetic_scene.draw(scene)))
            still.save(os.path.join(folder, name), compress_level=1)
            observations.append(synthetic_annotations.observe(scene, np.zeros(1)))
        record = {"images": names, "size": [sides] * number}
    asker = synthetic_annotations.Asker(observations, config, rng, is_video)
    record["annotations"] = asker.annotations(int(rng.integers(config.branches[0], config.branches[1] + 1)))
    if has_masks:
        record["masks"] = asker.masks()
    return record


def write(folder: str | os.PathLike, config: WorldConfig, seed: int, num_examples: int, split: str, *,
          workers: int = 1, has_masks: bool | None = None, progress: bool = True,
          replace: bool = True) -> pathlib.Path:
    """Returns the path of folder/split/annotations.jsonl; writes it and its media unless they are complete.

    Args:
      has_masks: write the visible mask of every object at every grid time, for scoring; None: unless the
        split is called "train".
      replace: draw anew what is complete but has other settings.

    Raises:
      ValueError: the folder holds something other than an earlier writing of a world, or one that must stay.
    """
    root = pathlib.Path(folder) / split
    target, label = root / "annotations.jsonl", root / "world.json"
    has_masks = split != "train" if has_masks is None else has_masks
    written = json.dumps({"seed": seed, "split": split, "num_examples": num_examples, "has_masks": has_masks,
                          "config": dataclasses.asdict(config)}, indent=1)
    if root.exists() and any(root.iterdir()) and not label.exists():
        raise ValueError(f"the folder of a split must be empty or written by this function; got {root}")
    if target.exists() and label.read_text() == written:
        return target
    if target.exists() and not replace:
        raise ValueError(_other(root, json.loads(label.read_text()), json.loads(written)))
    (root / "media").mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    label.write_text(written)
    make = functools.partial(make_example, str(root), config, seed, split, has_masks)
    with files.whole(target) as lines:
        for record in bars.bar(_map(make, num_examples, workers), total=num_examples,
                               desc=f"writing {split}", unit="examples", disable=not progress):
            lines.write(json.dumps(record) + "\n")
    return target


def _other(root: pathlib.Path, there: dict, wanted: dict) -> str:
    """Returns a sentence about a folder whose settings are not the wanted ones."""
    there, wanted = ({**one.pop("config"), **one} for one in (there, wanted))
    differ = ", ".join(f"{name} is {there.get(name)}, not {value}" for name, value in wanted.items()
                       if there.get(name) != value)
    return f"a complete folder is not drawn anew: remove it or name another; in {root} {differ}"


def _map(make, number: int, workers: int):
    """Yields make(0), make(1) ... in order, computed by `workers` processes."""
    if workers <= 1:
        yield from map(make, range(number))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        with _ignored_interrupts():
            results = pool.map(make, range(number), chunksize=max(1, min(16, number // (4 * workers))))
        yield from results


@contextlib.contextmanager
def _ignored_interrupts():
    """Makes processes that start meanwhile leave Ctrl-C to this one: what is ignored stays so in them."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
