"""Questions about a drawn scene, with exact answers, as annotations in the format of docs/data_format.md.

G observed times, K shapes, H x W pixels. A still is a scene with one observed time.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from data_pipelines import masks
from data_pipelines.world import scene as scene_lib

MIN_SHARE = 0.15    # smallest visible share of its area at which a shape is pointed at ...
MIN_PIXELS = 12     # ... and smallest number of visible pixels
WELL_SHARE = 0.6    # visible share from which a shape counts as well visible
ANNOTATION_KINDS = ("points", "tracks", "count", "choice", "qa", "caption")
PHRASE_FORMS = ("colour_kind", "kind", "colour", "any")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """A scene at the times of the annotation grid."""
    scene: scene_lib.Scene
    times: np.ndarray     # float64[G] seconds
    owner: np.ndarray     # uint8[G, H, W], k + 1 where shape k is visible
    share: np.ndarray     # float64[G, K], visible share of each shape's area
    visible: np.ndarray   # bool[G, K]
    points: np.ndarray    # float64[G, K, 2], inside the visible mask where visible


def grid(duration: float) -> np.ndarray:
    """Returns float64[G]: 0, 0.5, 1 ... below the duration, and the duration (the last frame)."""
    return np.append(np.arange(0, np.ceil(duration / 0.5 - 1e-9)) * 0.5, duration)


def _inner_point(mask: np.ndarray) -> tuple[float, float]:
    """Returns (x, y) of the pixel farthest from the edge of a non-empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = np.pad(mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], 1)
    row, column = np.unravel_index(ndimage.distance_transform_edt(part).argmax(), part.shape)
    return float(columns[0] + column - 1), float(rows[0] + row - 1)


def observe(scene: scene_lib.Scene, times: np.ndarray) -> Observation:
    """Returns what is visible, and where, at the given times."""
    K = len(scene.shapes)
    owner = np.zeros((len(times), scene.height, scene.width), np.uint8)
    share, points = np.zeros((len(times), K)), np.zeros((len(times), K, 2))
    visible = np.zeros((len(times), K), bool)
    for g, time in enumerate(times):
        frame = scene.frame_at(time)
        owner[g], share[g] = scene_lib.owners(scene, frame)
        pixels = np.bincount(owner[g].ravel(), minlength=K + 1)[1:]
        visible[g] = (share[g] >= MIN_SHARE) & (pixels >= MIN_PIXELS)
        for k, shape in enumerate(scene.shapes):
            x, y = shape.centres[frame]
            x, y = min(max(x, 0.0), scene.width - 1.0), min(max(y, 0.0), scene.height - 1.0)
            if visible[g, k] and owner[g, round(y), round(x)] != k + 1:
                x, y = _inner_point(owner[g] == k + 1)
            points[g, k] = x, y
    return Observation(scene=scene, times=times, owner=owner, share=share, visible=visible, points=points)


def _round(value: float) -> float:
    return round(float(value), 2)


def _phrase(shape: scene_lib.Shape, form: str) -> str:
    return {"colour_kind": shape.phrase, "kind": shape.kind, "colour": f"{shape.colour} object",
            "any": "object"}[form]


