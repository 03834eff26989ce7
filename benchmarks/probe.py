"""Says what a model has learnt of a drawn world and what it lacks: answers by kind of scene, loss by kind of
token, and what can be read from its activations.

  python -m benchmarks.probe --model=assets/nano_full [--world=full] [--examples=128] [--seed=77]

Tables. Answers: F1 of pointing in clips and stills, split by what was asked and by the scene. Tokens:
cross-entropy and hits of the right answers' tokens by kind, read after each layer through the final norm and
the head. Visual tokens: what a linear probe reads from them, before and after the connector and after each
decoder layer; it is fitted on half of the clips and measured on the others. Dimensions: principal directions
that hold 99 % of their variance. World: times of first points.
"""

import argparse
import collections
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import annotations
from data_pipelines import formats
from data_pipelines import sources
from data_pipelines.scoring import hits
from data_pipelines.scoring import points as point_scores
from data_pipelines.stream import preparation
from data_pipelines.world import config as world_config
from data_pipelines.world import scene as scene_lib
from data_pipelines.world import write as world_write
from launch.support import questions
from launch.support import trained
from molmo2_jax import evaluate
from molmo2_jax import generate
from molmo2_jax import types
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.model import connector
from molmo2_jax.model import layers
from molmo2_jax.model import molmo2

MAX_NEW_TOKENS, ROWS = 640, 8
RIDGE = 1e-6   # visual tokens say much in directions of little variance
_TAG = re.compile(r'coords="([^"]*)')
_GROUP = re.compile(r"([0-9.]+)((?: [0-9]+ [0-9]{3,4} [0-9]{3,4})+)")
_POINT = re.compile(r" ([0-9]+) ([0-9]{3,4}) ([0-9]{3,4})")


# ---- answers


def form(label: str) -> str:
    """Returns which form of phrase a label is, see world.asker.PHRASE_FORMS."""
    words = label.split()
    if label == "object":
        return "any"
    if len(words) == 1:
        return "kind"
    return "colour" if words[1] == "object" else "colour_kind"


def hidden_share(annotation: annotations.Points) -> float:
    """Returns how much of its largest visible area the asked object lacks at the time of its point, 0 to 1;
    the largest value of several objects."""
    lost = 0.0
    for point in annotation.points:
        areas = {mask.time: int(mask.decode().sum()) for mask in annotation.masks if mask.id == point.id}
        at = [area for time, area in areas.items() if time is None or abs(time - (point.time or 0)) < 0.05]
        lost = max(lost, 1 - at[0] / max(areas.values()) if at else 1.0)
    return lost


def traits(one: evaluate.Answered) -> dict[str, str]:
    """Returns what describes a question about points: trait -> value."""
    asked, media = one.question.about, one.media
    first = min((point.time or 0.0 for point in asked.points), default=0.0)
    found = {"asked": form(asked.label), "points": str(len(asked.points)),
             "objects": str(len({mask.id for mask in asked.masks}))}
    if form(asked.label) in ("colour", "colour_kind"):
        found["colour"] = asked.label.split()[0]
    if media.is_video and len(asked.points) == 1:
        found["first time"] = "0.0" if first == 0 else "0.5" if first < 1 else "later"
        found["hidden"] = "more than a fifth" if hidden_share(asked) > 0.2 else "less"
    if media.is_video:
        found["frames"] = f"{len(media.seconds) // 4 * 4} to {len(media.seconds) // 4 * 4 + 3}"
    return found


def mistakes(one: evaluate.Answered) -> str:
    """Returns what happened to the single point that was asked for."""
    target = point_scores.target(one.question.about, one.media)
    given = point_scores.read(target, one.text)
    if not given:
        return "no point"
    if len(given) > 1:
        return "several points"
    index, x, y = given[0]
    when = "its time" if abs(index - target.points[0][0]) < 0.05 else "another time"
    if point_scores.score_points(target, given)["f1"] == 1:
        return f"hit, {when}"
    is_other = any(hits.inside(mask.decode(), x, y) for mask in one.question.about.masks
                   if mask.time is None or abs(mask.time - index) < 0.05)
    return f"{'another object' if is_other else 'background'}, {when}"


