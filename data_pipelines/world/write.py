"""Writes a drawn world with known answers as a data folder: videos, stills and image sets of moving shapes.

    folder/SPLIT/annotations.jsonl, media/000000.mp4, media/000001.png, media/000002_1.png ...

The folder has the format of user data (docs/data_format.md) and is read by the same code. Example `index`
of a split depends on (seed, split, index, WorldConfig) alone.
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

import av
import numpy as np
from PIL import Image

from data_pipelines.world import asker as asker_lib
from data_pipelines.world import config as world_config
from data_pipelines.world import sample as world_sample
from data_pipelines.world import scene as scene_lib
from molmo2_jax import files
from molmo2_jax.inputs import video_file
from molmo2_jax.monitor import bars

ENCODER_OPTIONS = {"preset": "ultrafast", "crf": "18"}


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


def make_example(folder: str, config: world_config.WorldConfig, seed: int, split: str, has_masks: bool,
                 index: int) -> dict:
    """Returns the record of one example (a line of annotations.jsonl) and writes its media below `folder`.

    Raises:
      ValueError: the config leaves no room for a scene, see sample.sample_scene.
    """
    entropy = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(split.encode()), index))
    rng = np.random.default_rng(entropy)
    draw = rng.random()
    width, height = rng.integers(config.frame_side[0], config.frame_side[1] + 1, 2).tolist()
    sides = (width // 2 * 2, height // 2 * 2)
    is_video = draw >= config.image_share + config.image_set_share
    if is_video:
        ticks, tick, gop = world_sample.sample_times(rng, config)
        times = ticks * float(tick)
        scene = world_sample.sample_scene(rng, config, times[:-1], float(ticks[-1] * tick), sides)
        name = f"media/{index:06d}.mp4"
        encode(os.path.join(folder, name), scene_lib.draw(scene), ticks, tick, gop)
        observations = [asker_lib.observe(scene, asker_lib.grid(scene.duration))]
        record = {"video": name, "size": sides}
    else:
        number = 1
        if draw >= config.image_share:
            number = int(rng.integers(config.images_per_set[0], config.images_per_set[1] + 1))
        names = [f"media/{index:06d}{f'_{n + 1}' if number > 1 else ''}.png" for n in range(number)]
        observations = []
        for name in names:
            scene = world_sample.sample_scene(rng, config, np.zeros(1), 0.0, sides)
            still = Image.fromarray(next(scene_lib.draw(scene)))
            still.save(os.path.join(folder, name), compress_level=1)
            observations.append(asker_lib.observe(scene, np.zeros(1)))
        record = {"images": names, "size": [sides] * number}
    asker = asker_lib.Asker(observations, config, rng, is_video)
    record["annotations"] = asker.annotations(int(rng.integers(config.branches[0], config.branches[1] + 1)))
    if has_masks:
        record["masks"] = asker.masks()
    return record


def write(folder: str | os.PathLike, config: world_config.WorldConfig, seed: int, num_examples: int,
          split: str, *, workers: int = 1, has_masks: bool | None = None, progress: bool = True,
          replace: bool = True) -> pathlib.Path:
    """Returns the path of folder/split/annotations.jsonl; writes it and its media unless they are complete.

    Args:
      has_masks: write the visible mask of every object at every grid time, for scoring; None: yes, unless the
        split is called "train".
      replace: redraw a complete folder that has other settings.

    Raises:
      ValueError: the folder holds files that this function did not write, or a complete world with other
        settings although `replace` is false; or the config leaves no room for a scene.
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
    """Returns a sentence that names the settings of a folder that differ from the wanted ones."""
    there, wanted = ({**one.pop("config"), **one} for one in (there, wanted))
    differ = ", ".join(f"{name} is {there.get(name)}, not {value}" for name, value in wanted.items()
                       if there.get(name) != value)
    return f"a complete folder is not redrawn: remove it or name another; in {root} {differ}"


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
    """Makes processes started inside this block ignore Ctrl-C; they inherit the ignored signal."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
