"""Reads the collectives of a compiled XLA program: bytes, number of runs, and groups of devices."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "s64": 8, "u64": 8, "f64": 8}


GATHER_BY_SUM = "all-gather by all-reduce"
_MESSAGE = re.compile(r"= \((\w+)\[([\d,]*)\].*? send\(.*_xla_host_transfer_rendezvous=\"("
                      + "|".join(_KINDS) + ")")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program."""
    kind: str
    size: int                       # bytes of its larger side on one device
    group: int                      # devices that take part in it together
    times: int                      # runs per step
    spans_slices: bool
    shapes: tuple[tuple[int, ...], ...]     # of its result
    width: int = 4                          # bytes of a value, of the largest array
    members: tuple[int, ...] = ()           # the first group
    pairs: tuple[tuple[int, int], ...] = ()     # source and target, of a collective-permute

    @property
    def traffic(self) -> float:
        """Bytes that a device sends in a step, by the usual ring algorithms."""
        factor = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.size * factor * (2 if self.kind in ("all-reduce", GATHER_BY_SUM) else 1)


def collectives(text: str, devices_per_slice: int) -> dict[str, float]:
    """Returns bytes per step by network and kind, such as "ici all-gather", of a compiled program."""
    return totals(find_collectives(text, devices_per_slice))


def totals(found: Iterable[Collective]) -> dict[str, float]:
    """Returns bytes per step by network and kind, such as "ici all-gather"."""
    added: dict[str, float] = collections.defaultdict(float)
    for one in found:
        added[f"{'dcn' if one.spans_slices else 'ici'} {one.kind}"] += one.traffic
    return dict(added)