def answer_tables(answered: Sequence[evaluate.Answered]) -> Iterator[str]:
    """Yields the lines of the tables of answers."""
    for medium in ("video", "still"):
        held, what = collections.defaultdict(list), collections.Counter()
        for one in answered:
            asked = one.question.about
            if not isinstance(asked, annotations.Points) or one.media.is_video != (medium == "video") or (
                    len(one.media.sizes) > 1 or asked.mode == "count"):
                continue
            target = point_scores.target(asked, one.media)
            f1 = point_scores.score_points(target, point_scores.read(target, one.text))["f1"]
            for trait, value in traits(one).items():
                held[trait, value].append(f1)
            if len(asked.points) == 1:
                what[mistakes(one)] += 1
        yield f"\n{medium}: | trait | value | questions | F1 |\n|---|---|---|---|"
        for (trait, value), scores in sorted(held.items()):
            yield f"| {trait} | {value} | {len(scores)} | {np.mean(scores):.3f} |"
        total = sum(what.values())
        yield f"{medium}, one point asked for: " + ", ".join(
            f"{name} {count / total:.2f}" for name, count in what.most_common())


# ---- tokens


def kinds(pieces: Sequence[str]) -> list[str]:
    """Returns the kind of each token of a right answer, given the tokens' texts; "end" for an empty one."""
    text = "".join(pieces)
    of_char = ["text"] * len(text)

    def mark(begin: int, end: int, kind: str) -> None:
        of_char[begin:end] = [kind] * (end - begin)

    for match in re.finditer(r"\d+", text):
        mark(*match.span(), "count")
    if re.fullmatch(r"[A-Z]", text):
        mark(0, 1, "letter")
    for match in re.finditer(r">([^<]*)</", text):
        mark(*match.span(1), "label")
    for tag in _TAG.finditer(text):
        mark(*tag.span(1), "separator")
        for group in _GROUP.finditer(tag[1]):
            begin = tag.start(1) + group.start()
            mark(begin, begin + len(group[1]), "index")
            for point in _POINT.finditer(group[2]):
                at = begin + len(group[1])
                mark(at + point.start(1), at + point.end(1), "id")
                for number, axis in ((2, "x"), (3, "y")):
                    mark(at + point.start(number), at + point.start(number) + 1, f"{axis}, first digit")
                    mark(at + point.start(number) + 1, at + point.end(number), f"{axis}, other digits")
    found, place = [], 0
    for piece in pieces:
        of_piece = of_char[place + len(piece) - len(piece.lstrip()):place + len(piece)] or of_char[place:][:1]
        found.append(of_piece[0] if piece else "end")
        place += len(piece)
    return found


def answers_of(batch: types.Batch, tokenizer) -> Iterator[tuple[int, np.ndarray, list[str]]]:
    """Yields (row, positions, kinds of their targets) of every answer in a batch."""
    for row in range(len(batch.tokens)):
        is_learnt = batch.weights[row] > 0
        for branch in range(int(batch.branch[row].max()) + 1):
            places = np.flatnonzero(is_learnt & (batch.branch[row] == branch))
            ids = batch.targets[row][places]
            yield row, places, kinds(["" if i == tokenizer.eos_id else tokenizer.decode([i]) for i in ids])


# ---- visual tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """What is at each visual token of one clip. Places are in shares of the frame, times in seconds."""
    colour: np.ndarray     # int[R], index in COLOURS of the object that fills most of the window; last: none
    is_first: np.ndarray   # bool[R], whether the object is not visible in an earlier frame
    x: np.ndarray
    y: np.ndarray
    time: np.ndarray


def truth(example: types.Example, crops: types.Crops, media: types.Media, pixels: np.ndarray,
          side: int) -> Truth:
    """Returns the truth of a clip; `pixels` uint8[N, H, W, 3] are its frames, `side` the patches per side."""
    drawn = np.array(list(scene_lib.COLOURS.values()))
    found = next(one.masks for one in example.annotations if isinstance(one, annotations.Points))
    height, width = pixels.shape[1:3]
    owner = np.zeros((len(media.seconds), height, width), int) - 1
    first: dict[int, int] = {}
    for frame, seconds in enumerate(media.seconds):
        for mask in found:
            if abs(mask.time - seconds) < 0.05:
                whole = mask.decode()
                rows = (np.arange(height) + 0.5) * whole.shape[0] / height
                columns = (np.arange(width) + 0.5) * whole.shape[1] / width
                small = whole[rows.astype(int)][:, columns.astype(int)]
                if not small.any():
                    continue
                rgb = np.median(pixels[frame][small], axis=0)
                owner[frame][small] = int(np.abs(drawn - rgb).sum(1).argmin())
    values = collections.defaultdict(list)
    size = height // side
    for window in crops.pooled:
        patches = window[window >= 0]
        frame, (row, column) = int(patches[0]) // side**2, np.divmod(patches % side**2, side)
        inside = owner[frame, row.min() * size:(row.max() + 1) * size,
                       column.min() * size:(column.max() + 1) * size]
        counts = np.bincount(inside.ravel() + 1, minlength=len(drawn) + 1)
        colour = int(counts[1:].argmax()) if counts[1:].max() > 0.3 * inside.size else len(drawn)
        if colour < len(drawn):
            first.setdefault(colour, frame)
        values["colour"].append(colour)
        values["is_first"].append(first.get(colour) == frame)
        values["x"].append((column.mean() + 0.5) / side)
        values["y"].append((row.mean() + 0.5) / side)
        values["time"].append(media.seconds[frame])
    return Truth(**{name: np.array(value) for name, value in values.items()})


