"""Reads the collectives of a program that XLA compiled: what each moves, how often, and between whom."""

import collections
import dataclasses
import math
import re

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "s64": 8, "u64": 8, "f64": 8}


GATHER_BY_SUM = "all-gather by all-reduce"
_MESSAGE = re.compile(r"= \((\w+)\[([\d,]*)\].*? send\(.*_xla_host_transfer_rendezvous=\"("
                      + "|".join(_KINDS) + ")")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: its kind, bytes of its larger side on one device, devices that take part in each group,
    how often it runs in a step, whether its groups span slices, and the shapes of its result."""
    kind: str
    size: int
    group: int
    times: int
    spans_slices: bool
    shapes: tuple[tuple[int, ...], ...]

    @property
    def traffic(self) -> float:
        """Bytes that a device sends in all, by the usual ring algorithms."""
        factor = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.size * factor * (2 if self.kind in ("all-reduce", GATHER_BY_SUM) else 1)


def collectives(text: str, devices_per_slice: int) -> dict[str, float]:
    """Returns bytes of one step by network and kind, "ici all-gather" and so on."""
    totals: dict[str, float] = collections.defaultdict(float)
    for one in find_collectives(text, devices_per_slice):
        totals[f"{'dcn' if one.spans_slices else 'ici'} {one.kind}"] += one.traffic
    return dict(totals)


def find_collectives(text: str, devices_per_slice: int) -> list[Collective]:
    """Returns the collectives of a compiled program; those of one device alone are left out.

    The compiler writes a reduce-scatter as an all-reduce in a fusion that is called all-reduce-scatter, and
    what crosses slices as messages of each chip to the host's runtime, counted as between two slices. It may
    also gather by a sum, of each device's part at its place among zeros: twice the traffic (GATHER_BY_SUM).
    """
    bodies = _computations(text)
    made, callers = _definitions(bodies), _callers(bodies)
    times, found = _times(bodies), []
    for name, lines in bodies.items():
        for line in lines:
            sent = _MESSAGE.search(line)
            if sent and times[name]:
                dims, kind = tuple(map(int, filter(None, sent[2].split(",")))), sent[3]
                size = _WIDTH.get(sent[1], 4) * math.prod(dims) * (1 if kind == "all-reduce" else 2)
                found.append(Collective(kind, size, 2, times[name], True, (dims,)))
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
            group, spans = _groups(line, devices_per_slice)
            if kind == "reduce-scatter" and match[2] == "reduce-scatter":
                size *= group
            if group > 1:
                found.append(Collective(kind, size, group, times[name], spans,
                                        tuple(dims for _, dims in arrays)))
    return found


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
    """Returns the line that makes each value, by names of computation and value; "" is the one returned."""
    made = {}
    for body, lines in bodies.items():
        for line in lines:
            match = _OPERATION.match(line.strip())
            if match:
                made[body, match[1]] = line
                made |= {(body, ""): line} if line.lstrip().startswith("ROOT") else {}
    return made


def _callers(bodies: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """Returns for each computation that is called, not looped over, (computation, line) of a caller."""
    return {called: (body, line) for body, lines in bodies.items() if body for line in lines
            for called in re.findall(r"calls=%?([\w.\-]+)", line)}


def _origin(line: str, body: str, made, callers) -> str:
    """Returns the operation that made the first operand of a line, behind those that only rearrange."""
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

    A loop runs as often as the one constant in its condition says; with none or several, it counts once.
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


def _groups(line: str, devices_per_slice: int) -> tuple[int, bool]:
    """Returns (devices in a group, whether groups span slices)."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        ids = list(map(int, listed[1].split(",")))
        return len(ids), len({i // devices_per_slice for i in ids}) > 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        ids = np.arange(int(iota[1]) * int(iota[2])).reshape(list(map(int, iota[3].split(","))))
        if iota[4]:
            ids = ids.transpose(list(map(int, iota[4].split(","))))
        first = ids.reshape(int(iota[1]), int(iota[2]))[0]
        return len(first), len(set(first // devices_per_slice)) > 1
    named = re.search(r"replica_groups=mesh\[(.*?)\]"
                      r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = np.arange(math.prod(map(int, axes.values())))
        if named[2]:
            ids = ids.reshape(list(map(int, named[2].split(","))))
            ids = ids.transpose(list(map(int, named[3].split(",")))) if named[3] else ids
        inside = re.findall(r"'(\w+)'", named[4])
        first = ids.reshape(list(map(int, axes.values())))[
            tuple(slice(None) if axis in inside else 0 for axis in axes)].ravel()
        return len(first), len(set(first // devices_per_slice)) > 1
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
    spans = any(int(a) // devices_per_slice != int(b) // devices_per_slice for a, b in pairs)
    return 2 if pairs else 1, spans
