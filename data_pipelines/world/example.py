"""Draws the example of docs/finetune.md: clips as a labelling tool exports them, and what a model knew.

  python -m data_pipelines.world.example runs/mugs

    runs/mugs/export     DAVIS folder: 40 clips of a mug on squared paper, drawn with a pen, with masks
    runs/mugs/general    200 examples of the quickstart's world, with which assets/nano was trained
    runs/mugs/known      60 held-out examples of it, to measure what is forgotten

Mugs are no shape of the drawn worlds, and neither pen, paper nor pale fillings occur in them. Everything
depends on the seed alone.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
from PIL import Image
from PIL import ImageDraw

from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write

LABEL, FPS, SEED = "mug", 4, 7
CLIPS, GENERAL, KNOWN = 40, 200, 60
_SCALE = 4   # supersampling per axis
_PALETTE = [0, 0, 0, 200, 0, 0] + [0] * 762


def _paper(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns squared paper: bright, with thin lines in both directions."""
    tone = tuple(int(value) for value in rng.integers(225, 250) + rng.integers(-6, 7, 3))
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), tone)
    pen, step = ImageDraw.Draw(image), int(rng.integers(9, 14)) * _SCALE
    first = int(rng.integers(step))
    line = tuple(max(value - int(rng.integers(25, 45)), 0) for value in tone)
    for at in range(first, width * _SCALE, step):
        pen.line([(at, 0), (at, height * _SCALE)], fill=line, width=_SCALE // 2)
    for at in range(first, height * _SCALE, step):
        pen.line([(0, at), (width * _SCALE, at)], fill=line, width=_SCALE // 2)
    return image


def _mug(image: Image.Image, centre, radius: float, side: int, fill, ink, mask: bool = False) -> None:
    """Draws a mug: a body with a round bottom, an oval rim, a handle to the right (side 1) or left (-1)."""
    pen, (x, y), r = ImageDraw.Draw(image), np.asarray(centre) * _SCALE, radius * _SCALE
    stroke = max(int(0.13 * r), 2)
    inner = None if mask else fill
    handle = x + side * 0.85 * r
    pen.ellipse([handle - 0.45 * r, y - 0.5 * r, handle + 0.45 * r, y + 0.5 * r], outline=ink, width=stroke)
    pen.rounded_rectangle([x - 0.8 * r, y - 0.85 * r, x + 0.8 * r, y + r], radius=0.3 * r,
                          fill=ink if mask else inner, outline=ink, width=stroke)
    pen.ellipse([x - 0.8 * r, y - 1.05 * r, x + 0.8 * r, y - 0.65 * r], fill=ink if mask else inner,
                outline=ink, width=stroke)


def _clip(rng: np.random.Generator, number: int, export: pathlib.Path) -> None:
    """Draws one clip: a mug that rests, or hops to a neighbouring place every half second."""
    width, height = (int(value) // 2 * 2 for value in rng.integers(96, 113, 2))
    radius = rng.uniform(0.17, 0.22) * min(width, height)
    cell = np.array([width, height]) / 10
    low, high = np.ceil(1.35 * radius / cell), np.floor((np.array([width, height]) - 1.35 * radius) / cell)
    place = rng.integers(low, high + 1)
    step = rng.integers(-1, 2, 2) * (rng.random() < 0.5)
    fill = tuple(int(value) for value in rng.integers(150, 225, 3))
    ink, side = tuple(int(value) for value in rng.integers(10, 60, 3)), int(rng.choice([-1, 1]))
    paper = _paper(rng, width, height)
    frames, masks = (export / kind / f"clip_{number:02d}" for kind in ("JPEGImages", "Annotations"))
    for folder in (frames, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for frame in range(int(rng.integers(3, 6))):   # at FPS: 0.75 to 1.25 s
        centre = np.clip(place + step * (frame // 2), low, high) * cell
        image, mask = paper.copy(), Image.new("L", paper.size)
        _mug(image, centre, radius, side, fill, ink)
        _mug(mask, centre, radius, side, None, 255, mask=True)
        image.reduce(_SCALE).save(frames / f"{frame:05d}.jpg", quality=92)
        index = Image.fromarray((np.asarray(mask.reduce(_SCALE)) > 127).astype(np.uint8), mode="P")
        index.putpalette(_PALETTE)
        index.save(masks / f"{frame:05d}.png")


def draw(folder: str | pathlib.Path, clips: int = CLIPS, general: int = GENERAL, known: int = KNOWN) -> None:
    """Draws the example into a folder."""
    export = pathlib.Path(folder) / "export"
    for number in range(clips):
        _clip(np.random.default_rng((SEED, number)), number, export)
    names = {f"clip_{number:02d}": {"1": LABEL} for number in range(clips)}
    (export / "davis_semantics.json").write_text(json.dumps(names, indent=1))
    world = dataclasses.replace(world_config.quickstart_world(), image_set_share=0.0)
    for split, number in (("general", general), ("known", known)):
        world_write.write(folder, world, SEED, number, split, has_masks=split == "known", progress=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data_pipelines.world.example FOLDER")
    draw(sys.argv[1])
    print(f"wrote {sys.argv[1]}: {CLIPS} clips of a {LABEL} in export, {GENERAL} examples in general, "
          f"{KNOWN} in known")
