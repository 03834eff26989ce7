"""Settings of a drawn world and of the questions about it, and the worlds that the quickstart trains on."""

import dataclasses
from typing import Literal

from data_pipelines.world import asker as asker_lib
from data_pipelines.world import scene as scene_lib
from molmo2_jax import config as configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The look of the drawn world and the questions about it. Ranges include both ends.

    Raises:
      ValueError: a field breaks the rule that its message states.
    """
    objects: tuple[int, int] = (1, 6)
    object_rates: tuple[float, ...] = ()   # of each number of objects, smallest first; (): equal rates
    kinds: tuple[str, ...] = scene_lib.KINDS
    colours: tuple[str, ...] = tuple(scene_lib.COLOURS)
    unique: Literal["colour", "phrase", "none"] = "phrase"   # what two objects of a scene never share
    radius: tuple[float, float] = (0.08, 0.2)                # of the short side
    speed: tuple[float, float] = (0.0, 0.4)                  # short sides per second
    lattice: float | None = None   # centres rest on multiples of this share of the sides and hop between them
    is_apart: bool = False                                   # objects never touch
    leave_share: float = 0.2                                 # of the objects that cross the border
    frame_side: tuple[int, int] = (96, 192)                  # pixels; sides drawn independently, made even
    fps: tuple[int, ...] = (6, 8, 10, 12, 15, 24)
    duration: tuple[float, float] = (2.0, 6.0)               # seconds
    gop: tuple[int, int] = (4, 48)                           # frames between keyframes
    vfr_share: float = 0.1                                   # of the videos with a variable frame rate
    texture: float = 0.6                                     # of the background, 0 to 1
    tone: tuple[float, float] = (50.0, 200.0)                # of the background, grey levels
    tint: float = 14.0                                       # largest deviation of its colour from grey
    image_share: float = 0.2                                 # of the examples that are one still
    image_set_share: float = 0.1                             # of the examples that are several stills
    images_per_set: tuple[int, int] = (2, 4)
    branches: tuple[int, int] = (3, 8)                       # annotations per example
    annotations: tuple[tuple[str, float], ...] = (
        ("points", 4.0), ("tracks", 2.0), ("count", 1.0), ("choice", 2.0), ("qa", 1.0), ("caption", 0.5))
    phrases: tuple[str, ...] = asker_lib.PHRASE_FORMS
    point_modes: tuple[str, ...] = ("bare", "point_count")
    point_time: Literal["first", "random"] = "first"         # which grid time at which it is well visible
    absent_share: float = 0.1                                # of the examples may ask for absent objects

    def __post_init__(self):
        for name in ("objects", "radius", "speed", "frame_side", "duration", "gop", "images_per_set",
                     "branches"):
            low, high = getattr(self, name)
            configs.require(0 <= low <= high, f"{name} must be a range 0 <= low <= high", (low, high))
        configs.require(self.lattice is None or 0 < self.lattice <= 0.25, "lattice must be in (0, 0.25]",
                        self.lattice)
        configs.require(self.objects[0] >= 1, "objects must be >= 1", self.objects)
        configs.require(len(self.object_rates) in (0, self.objects[1] - self.objects[0] + 1)
                        and min(self.object_rates, default=1) >= 0 and sum(self.object_rates or (1,)) > 0,
                        "object_rates must give a rate >= 0 to each number of objects", self.object_rates)
        configs.require(self.radius[0] > 0 and self.radius[1] * scene_lib.REACH < 0.5,
                        "radius must be > 0 and fit in the frame (below 0.4)", self.radius)
        configs.require(self.frame_side[0] >= 32, "frame_side must be >= 32 pixels", self.frame_side)
        configs.require(self.duration[0] >= 0.5, "duration must be >= 0.5 seconds", self.duration)
        configs.require(self.gop[0] >= 1, "gop must be >= 1 frame", self.gop)
        for name, known in (("kinds", scene_lib.KINDS), ("colours", tuple(scene_lib.COLOURS)),
                            ("phrases", asker_lib.PHRASE_FORMS),
                            ("point_modes", ("bare", "point_count", "count_point", "count"))):
            values = getattr(self, name)
            configs.require(values and set(values) <= set(known), f"{name} must be some of {known}", values)
        kinds = dict(self.annotations)
        configs.require(set(kinds) <= set(asker_lib.ANNOTATION_KINDS) and sum(kinds.values()) > 0
                        and min(kinds.values()) >= 0,
                        f"annotations must give rates >= 0 of {asker_lib.ANNOTATION_KINDS}",
                        self.annotations)
        configs.require(self.unique in ("colour", "phrase", "none"), "unique must be colour, phrase or none",
                        self.unique)
        configs.require(self.point_time in ("first", "random"), "point_time must be first or random",
                        self.point_time)
        available = {"colour": len(self.colours), "phrase": len(self.colours) * len(self.kinds)}
        configs.require(self.objects[1] <= available.get(self.unique, self.objects[1]),
                        f"objects must not exceed the different {self.unique}s", self.objects)


def quickstart_world() -> WorldConfig:
    """Returns a world of one large object, sometimes two, of four colours, that rest or hop on a lattice.

    It can be learnt from scratch in minutes on two cores, through the same code as real data. Which of two
    objects was asked for is hardly learnt in that time (benchmarks/README.md), so two objects are rarer.
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

    A model first learns to point, with one object in stills and clips of two frames; then which of two
    objects was asked for; then whole clips with tracks, counts and choices.
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
    """Returns a world of one to six objects that rest or hop on a lattice, cross, occlude, enter and leave.

    Without the lattice, an hour on two cores taught which object is meant, but not its position to better
    than 0.05 of the frame (benchmarks/README.md).
    """
    return WorldConfig(colours=("red", "green", "blue", "yellow", "purple", "cyan"), unique="colour",
                       radius=(0.14, 0.22), lattice=0.1, texture=0.4, tone=(70.0, 150.0),
                       fps=(6, 8, 10, 12, 15), duration=(1.5, 5.0))


def full_lessons() -> dict[str, tuple[WorldConfig, int]]:
    """Returns name -> (world, number of examples) of a curriculum of the full world, the easiest first.

    For a model that can point at one object: first which of two objects (of six colours) was asked for, at
    rest on a lattice; then up to three that stay apart; then the full world.
    """
    world = full_world()
    two = dataclasses.replace(quickstart_lessons()["two"][0], colours=world.colours)
    few = dataclasses.replace(world, objects=(1, 3), radius=(0.15, 0.22), is_apart=True, leave_share=0.0,
                              texture=0.3, duration=(0.5, 2.0), absent_share=0.0)
    return {"two": (two, 8000), "few": (few, 10000), "many": (world, 16000)}


# Name -> (world, lessons) of a drawn world.
WORLDS = {"quickstart": (quickstart_world, quickstart_lessons), "full": (full_world, full_lessons)}