class Asker:
    """Draws annotations of one video (one observation) or of stills (one each); no annotation is repeated."""

    def __init__(self, observations: Sequence[Observation], config, rng: np.random.Generator, is_video: bool):
        self.observations = observations
        self.config = config
        self.rng = rng
        self.is_video = is_video
        # object k of observation n has the id starts[n] + k + 1 in the record
        starts = np.cumsum([0] + [len(o.scene.shapes) for o in observations])
        self.members: dict[str, list[tuple[int, int, int]]] = {}
        for n, observation in enumerate(observations):
            for k, shape in enumerate(observation.scene.shapes):
                for form in config.phrases:
                    self.members.setdefault(_phrase(shape, form), []).append((n, k, int(starts[n]) + k + 1))
        self.starts = starts

    def annotations(self, number: int) -> list[dict]:
        """Returns up to `number` distinct annotations; their kinds are drawn at the rates of the config."""
        pools = {kind: self._shuffled(self._candidates(kind)) for kind, rate in self.config.annotations
                 if rate > 0 and (self.is_video or kind != "tracks")}
        rates = dict(self.config.annotations)
        drawn = []
        while len(drawn) < number:
            kinds = [kind for kind, pool in pools.items() if pool]
            if not kinds:
                break
            weights = np.array([rates[kind] for kind in kinds], float)
            kind = kinds[self.rng.choice(len(kinds), p=weights / weights.sum())]
            annotation = pools[kind].pop()()
            if annotation is not None and annotation not in drawn:
                drawn.append(annotation)
        return drawn

    def masks(self) -> list[dict]:
        """Returns the visible masks of all objects at all observed times."""
        entries = []
        for n, observation in enumerate(self.observations):
            for g, time in enumerate(observation.times):
                for k in np.flatnonzero(observation.visible[g]):
                    where = {"time": round(float(time), 4)} if self.is_video else {"image": n + 1}
                    entries.append({"id": int(self.starts[n] + k + 1), **where,
                                    **masks.encode(observation.owner[g] == k + 1)})
        return entries

    def _shuffled(self, items: list) -> list:
        return [items[i] for i in self.rng.permutation(len(items))]

    def _candidates(self, kind: str) -> list[Callable[[], dict | None]]:
        phrases = list(self.members)
        if kind in ("points", "count"):
            make = self._points if kind == "points" else self._count
            asked: list[Callable[[], dict | None]] = [functools.partial(make, p) for p in phrases]
            if self.rng.random() < self.config.absent_share:
                asked.append(lambda: make(self._absent_phrase()))
            return asked
        if kind == "tracks":
            return [functools.partial(self._tracks, p) for p in phrases]
        if kind == "caption":
            return [self._caption]
        asked = [functools.partial(ask, s, kind == "choice")
                 for s in self._shapes() for ask in (self._colour, self._kind, self._place, self._motion)]
        return asked + [functools.partial(self._how_many, p, kind == "choice") for p in phrases]

    def _shapes(self) -> list[tuple[int, int, int]]:
        return [(n, k, int(self.starts[n]) + k + 1) for n, o in enumerate(self.observations)
                for k in range(len(o.scene.shapes))]

    def _shape(self, member) -> scene_lib.Shape:
        return self.observations[member[0]].scene.shapes[member[1]]

    def _absent_phrase(self) -> str | None:
        present = {self._shape(member).phrase for member in self._shapes()}
        names = [f"{c} {k}" for c in self.config.colours for k in self.config.kinds
                 if f"{c} {k}" not in present]
        return names[self.rng.integers(len(names))] if names else None

    def _points(self, phrase: str | None) -> dict | None:
        if phrase is None:
            return None
        points = []
        for n, k, identity in self.members.get(phrase, ()):
            observation = self.observations[n]
            g = self._point_time(observation, k) if self.is_video else 0
            where = {"time": float(observation.times[g])} if self.is_video else {"image": n + 1}
            if len(self.observations) == 1 and not self.is_video:
                where = {}
            x, y = observation.points[g, k]
            points.append({**where, "x": _round(x), "y": _round(y), "id": identity})
        points.sort(key=lambda p: (p.get("time", 0), p.get("image", 0)))
        mode = self.config.point_modes[self.rng.integers(len(self.config.point_modes))]
        return {"type": "points", "label": phrase, "mode": mode, "points": points}

    def _point_time(self, observation: Observation, k: int) -> int:
        """Returns the index of a grid time, other than the last frame, at which the shape is well visible."""
        well = np.flatnonzero(observation.share[:-1, k] >= min(WELL_SHARE, observation.share[:-1, k].max()))
        return int(well[0] if self.config.point_time == "first" else self.rng.choice(well))

    def _count(self, phrase: str | None) -> dict | None:
        if phrase is None:
            return None
        return {"type": "count", "label": phrase, "count": len(self.members.get(phrase, ()))}

    def _tracks(self, phrase: str) -> dict:
        tracks = []
        for n, k, identity in self.members[phrase]:
            observation = self.observations[n]
            points = []
            for g, time in enumerate(observation.times):
                if observation.share[g, k] == 0 and not self._is_in_frame(observation, k, time):
                    continue
                x, y = observation.points[g, k]
                point = {"time": round(float(time), 4), "x": _round(x), "y": _round(y)}
                points.append(point if observation.visible[g, k] else {**point, "occluded": True})
            tracks.append({"id": identity, "points": points})
        return {"type": "tracks", "label": phrase, "fps": 2, "tracks": tracks}

    def _is_in_frame(self, observation: Observation, k: int, time: float) -> bool:
        scene = observation.scene
        x, y = scene.shapes[k].centres[scene.frame_at(time)]
        return 0 <= x < scene.width and 0 <= y < scene.height

    def _asked(self, question: str, answer: str, others: Sequence[str], is_choice: bool) -> dict:
        if not is_choice:
            return {"type": "qa", "question": question, "answer": answer}
        options = self._shuffled([answer, *self._shuffled([o for o in others if o != answer])[:3]])
        return {"type": "choice", "question": question, "options": options, "answer": options.index(answer)}

    def _is_only(self, attribute: str, value: str) -> bool:
        return sum(getattr(self._shape(m), attribute) == value for m in self._shapes()) == 1

    def _colour(self, member, is_choice: bool) -> dict | None:
        shape = self._shape(member)
        if not self._is_only("kind", shape.kind):
            return None
        return self._asked(f"What color is the {shape.kind}?", shape.colour, self.config.colours, is_choice)

    def _kind(self, member, is_choice: bool) -> dict | None:
        shape = self._shape(member)
        if not self._is_only("colour", shape.colour):
            return None
        question = f"What shape is the {shape.colour} object?"
        return self._asked(question, shape.kind, self.config.kinds, is_choice)

    def _place(self, member, is_choice: bool) -> dict | None:
        n, k, _ = member
        observation, phrase = self.observations[n], self._shape(member).phrase
        if not self._is_only("phrase", phrase) or not observation.visible[0, k] or len(self.observations) > 1:
            return None
        x, y = observation.points[0, k] / (observation.scene.width, observation.scene.height)
        sides = [("left", "right", x), ("top", "bottom", y)][self.rng.integers(2)]
        if abs(sides[2] - 0.5) < 0.1:
            return None
        when = " at the start" if self.is_video else ""
        answer = sides[0] if sides[2] < 0.5 else sides[1]
        question = f"Is the {phrase} at the {sides[0]} or {sides[1]}{when}?"
        return self._asked(question, answer, sides[:2], is_choice)

    def _motion(self, member, is_choice: bool) -> dict | None:
        direction = self._direction(member)
        if direction is None or not self._is_only("phrase", self._shape(member).phrase):
            return None
        return self._asked(f"Which way does the {self._shape(member).phrase} move?", direction,
                           ("left", "right", "up", "down"), is_choice)

    def _direction(self, member) -> str | None:
        """Returns left, right, up or down if the overall motion is clearly in that direction, else None."""
        n, k, _ = member
        observation = self.observations[n]
        if not self.is_video or not observation.visible[:, k].all():
            return None
        dx, dy = observation.points[-1, k] - observation.points[0, k]
        far, other = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
        if far < 0.08 * min(observation.owner.shape[1:]) or other > 0.6 * far:
            return None
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"

    def _how_many(self, phrase: str, is_choice: bool) -> dict:
        count = len(self.members[phrase])
        near = [str(n) for n in range(max(count - 2, 0), count + 4)]
        noun = phrase + ("es" if phrase.endswith("s") else "s")
        return self._asked(f"How many {noun} are there?", str(count), near, is_choice)

    def _caption(self) -> dict:
        sentences = []
        for n, observation in enumerate(self.observations):
            order = np.argsort([shape.centres[0, 0] for shape in observation.scene.shapes])
            parts = []
            for k in order:
                shape = observation.scene.shapes[k]
                direction = self._direction((n, k, 0))
                article = "an" if shape.colour[0] in "aeiou" else "a"
                moving = f" moving {direction}" if direction else ""
                parts.append(f"{article} {shape.phrase}{moving}")
            text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
            where = f"Image {n + 1} shows" if len(self.observations) > 1 else "There is"
            sentences.append(f"{where} {text}.")
        return {"type": "caption", "text": " ".join(sentences)}
