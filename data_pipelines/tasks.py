"""What a run trains on, as plain data: tasks (one data folder each) and mixtures of tasks in groups.

`pretrain` and `sft` are the recipe's mixtures over the data sets that the paper names; launch.prepare makes
their folders from the published rows. Mixtures whose names start with theirs change one thing, for ablations.
`molmo_point` and those that start so are MolmoPoint's.

A mixture is a tuple of groups. A group has a share of the stream and splits it among its members in
proportion to the square roots of their sizes, unless a member overrides its size. Folders of your own need no
entry here: name them in pipeline.DataConfig.

Source: paper, section 3.3; reference: launch_scripts/sft.py.
"""

import dataclasses
import math
import os
from collections.abc import Collection, Mapping

from data_pipelines import annotations
from data_pipelines import sources
from molmo2_jax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: the folder that holds its annotations.jsonl and media (docs/data_format.md).

    schema, how: the schema that makes the folder from published rows (schemas.SCHEMAS), and its arguments.
    examples: its published size, after questions were grouped into trees; None where it is not known.
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
    root_size_factor: None: the size is sqrt(examples). 0: the size is 1. Below 1: sqrt(examples * factor).
      1 or more: an assumed number of examples, so the size is sqrt(factor).
    weight: replaces the loss weights of the examples (LossWeight), or only their scale (a number).
    high_res_share: share of single images that are cut into up to InputConfig.high_res_crops crops.
    point_modes: replace the modes of points (annotations.POINT_MODES); (): each annotation keeps its own.

    Raises:
      ValueError: a field is outside the range that its message states.
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
            raise ValueError(f"high_res_share must be in [0, 1]; got {self.high_res_share} for {self.task}")
        if not set(self.point_modes) <= set(annotations.POINT_MODES):
            raise ValueError(f"point_modes must be among {', '.join(annotations.POINT_MODES)}; "
                             f"got {self.point_modes} for {self.task}")

    def size(self, examples: int) -> float:
        """Returns the member's size, to which its share of the group is proportional."""
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
    """Members that split a share of the stream. The rates of a mixture's groups are normalised to sum to 1.

    Raises:
      ValueError: the rate is not positive and finite, or there is no member.
    """
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
      ValueError: a task appears twice (the reference silently keeps the last one).
    """
    found = sorted((member for group in mixture for member in group.members), key=lambda one: one.task)
    twice = {one.task for one, other in zip(found, found[1:], strict=False) if one.task == other.task}
    if twice:
        raise ValueError(f"a task must not appear twice in a mixture; got {sorted(twice)} more than once")
    return found


def rates(mixture: Mixture, examples: Mapping[str, int]) -> dict[str, float]:
    """Returns the share of each task; shares sum to 1. `examples` is the number of training examples of each.

    Raises:
      KeyError: `examples` lacks a task.
    """
    total = sum(group.rate for group in mixture)
    shares = {}
    for group in mixture:
        sizes = {member.task: member.size(examples[member.task]) for member in group.members}
        for task, size in sizes.items():
            shares[task] = group.rate / total * size / sum(sizes.values())
    return shares


def of_folders(folders: tuple[str | tuple[str, float | tuple[float, ...]], ...], num_lessons: int = 1,
               ) -> tuple[tuple[Mixture, ...], dict[str, Task]]:
    """Returns the mixture of data folders for each lesson, and their tasks, named after the folders.

    Folders with rates, as ("folder", 0.3) or ("folder", (0.3, 0.0)), have these shares, one per lesson; a
    folder with rate 0 is not used in that lesson. Without rates, shares follow from the sizes of the
    folders.

    Raises:
      ValueError: there is no folder, a folder appears twice, only some folders have a rate, a rate is
        negative, or a tuple of rates does not have one rate per lesson.
    """
    if not folders:
        raise ValueError("train must name a mixture or at least one data folder; got none")
    has_rate = [not isinstance(folder, str) for folder in folders]
    if any(has_rate) and not all(has_rate):
        raise ValueError(f"either all data folders must have a rate or none; got {folders}")
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


def mixtures_of(train: str | tuple[str | tuple[str, float | tuple[float, ...]], ...], num_lessons: int = 1,
                root: str = "") -> tuple[tuple[Mixture, ...], dict[str, Task]]:
    """Returns the mixture of each lesson and the tasks they name, for a key of MIXTURES or data folders.

    root: a folder or an address, with which the folders of TASKS begin; data folders are as they are given.

    Raises:
      ValueError: as of_folders.
    """
    if isinstance(train, str):
        return (MIXTURES[train],) * num_lessons, {
            name: dataclasses.replace(task, folder=os.path.join(root, task.folder))
            for name, task in TASKS.items()}
    return of_folders(train, num_lessons)


def missing(mixture: Mixture, tasks: Mapping[str, Task]) -> list[str]:
    """Returns the tasks of a mixture whose folder has neither annotations.jsonl nor shards, sorted."""
    return [one.task for one in members(mixture)
            if not sources.is_data(tasks[one.task].folder)]


def without(mixture: Mixture, tasks: Collection[str]) -> Mixture:
    """Returns the mixture without the members that use `tasks`, and without groups that this empties."""
    left = [tuple(member for member in group.members if member.task not in tasks) for group in mixture]
    return tuple(dataclasses.replace(group, members=found)
                 for group, found in zip(mixture, left, strict=True) if found)


def _refuse_twice(names) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"a data folder must not appear twice; got {list(names)}")


def _task(name: str, schema: str, examples: int | None = None, **how) -> tuple[str, Task]:
    return name, Task(folder=f"data/{name}", schema=schema, how=tuple(how.items()), examples=examples)


_VIDEO_SETS = {  # name: schema, its arguments
    "tgif": ("tgif", {}), "tvqa_with_sub": ("tvqa", {}), "paxion": ("paxion", {}),
    "moments_in_time_qa": ("label", {"style": "moments_in_time_label"}), "kinetics_qa": ("label", {}),
    "llava_video_academic": ("llava_video", {}),
    "llava_video_academic_mc": ("llava_video", {"style": "video_multiple_choice"}),
    "perception_test": ("perception_test", {}), "cinepile": ("cinepile", {}),
    "qv_highlights": ("qv_highlights", {}), "activity_net": ("activity_net", {}),
    "activity_net_qa": ("joined_qa", {}), "video_localized_narratives": ("localized_narratives", {}),
    "video_localized_narratives_caption": ("actor_captions", {}), "next_qa": ("options_qa", {}),
    "news_video_qa": ("first_answer", {}), "how2qa": ("how2qa", {}),
    "traffic_qa": ("options_qa", {"question": "q_body", "options": "option0 option1 option2 option3"}),
    "social_iq2": ("options_qa", {"question": "q", "options": "a0 a1 a2 a3", "answer": "answer_idx"}),
    "sports_qa": ("video_qa", {}), "clevrer": ("clevrer", {}), "funqa": ("funqa", {}), "star": ("star", {}),
    "intent_qa": ("options_qa", {"openly": True}), "road_text_vqa": ("first_answer", {}),
    "countix": ("countix", {}), "camerabench": ("camerabench", {}), "motionbench": ("motion_caption", {}),
    "charades_sta": ("charades_sta", {}),
    "coin": ("activity_net", {"column": "annotation", "style": "coin_label"}),
    "youcook2": ("youcook2", {}), "ego4d": ("ego4d", {}), "epic_kitchens": ("epic_kitchens", {}),
}
_IMAGE_SETS = ("vqa2 text_vqa okvqa doc_qa info_qa st_qa tally_qa plot_qa figure_qa dv_qa tabwmp_da").split()
_COSYN = "chart chemical diagram math music table".split()     # asked with explanations; documents without
_MULTIDOC = "chart chemical diagram doc music table".split()
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
    _task("molmo2_video_point_oversampled", "video_point", oversampled=True),
    _task("molmo2_video_point_whole", "video_point", oversampled=True, longest=math.inf),
    _task("academic_video_point", "academic_video_point", 44_000),
    _task("pixmo_multi_points", "multi_image_point", 470_000),
    _task("pixmo_points", "pixmo_points", 530_000, method="pointing"),
    _task("pixmo_points_high_frequency", "pixmo_points", method="counting"),
    _task("pixmo_count", "pixmo_count", 74_000),
    _task("cosyn_point", "cosyn_point", 68_000),
    _task("molmo_point_gui", "gui_point", 36_192),
    _task("molmo_point_track_any", "tracks", 34_874),
    _task("molmo_point_track_syn", "tracks", 76_165),
    _task("tulu", "tulu", 980_000),
    _task("tulu_short", "tulu", most_first_tokens=2304),
    _task("hardcodes", "hardcodes", media_folder="media"),
    *(_task(name, schema, _SIZES.get(name), **how) for name, (schema, how) in _VIDEO_SETS.items()),
    *(_task(name, "vqa", _SIZES.get(name), style=name) for name in _IMAGE_SETS),
    *(_task(f"cosyn_{kind}", "cosyn", kind=kind) for kind in (*_COSYN, "circuit", "graphic")),
    _task("cosyn_document", "cosyn", kind="document", explained=False),
    *(_task(f"cosyn_multidoc_{kind}", "cosyn", kind=kind) for kind in _MULTIDOC),
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
# Video points by number of points: fixed shares, independent of the sizes (root_size_factor 0).
_VIDEO_POINT_SHARES = {"molmo2_video_point_0_5": 0.4, "molmo2_video_point_6_25": 0.3,
                       "molmo2_video_point_26_60": 0.1, "academic_video_point": 0.2}
_TRACK_SHARES = {group: share for group, (share, _, _) in _TRACKS.items()}


def _tracking(rate: float, shares: Mapping[str, float], *more: Member) -> Group:
    total = sum(shares.values())
    return Group(rate=rate, members=(*(
        Member(task=f"{name}_{group}", sampling_rate=shares[group] / total, weight=_POINTING,
               root_size_factor=30_000 if name == "vicas" else None)
        for group, (_, _, names) in _TRACKS.items() for name in names.split()), *more))


def _video_pointing(rate: float, shares: Mapping[str, float]) -> Group:
    return Group(rate=rate, members=tuple(
        Member(task=name, sampling_rate=share, root_size_factor=0, weight=_POINTING)
        for name, share in shares.items()))


def _image_pointing(rate: float) -> Group:
    return Group(rate=rate, members=(
        Member(task="pixmo_multi_points", root_size_factor=200_000, weight=_POINTING),
        *_members(_IMAGE_POINTING, weight=_POINTING, high_res_share=0.3)))


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
                                           *_MANTIS, *(f"cosyn_{kind}" for kind in (*_COSYN, "document")),
                                           *(f"cosyn_multidoc_{kind}" for kind in _MULTIDOC)))),
        _tracking(0.15, _TRACK_SHARES), _video_pointing(0.15, _VIDEO_POINT_SHARES), _image_pointing(0.1),
        Group(rate=0.0995, members=_members(["tulu"])),
        Group(rate=0.0005, members=_members(["hardcodes"]))),
    "molmo_point_gui": (Group(rate=1.0, members=(Member(task="molmo_point_gui"),)),),
}

# MolmoPoint: less grounding than `sft`, video points in one set with repetitions, and two more sets of
# tracks. In stage 3 video points are asked about whole videos.
_POINT_TRACK_SHARES = _TRACK_SHARES | {"track": 0.45, "track_tail": 0.07}
_POINT_TRACKS = tuple(
    Member(task=name, sampling_rate=0.45 / sum(_POINT_TRACK_SHARES.values()), weight=_POINTING,
           root_size_factor=assumed)
    for name, assumed in (("molmo_point_track_any", None), ("molmo_point_track_syn", 10_000)))
MIXTURES |= {name: (
    *MIXTURES["sft"][:3], _tracking(0.12, _POINT_TRACK_SHARES, *_POINT_TRACKS),
    _video_pointing(0.11, {points: 0.8, "academic_video_point": 0.2}), _image_pointing(0.07),
    *MIXTURES["sft"][6:]) for name, points in (
        ("molmo_point", "molmo2_video_point_oversampled"),
        ("molmo_point_long_context", "molmo2_video_point_whole"))}


def _changed(mixture: Mixture, tasks: Collection[str], **fields) -> Mixture:
    """Returns the mixture with `fields` replaced in the members that use `tasks`."""
    return tuple(dataclasses.replace(group, members=tuple(
        dataclasses.replace(member, **fields) if member.task in tasks else member
        for member in group.members)) for group in mixture)


# Ablations of the paper (Tables 8 to 10 and 18): each changes or removes one thing.
_SFT, _PRETRAIN = MIXTURES["sft"], MIXTURES["pretrain"]
MIXTURES |= {
    "sft_even_weights": _changed(_SFT, TASKS, weight=types.LossWeight(
        scale=1.0, by_length=False, by_branches=False)),
    "sft_counts_as_they_come": _changed(_SFT, _VIDEO_POINT_SHARES, sampling_rate=1.0, root_size_factor=None),
    "sft_counts_without_points": _changed(_SFT, _VIDEO_POINT_SHARES, point_modes=("count",)),
    "sft_tracks_without_points": without(_SFT, {*_VIDEO_POINT_SHARES, *_IMAGE_POINTING,
                                                "pixmo_multi_points"}),
    "sft_captions_without_video_qa": without(_SFT, {"molmo2_cap_qa", "molmo2_subtitle_qa", "molmo2_human_qa",
                                                    *_VIDEO_SETS}),
    "pretrain_without_pointing": without(_PRETRAIN, _IMAGE_POINTING),
}