def ridge(features: np.ndarray, targets: np.ndarray, is_fitted: np.ndarray) -> np.ndarray:
    """Returns float[N, C]: linear predictions of targets [N, C], fitted where `is_fitted`."""
    centre, scale = features[is_fitted].mean(0), features[is_fitted].std(0) + 1e-6
    x = np.append((features - centre) / scale, np.ones((len(features), 1)), axis=1)
    known = x[is_fitted]
    penalty = RIDGE * len(known) * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    return x @ np.linalg.solve(known.T @ known + penalty, known.T @ targets[is_fitted])


def dimensions(features: np.ndarray, share: float = 0.99) -> int:
    """Returns how many principal directions hold this share of the variance of features [N, C]."""
    sizes = np.linalg.svd(features - features.mean(0), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(sizes), share * sizes.sum())) + 1


def probe(features: np.ndarray, known: Mapping[str, np.ndarray], is_fitted: np.ndarray) -> dict[str, float]:
    """Returns what a linear probe reads: hits of colours (of tokens on objects) and of first frames, mean
    errors of x, y and time; on tokens that it was not fitted on."""
    other, has_object = ~is_fitted, known["colour"] < len(scene_lib.COLOURS)
    scores = ridge(features, np.eye(len(scene_lib.COLOURS) + 1)[known["colour"]], is_fitted)
    found = {"colour": float((scores.argmax(1) == known["colour"])[other & has_object].mean())}
    scores = ridge(features, 2.0 * known["is_first"][:, None] - 1, is_fitted & has_object)[:, 0]
    right = (scores > 0) == known["is_first"]
    found["first frame"] = float(np.mean([right[other & has_object & (known["is_first"] == value)].mean()
                                          for value in (False, True)]))
    for name in ("x", "y", "time"):
        error = np.abs(ridge(features, known[name][:, None], is_fitted)[:, 0] - known[name])
        found[name] = float(error[other].mean())
    return found


# ---- all of it


def batches(source: trained.Trained, examples: Sequence[types.Example]
            ) -> Iterator[tuple[types.Batch, list[Truth | None]]]:
    """Yields batches of one example per row with plain questions and right answers, and the clips' truth."""
    held, known = [], []
    side = source.model.vision.image_size // source.model.vision.patch_size
    for example in examples:
        crops, media = media_lib.see(example, source.model, source.inputs, source.tokenizer)
        held.append(preparation.compose(example, crops, media, source.tokenizer, np.random.default_rng(0),
                                        asking=formats.PLAIN))
        has_points = any(isinstance(one, annotations.Points) for one in example.annotations)
        known.append(truth(example, crops, media, frames_of(crops, side), side)
                     if example.video and has_points else None)
    sizes = [max(getattr(one, name).shape[axis] for one in held)
             for name, axis in (("tokens", 0), ("patches", 0), ("pooled", 0), ("pooled", 1))]
    shape = types.RowShape(*sizes)
    patch_shape = next(one.patches.shape[1:] for one in held if len(one.patches))
    for begin in range(0, len(held) - ROWS + 1, ROWS):
        part = slice(begin, begin + ROWS)
        yield rows_lib.stack([rows_lib.join([one], shape, patch_shape) for one in held[part]]), known[part]