def find_collectives(text: str, devices_per_slice: int) -> list[Collective]:
    """Returns the collectives of a compiled program; those with groups of one device are left out.

    The compiler writes a reduce-scatter as an all-reduce in a fusion named all-reduce-scatter, and traffic
    between slices as messages of each chip to the host's runtime, counted as between two slices. It may also
    gather by summing parts that are padded with zeros: twice the traffic (GATHER_BY_SUM).
    """
    bodies = _computations(text)
    made, callers = _definitions(bodies), _callers(bodies)
    times, found = _times(bodies), []
    for name, lines in bodies.items():
        if _is_repeated(name, callers):
            continue
        for line in lines:
            sent = _MESSAGE.search(line)
            if sent and times[name]:
                dims, kind = tuple(map(int, filter(None, sent[2].split(",")))), sent[3]
                size = _WIDTH.get(sent[1], 4) * math.prod(dims) * (1 if kind == "all-reduce" else 2)
                found.append(Collective(kind, size, 2, times[name], True, (dims,), _WIDTH.get(sent[1], 4)))
            match = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
            if not match or not times[name]:
                continue
            kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
            if kind == "all-reduce" and _origin(line, name, made, callers) == "dynamic-update-slice":
                kind = GATHER_BY_SUM
            arrays = [(width, tuple(map(int, filter(None, dims.split(",")))))
                      for width, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
            sizes = [_WIDTH.get(width, 4) * math.prod(dims) for width, dims in arrays]
            size = max(sizes) if match[3] or kind == "collective-permute" else sum(sizes)
            pairs = _pairs(line) if kind == "collective-permute" else ()
            members = pairs[0] if pairs else _members(line)
            group = len(set(members))
            spans = any(len({device // devices_per_slice for device in some}) > 1
                        for some in pairs or (members,))
            if kind == "reduce-scatter" and match[2] == "reduce-scatter":
                size *= group
            if group > 1:
                width = max(zip(sizes, (_WIDTH.get(width, 4) for width, _ in arrays)))[1]
                found.append(Collective(kind, size, group, times[name], spans,
                                        tuple(dims for _, dims in arrays), width, members, pairs))
    return found


def _is_repeated(name: str, callers) -> bool:
    """Returns whether a computation repeats a collective that runs in the background.

    The compiler writes it in an async-collective-start, in each async_collective_fusion that overlaps with
    it, and in an async-collective-done.
    """
    call = callers[name][1].lstrip().removeprefix("ROOT ") if name in callers else ""
    return name.startswith("async_collective_fusion") or call.startswith("%async-collective-done")


def _computations(text: str) -> dict[str, list[str]]:
    bodies, name = {}, None
    for line in text.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if start:
            name = start[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                bodies[""] = [f"calls=%{name}"]
        elif name is not None:
            bodies[name].append(line)
    return bodies


_OPERATION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*?)\)")


def _definitions(bodies: dict[str, list[str]]) -> dict[tuple[str, str], str]:
    """Returns the line that defines each value, by (computation, value); the value "" is the result."""
    made = {}
    for body, lines in bodies.items():
        for line in lines:
            match = _OPERATION.match(line.strip())
            if match:
                made[body, match[1]] = line
                made |= {(body, ""): line} if line.lstrip().startswith("ROOT") else {}
    return made


def _callers(bodies: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """Returns (computation, line) of a caller of each computation that is called, loops excluded."""
    return {called: (body, line) for body, lines in bodies.items() if body for line in lines
            for called in re.findall(r"calls=%?([\w.\-]+)", line)}


def _origin(line: str, body: str, made, callers) -> str:
    """Returns the operation that produced the first operand of a line, looking through rearrangements."""
    def operand(line, number=0):
        return re.findall(r"%([\w.\-]+)", _OPERATION.match(line.strip())[3])[number]

    line = made.get((body, operand(line)), "")
    while line:
        operation = _OPERATION.match(line.strip())[2]
        called = re.search(r"calls=%?([\w.\-]+)", line)
        if operation in ("bitcast", "copy", "convert", "reshape", "transpose"):
            line = made.get((body, operand(line)), "")
        elif operation == "fusion" and called:
            body = called[1]
            line = made.get((body, ""), "")
        elif operation == "parameter" and body in callers:
            number, (body, call) = int(_OPERATION.match(line.strip())[3]), callers[body]
            line = made.get((body, operand(call, number)), "")
        else:
            return operation
    return ""


def _times(bodies: dict[str, list[str]]) -> collections.Counter:
    """Returns how often each computation runs in a step.

    The trip count of a loop is the only constant in its condition; with none or several, it counts once.
    """
    def length(line):
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        found = re.findall(r"constant\((\d+)\)", "".join(bodies.get(condition[1], ()) if condition else ()))
        return int(found[0]) if len(found) == 1 else 1

    calls = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            for what, called in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                calls[name].append((called, length(line) if what == "body" else 1))
            for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                calls[name] += [(called.strip().lstrip("%"), 1) for called in several.split(",")]
    times, waiting = collections.Counter(), [("", 1)]
    while waiting:
        name, factor = waiting.pop()
        times[name] += factor
        waiting += [(called, factor * count) for called, count in calls[name]]
    return times


def _members(line: str) -> tuple[int, ...]:
    """Returns the devices of the first group of a collective; () if none is named."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        ids = np.arange(int(iota[1]) * int(iota[2])).reshape(list(map(int, iota[3].split(","))))
        if iota[4]:
            ids = ids.transpose(list(map(int, iota[4].split(","))))
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    named = re.search(r"replica_groups=mesh\[(.*?)\]"
                      r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = np.arange(math.prod(map(int, axes.values())))
        if named[2]:
            ids = ids.reshape(list(map(int, named[2].split(","))))
            ids = ids.transpose(list(map(int, named[3].split(",")))) if named[3] else ids
        inside = re.findall(r"'(\w+)'", named[4])
        places = tuple(slice(None) if axis in inside else 0 for axis in axes)
        return tuple(ids.reshape(list(map(int, axes.values())))[places].ravel().tolist())
    return ()


def _pairs(line: str) -> tuple[tuple[int, int], ...]:
    """Returns source and target of each message of a collective-permute."""
    listed = line.partition("source_target_pairs=")[2].partition("}}")[0] + "}"
    found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", listed)]
    return tuple((a, b) for a, b in found if a != b)
