"""Draws scenes of a WorldConfig: their objects, the objects' paths, and the times of the frames."""

import fractions

import numpy as np

from data_pipelines.world import asker as asker_lib
from data_pipelines.world import config as world_config
from data_pipelines.world import scene as scene_lib

HOPS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]   # cells, to a neighbour
LAST_FRAME_GAP = 0.15   # least seconds between the last grid time and the end, unless they coincide


def sample_scene(rng: np.random.Generator, config: world_config.WorldConfig, times: np.ndarray,
                 duration: float, size: tuple[int, int]) -> scene_lib.Scene:
    """Returns a scene in which every object is well visible at one grid time at least.

    times: float64[F], when each frame appears. size: width, height in pixels.

    Raises:
      ValueError: 100 draws gave no such scene: the objects are too many, too large or too fast.
    """
    for _ in range(100):
        shapes = _sample_shapes(rng, config, times, size)
        if shapes is None:
            continue
        scene = scene_lib.Scene(
            background=scene_lib.background(rng, size[1], size[0], config.texture, config.tone,
                                            config.tint),
            shapes=shapes, times=times, duration=duration)
        if config.is_apart and not config.leave_share or _all_well_visible(scene):
            return scene
    raise ValueError("objects, radius and speed must leave room for every object to be seen; found no such "
                     f"scene of {size[0]}x{size[1]} pixels in 100 draws of {config}")


def _all_well_visible(scene: scene_lib.Scene) -> bool:
    grid = asker_lib.grid(scene.duration)[:-1] if scene.duration else np.zeros(1)
    shares = [scene_lib.owners(scene, scene.frame_at(time))[1] for time in grid]
    return bool((np.max(shares, axis=0) >= asker_lib.WELL_SHARE).all())


def _sample_shapes(rng, config: world_config.WorldConfig, times, size) -> tuple[scene_lib.Shape, ...] | None:
    """Returns shapes, kept apart if the config asks for it, or None if a shape found no free path."""
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
            red, green, blue = np.clip(np.array(scene_lib.COLOURS[colour]) + tint, 0, 255).tolist()
            shapes.append(scene_lib.Shape(kind=kind, colour=colour, rgb=(red, green, blue),
                                          radius=radius, angle=rng.uniform(-0.15, 0.15),
                                          centres=centres))
        if len(shapes) == number:
            return tuple(shapes)
        shrink *= 0.7
    return None


def _sample_names(rng, config: world_config.WorldConfig, number: int) -> list[tuple[str, str]]:
    kinds = [config.kinds[i] for i in rng.integers(len(config.kinds), size=number)]
    if config.unique == "colour":
        return [(config.colours[i], kind) for i, kind in zip(rng.permutation(len(config.colours)), kinds)]
    if config.unique == "phrase":
        pairs = [(colour, kind) for colour in config.colours for kind in config.kinds]
        return [pairs[i] for i in rng.permutation(len(pairs))[:number]]
    colours = rng.integers(len(config.colours), size=number)
    return [(config.colours[i], kind) for i, kind in zip(colours, kinds)]


def _reach(kind: str, radius: float) -> float:
    return float(np.linalg.norm(scene_lib.OUTLINES[kind], axis=1).max()) * radius


def _sample_path(rng, config: world_config.WorldConfig, times, size, kind, radius, others
                 ) -> np.ndarray | None:
    """Returns float64[F, 2] centres that stay inside (or cross the border), or None if none of 48 is free."""
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

    Half of the shapes stay; the others hop to a neighbouring cell in the first 0.3 s of each half second, so
    frames sampled at 2 per second, the last one included, show them at rest. They turn round at the border;
    with `leaves`, shapes always hop, and cross the border.
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
    """Returns positions reflected back and forth between low and high."""
    span = np.maximum(high - low, 1e-9)
    folded = np.mod(positions - low, 2 * span)
    return low + np.minimum(folded, 2 * span - folded)


def sample_times(rng, config: world_config.WorldConfig) -> tuple[np.ndarray, fractions.Fraction, int]:
    """Returns (ticks, tick, gop).

    ticks: int64[F + 1], when each frame appears, and when the last one ends. tick: its length in seconds.
    gop: the keyframe interval in frames.
    """
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