def frames_of(crops: types.Crops, side: int) -> np.ndarray:
    """Returns uint8[N, H, W, 3]: the frames that the patches of a video hold."""
    N, P, C = crops.patches.shape
    size = round((C // 3) ** 0.5)
    grid = crops.patches.reshape(N, side, side, size, size, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(N, side * size, side * size, 3)


def measured(source: trained.Trained, examples: Sequence[types.Example]):
    """Returns kind -> layer -> [(loss, hit)], layer -> features, name -> truth, bool[N] which are fitted."""
    model, depth = molmo2.Molmo2(source.model, remat="none"), source.model.text.num_layers
    norm, head = source.params["text"]["final_norm"]["scale"], source.params["head"]

    @jax.jit
    def run(batch):
        _, inside = model.apply({"params": source.params}, batch, taps=tuple(range(depth)), method="hidden")
        tapped = jnp.stack([inside.layers[number] for number in range(depth)])
        logits = layers.rms_norm(tapped, norm, source.model.text.norm_eps) @ head
        log_p = jax.nn.log_softmax(logits)
        at = jnp.broadcast_to(jnp.where(batch.weights > 0, batch.targets, 0), log_p.shape[:-1])[..., None]
        features = connector.masked_mean(*connector.gather_windows(inside.features, batch.pooled))
        return (-jnp.take_along_axis(log_p, at, -1)[..., 0], log_p.argmax(-1) == at[..., 0], features,
                inside.visual, tapped)

    patch = source.model.special_id("<im_patch>")
    tokens = collections.defaultdict(lambda: [[] for _ in range(depth)])
    read, known, is_fitted = collections.defaultdict(list), collections.defaultdict(list), []
    for number, (batch, truths) in enumerate(batches(source, examples)):
        nll, hit, features, visual, tapped = map(np.asarray, run(batch))
        for row, places, named in answers_of(batch, source.tokenizer):
            for place, kind in zip(places, named, strict=True):
                for layer in range(depth):
                    tokens[kind][layer].append((nll[layer, row, place], hit[layer, row, place]))
        for row, one in enumerate(truths):
            if one is None:
                continue
            is_visual, count = batch.tokens[row] == patch, len(one.x)
            read["before the connector"].append(features[row, :count])
            read["after the connector"].append(visual[row, :count])
            for layer in range(depth):
                read[f"after layer {layer}"].append(tapped[layer, row][is_visual])
            for name, value in dataclasses.asdict(one).items():
                known[name].append(value)
            is_fitted.append(np.full(count, number % 2 == 0))
    read_64 = {name: np.concatenate(parts).astype(np.float64) for name, parts in read.items()}
    joined = {name: np.concatenate(parts) for name, parts in known.items()}
    return tokens, read_64, joined, np.concatenate(is_fitted)


def first_times(examples: Sequence[types.Example]) -> collections.Counter:
    """Returns how often each first time occurs, of single points in clips."""
    return collections.Counter(
        one.points[0].time for example in examples if example.video for one in example.annotations
        if isinstance(one, annotations.Points) and len(one.points) == 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/nano_full", help="work directory or Hugging Face folder")
    parser.add_argument("--world", default="full", choices=sorted(world_config.WORLDS))
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=77, help="of the examples; not that of training")
    parser.add_argument("--noanswers", action="store_true", help="do not ask the questions: it takes longest")
    options = parser.parse_args()
    source = trained.load(options.model)
    source = source._replace(params=jax.device_put(source.params))
    world, _ = world_config.WORLDS[options.world]
    with tempfile.TemporaryDirectory() as folder:
        path = world_write.write(
            folder, world(), options.seed, options.examples, split="probe", progress=False)
        examples = sources.examples(path.parent)
        times = first_times(examples)
        print("first times of single points: " + ", ".join(
            f"{time:.1f} s {count / times.total():.3f}" for time, count in sorted(times.items())))
        tokens, read, known, is_fitted = measured(source, examples)
        depth = source.model.text.num_layers
        after = " | ".join(f"loss, hits after layer {layer}" for layer in range(depth))
        print(f"\n| tokens of right answers | number | {after} |\n|{'---|' * (depth + 2)}")
        for kind, of_layer in sorted(tokens.items()):
            means = [np.mean(one, axis=0) for one in of_layer]
            print(f"| {kind} | {len(of_layer[0])} | "
                  + " | ".join(f"{loss:.3f}, {share:.3f}" for loss, share in means) + " |")
        print("\n| visual tokens | dimensions | colour | first frame | x | y | time, s |\n|" + "---|" * 7)
        for name, features in read.items():
            found = probe(features, known, is_fitted)
            print(f"| {name} | {dimensions(features)} | " + " | ".join(
                f"{found[key]:.3f}" for key in ("colour", "first frame", "x", "y", "time")) + " |")
        if options.noanswers:
            return
        answerer = generate.Answerer(source.params, source.model, source.inputs, source.tokenizer,
                                     max_new_tokens=MAX_NEW_TOKENS, dtype="float32")
        result = evaluate.evaluate(answerer, examples, questions.ask, questions.score, rows=16, title=None)
        for line in answer_tables(result.answered):
            print(line)
        print("\n" + "\n".join(f"{name} {value:.3f}" for name, value in result.scores.items()))


if __name__ == "__main__":
    main()
