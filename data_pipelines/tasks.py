"""What a run trains on, as plain data: tasks (one data folder each) and mixtures of them in groups.

`pretrain` and `sft` are the recipe's mixtures, over the data sets that the paper names; schemas.convert makes
their folders of the published rows. Mixtures named after them differ in one thing, for ablations.

A mixture is a tuple of groups. A group has a share of the stream, and divides it among its members by the
square roots of their sizes unless a member says otherwise. To train on folders of your own no entry is
needed here: name the folders in pipeline.DataConfig.

Source: paper, section 3.3; reference: launch_scripts/sft.py.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from data_pipelines import annotations
from molmo2_jax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: the folder that holds its annotations.jsonl and media (docs/data_format.md).

    schema, how: what made the folder of published rows (schemas.convert), and its further arguments.
    examples: its published size, after trees were built; None where it is not known.
    """
    folder: str
    schema: str | None = None
    how: tuple[tuple[str, str | float], ...] = ()
    examples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """How a mixture uses a task.

    task: a key of TASKS.
    sampling_rate: multiplies the member's size within its group.
    root_size_factor: None: the size is sqrt(examples); 0: 1; below 1: sqrt(examples * factor); from 1 on a
      pretend number of examples, sqrt(factor).
    weight: replaces the loss weights of the examples (LossWeight), or only their scale (a number).
    high_res_share: of single images that are cut into up to InputConfig.high_res_crops crops.
    point_modes: take the place of the modes of points (annotations.POINT_MODES); (): their own.
    """
    task: str
    sampling_rate: float = 1.0
    root_size_factor: float | None = None
    weight: types.LossWeight | float | None = None
    high_res_share: float = 0.0
    point_modes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.sampling_rate > 0:
            raise ValueError(f"sampling_rate must be > 0; got {self.sampling_rate} for {self.task}")
        if self.root_size_factor is not None and not self.root_size_factor >= 0:
            raise ValueError(f"root_size_factor must be >= 0; got {self.root_size_factor} for {self.task}")
        if not 0 <= self.high_res_share <= 1:
            raise ValueError(f"high_res_share must lie in [0, 1]; got {self.high_res_share} for {self.task}")
        if not set(self.point_modes) <= set(annotations.POINT_MODES):
            raise ValueError(f"point_modes must be of {', '.join(annotations.POINT_MODES)}; "
                             f"got {self.point_modes} for {self.task}")

    def size(self, examples: int) -> float:
        """Returns what the member weighs within its group."""
        factor = self.root_size_factor
        if factor is None:
            size = math.sqrt(examples)
        elif factor == 0:
            size = 1.0
        else:
            size = math.sqrt(factor if factor >= 1 else examples * factor)
        return size * self.sampling_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Members that divide a share of the stream; the rates of all groups are normalised to 1."""
    rate: float
    members: tuple[Member, ...]

    def __post_init__(self):
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"the rate of a group must be > 0; got {self.rate}")
        if not self.members:
            raise ValueError("a group must have at least one member; got none")


Mixture = tuple[Group, ...]


def members(mixture: Mixture) -> list[Member]:
    """Returns all members, sorted by task: the order in which the stream numbers its data sets.

    Raises:
      ValueError: a task appears twice (the reference keeps the last and says nothing).
    """
    found = sorted((member for group in mixture for member in group.members), key=lambda one: one.task)
    twice = {one.task for one, other in zip(found, found[1:], strict=False) if one.task == other.task}
    if twice:
        raise ValueError(f"a task may appear once in a mixture; {sorted(twice)} appear more often")
    return found


def rates(mixture: Mixture, examples: Mapping[str, int]) -> dict[str, float]:
    """Returns the share of each task, adding up to 1; `examples` counts the training examples of each."""
    total = sum(group.rate for group in mixture)
    shares = {}
    for group in mixture:
        sizes = {member.task: member.size(examples[member.task]) for member in group.members}
        for task, size in sizes.items():
            shares[task] = group.rate / total * size / sum(sizes.values())
    return shares


def of_folders(folders: tuple[str | tuple[str, float | tuple[float, ...]], ...], num_lessons: int = 1,
               ) -> tuple[tuple[Mixture, ...], dict[str, Task]]:
    """Returns the mixture of data folders in each lesson, and their tasks, named after the folders.

    Folders with rates, as ("folder", 0.3) or ("folder", (0.3, 0.0)), have these shares, one per lesson;
    a folder with rate 0 rests. Without rates, shares follow from the sizes of the folders.

    Raises:
      ValueError: there is no folder, only some of them have a rate, or a tuple of rates has another length
        than there are lessons.
    """
    if not folders:
        raise ValueError("train must name a mixture or at least one data folder; got none")
    has_rate = [not isinstance(folder, str) for folder in folders]
    if any(has_rate) and not all(has_rate):
        raise ValueError(f"either all data folders have a rate or none has; got {folders}")
    if not all(has_rate):
        tasks = {folder: Task(folder=folder) for folder in folders}
        _refuse_twice(folders)
        return ((Group(rate=1.0, members=tuple(Member(task=task) for task in tasks)),),) * num_lessons, tasks
    names = [str(folder) for folder, _ in folders]
    _refuse_twice(names)
    rates_of = {name: rate if isinstance(rate, tuple) else (rate,) * num_lessons
                for name, (_, rate) in zip(names, folders, strict=True)}
    for name, lesson_rates in rates_of.items():
        if len(lesson_rates) != num_lessons or min(lesson_rates) < 0:
            raise ValueError(f"a folder must have one rate >= 0 for each of the {num_lessons} lessons; got "
                             f"{lesson_rates} for {name}")
    mixtures = tuple(tuple(Group(rate=rates_of[name][lesson], members=(Member(task=name),))
                           for name in names if rates_of[name][lesson] > 0) for lesson in range(num_lessons))
    return mixtures, {name: Task(folder=name) for name in names}


def _refuse_twice(names) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"a data folder may appear once; got {list(names)}")


def _task(name: str, schema: str, examples: int | None = None, **how) -> tuple[str, Task]:
    return name, Task(folder=f"data/{name}", schema=schema, how=tuple(how.items()), examples=examples)


_VIDEO_SETS = {  # name: schema, its arguments
    "tgif": ("tgif", {}), "tvqa_with_sub": ("tvqa", {}), "paxion": ("video_choice", {}),
    "moments_in_time_qa": ("label", {"style": "moments_in_time_label"}), "kinetics_qa": ("label", {}),
    "llava_video_academic": ("llava_video", {}),
    "llava_video_academic_mc": ("llava_video", {"style": "video_multiple_choice"}),
    "perception_test": ("perception_test", {}), "cinepile": ("cinepile", {}),
    "qv_highlights": ("qv_highlights", {}), "activity_net": ("activity_net", {}),
    "activity_net_qa": ("video_qa", {}), "video_localized_narratives": ("video_qa", {}),
}
_IMAGE_SETS = ("vqa2 text_vqa okvqa doc_qa info_qa st_qa tally_qa plot_qa figure_qa dv_qa tabwmp_da").split()
_COSYN = "chart chemical circuit diagram doc graphic music table".split()
_MANTIS = "nlvr2 llava_665k_multi spot_the_diff".split()
_TRACKS = {  # group: (share, configuration of the rows, sources)
    "track": (0.4, "track", "mevis ref_yt_vos lv_vis vicas revos molmo2_video_track"),
    "track_tail": (0.05, "track", "burst ref_davis17 yt_vis moca"),
    "ground": (0.2, "ground", "mevis lv_vis vicas revos molmo2_video_track"),
    "ground_tail": (0.01, "ground", "burst moca"),
    "single_point": (0.15, "single_point_track", "mevis lv_vis vicas revos molmo2_video_track"),
    "boxes": (0.2, "single_point_track", "webuav got10k vasttrack trackingnet"),
    "boxes_tail": (0.1, "single_point_track",
                   "burst lvosv1 lvosv2 lasot uwcot webuot latot tnl2k tnllt"),
}
_SIZES = {"tgif": 63_000, "tvqa_with_sub": 120_000, "paxion": 440_000, "moments_in_time_qa": 710_000,
          "kinetics_qa": 420_000, "video_localized_narratives": 56_000, "vqa2": 83_000, "tally_qa": 130_000,
          "llava_665k_multi": 160_000}

TASKS: dict[str, Task] = {"shapes": Task(folder="runs/quickstart/data/clips")} | dict((
    _task("pixmo_cap", "pixmo_cap", 710_000),
    _task("pixmo_cap_with_transcripts", "pixmo_cap", 710_000, transcripts=True),
    _task("pixmo_ask_model_anything", "ask_model_anything", 71_000),
    _task("pixmo_cap_qa", "cap_qa", 190_000),
    _task("molmo2_multi_image_qa", "multi_image_qa", 45_000),
    _task("molmo2_human_qa", "human_qa", 43_000),
    _task("molmo2_cap", "molmo2_cap", 100_000),
    _task("molmo2_cap_qa", "video_choice", 190_000),
    _task("molmo2_subtitle_qa", "video_choice", 100_000),
    _task("chart_qa", "chart_qa"),
    _task("a_okvqa", "a_okvqa"),
    _task("ai2d", "ai2d"),
    _task("science_qa", "science_qa"),
    _task("molmo2_video_point_0_5", "video_point", fewest=0, most=5),
    _task("molmo2_video_point_6_25", "video_point", fewest=6, most=25),
    _task("molmo2_video_point_26_60", "video_point", fewest=26, most=60),
    _task("academic_video_point", "academic_video_point", 44_000),
    _task("pixmo_multi_points", "multi_image_point", 470_000),
    _task("pixmo_points", "pixmo_points", 530_000, method="pointing"),
    _task("pixmo_points_high_frequency", "pixmo_points", method="counting"),
    _task("pixmo_count", "pixmo_count", 74_000),
    _task("cosyn_point", "cosyn_point", 68_000),
    _task("tulu", "tulu", 980_000),
    _task("tulu_short", "tulu", most_first_tokens=2304),
    _task("hardcodes", "hardcodes", media_folder="media"),
    *(_task(name, schema, _SIZES.get(name), **how) for name, (schema, how) in _VIDEO_SETS.items()),
    *(_task(name, "vqa", _SIZES.get(name), style=name) for name in _IMAGE_SETS),
    *(_task(f"cosyn_{kind}", "cosyn", kind=kind) for kind in _COSYN),
    *(_task(name, "mantis", _SIZES.get(name)) for name in _MANTIS),
    *(_task(f"{name}_{group}", "tracks", config=kind)
      for group, (_, kind, names) in _TRACKS.items() for name in names.split()),
))

_POINTING = types.LossWeight(scale=0.2, by_length=False, by_branches=False)
_CAPTIONS = types.LossWeight(scale=0.1, by_length=False, by_branches=False)
_PRETEND = {"tgif": 60_000, "tvqa_with_sub": 60_000, "paxion": 60_000, "moments_in_time_qa": 60_000,
            "kinetics_qa": 60_000, "dv_qa": 10_000, "figure_qa": 10_000, "plot_qa": 20_000}


def _members(names, **how) -> tuple[Member, ...]:
    return tuple(Member(task=name, root_size_factor=_PRETEND.get(name), **how) for name in names)


_IMAGE_POINTING = ("pixmo_points", "pixmo_count", "pixmo_points_high_frequency", "cosyn_point")
# Video points by their number: fixed shares, whatever the sizes (root_size_factor 0).
_VIDEO_POINT_SHARES = {"molmo2_video_point_0_5": 0.4, "molmo2_video_point_6_25": 0.3,
                       "molmo2_video_point_26_60": 0.1, "academic_video_point": 0.2}

MIXTURES: dict[str, Mixture] = {
    "shapes": (Group(rate=1.0, members=(Member(task="shapes"),)),),
    "pretrain": (
        Group(rate=0.6, members=_members(["pixmo_cap_with_transcripts"])),
        Group(rate=0.3, members=_members(_IMAGE_POINTING)),
        Group(rate=0.1, members=_members(["tulu_short"]))),
    "sft": (
        Group(rate=0.15, members=(
            *_members(("pixmo_ask_model_anything", "pixmo_cap_qa", "molmo2_multi_image_qa",
                       "molmo2_human_qa")),
            Member(task="pixmo_cap", root_size_factor=100_000),
            Member(task="molmo2_cap", sampling_rate=1.5, weight=_CAPTIONS))),
        Group(rate=0.2, members=_members(("molmo2_cap_qa", "molmo2_subtitle_qa", *_VIDEO_SETS))),
        Group(rate=0.25, members=_members(("chart_qa", "a_okvqa", "ai2d", "science_qa", *_IMAGE_SETS,
                                           *_MANTIS, *(f"cosyn_{kind}" for kind in _COSYN)))),
        Group(rate=0.15, members=tuple(
            Member(task=f"{name}_{group}", sampling_rate=share / 1.11, weight=_POINTING,
                   root_size_factor=30_000 if name == "vicas" else None)
            for group, (share, _, names) in _TRACKS.items() for name in names.split())),
        Group(rate=0.15, members=tuple(
            Member(task=name, sampling_rate=share, root_size_factor=0, weight=_POINTING)
            for name, share in _VIDEO_POINT_SHARES.items())),
        Group(rate=0.1, members=(
            Member(task="pixmo_multi_points", root_size_factor=200_000, weight=_POINTING),
            *_members(_IMAGE_POINTING, weight=_POINTING, high_res_share=0.3))),
        Group(rate=0.0995, members=_members(["tulu"])),
        Group(rate=0.0005, members=_members(["hardcodes"]))),
}


def _changed(mixture: Mixture, tasks: Collection[str], **fields) -> Mixture:
    """Returns the mixture with other fields of the members that use `tasks`."""
    return tuple(dataclasses.replace(group, members=tuple(
        dataclasses.replace(member, **fields) if member.task in tasks else member
        for member in group.members)) for group in mixture)


def _without(mixture: Mixture, tasks: Collection[str]) -> Mixture:
    """Returns the mixture without the groups all of whose members use `tasks`, and without those members."""
    left = [tuple(member for member in group.members if member.task not in tasks) for group in mixture]
    return tuple(dataclasses.replace(group, members=found)
                 for group, found in zip(mixture, left, strict=True) if found)


# What the paper leaves out of its recipe, or does otherwise, one thing at a time (Tables 8 to 10 and 18).
_SFT, _PRETRAIN = MIXTURES["sft"], MIXTURES["pretrain"]
MIXTURES |= {
    "sft_even_weights": _changed(_SFT, TASKS, weight=types.LossWeight(
        scale=1.0, by_length=False, by_branches=False)),
    "sft_counts_as_they_come": _changed(_SFT, _VIDEO_POINT_SHARES, sampling_rate=1.0, root_size_factor=None),
    "sft_counts_without_points": _changed(_SFT, _VIDEO_POINT_SHARES, point_modes=("count",)),
    "sft_tracks_without_points": _without(_SFT, {*_VIDEO_POINT_SHARES, *_IMAGE_POINTING,
                                                 "pixmo_multi_points"}),
    "sft_captions_without_video_qa": _without(_SFT, {"molmo2_cap_qa", "molmo2_subtitle_qa", "molmo2_human_qa",
                                                     *_VIDEO_SETS}),
    "pretrain_without_pointing": _without(_PRETRAIN, _IMAGE_POINTING),
}
