"""What a run trains on, as plain data: tasks (one data folder each) and mixtures of them in groups.

A mixture is a tuple of groups. A group has a share of the stream, and divides it among its members by the
square roots of their sizes unless a member says otherwise. To train on folders of your own no entry is
needed here: name the folders in pipeline.DataConfig.

Source: paper, section 3.3; reference: launch_scripts/sft.py.
"""

import dataclasses
import math
from collections.abc import Mapping

from molmo2_jax import types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: the folder that holds its annotations.jsonl and media (docs/data_format.md)."""
    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """How a mixture uses a task.

    task: a key of TASKS.
    sampling_rate: multiplies the member's size within its group.
    root_size_factor: None: the size is sqrt(examples); 0: 1; below 1: sqrt(examples * factor); from 1 on a
      pretend number of examples, sqrt(factor).
    weight: replaces the loss weights of the examples (LossWeight), or only their scale (a number).
    high_res_share: of single images that are cut into up to InputConfig.high_res_crops crops.
    """
    task: str
    sampling_rate: float = 1.0
    root_size_factor: float | None = None
    weight: types.LossWeight | float | None = None
    high_res_share: float = 0.0

    def __post_init__(self):
        if not self.sampling_rate > 0:
            raise ValueError(f"sampling_rate must be > 0; got {self.sampling_rate} for {self.task}")
        if self.root_size_factor is not None and not self.root_size_factor >= 0:
            raise ValueError(f"root_size_factor must be >= 0; got {self.root_size_factor} for {self.task}")
        if not 0 <= self.high_res_share <= 1:
            raise ValueError(f"high_res_share must lie in [0, 1]; got {self.high_res_share} for {self.task}")

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


TASKS: dict[str, Task] = {
    "shapes": Task(folder="runs/quickstart/data/clips"),
}

MIXTURES: dict[str, Mixture] = {
    "shapes": (Group(rate=1.0, members=(Member(task="shapes"),)),),
}
