"""Measures how often a model points at the requested one of two objects, and how near its points are.

  python -m benchmarks.binding --model=runs/quickstart [--examples=100]

Draws scenes of the quickstart's world with two objects, asks for each by name, and compares every answer with
both objects. 0.5 is chance: a model that finds objects but does not know which one is meant.
"""

import dataclasses
import tempfile

import numpy as np
from absl import app
from absl import flags

from data_pipelines import sources
from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch.support import questions
from launch.support import trained
from molmo2_jax import evaluate
from molmo2_jax import generate

_MODEL = flags.DEFINE_string("model", "assets/nano", "Work directory of a run, or a Hugging Face folder.")
_EXAMPLES = flags.DEFINE_integer("examples", 100, "Scenes of each kind of medium.")
SEED = 12345   # of the scenes; differs from those of the quickstart's worlds
MAX_NEW_TOKENS = 48


def world(image_share: float) -> world_config.WorldConfig:
    """Returns scenes of two objects whose only questions ask where each of them is."""
    return dataclasses.replace(
        world_config.quickstart_world(), objects=(2, 2), object_rates=(), image_share=image_share,
        image_set_share=0.0, phrases=("colour_kind",), branches=(2, 2), annotations=(("points", 1.0),),
        point_modes=("bare",))


def distances(answered: list[evaluate.Answered]) -> np.ndarray:
    """Returns float64[answers, 2]: how far each first point is from the asked object and from the other one,
    in shares of the frame's sides; infinite without a point."""
    found = []
    for one, other in zip(answered[::2], answered[1::2], strict=True):
        for asked, left in ((one, other), (other, one)):
            size = asked.media.sizes[0]
            truth = [question.question.about.points[0] for question in (asked, left)]
            points = asked.answer.points[:1]
            found.append([max(abs(points[0].x - at.x) / size[0], abs(points[0].y - at.y) / size[1])
                          if points else np.inf for at in truth])
    return np.array(found)


def main(_) -> None:
    source = trained.load(_MODEL.value)
    answerer = generate.Answerer(source.params, source.model, source.inputs, source.tokenizer,
                                 max_new_tokens=MAX_NEW_TOKENS, dtype="float32")
    print("| medium | answers | nearer to the asked object | within 0.06 of it | within 0.06 of either |")
    print("|---|---|---|---|---|")
    for medium, image_share in (("stills", 1.0), ("clips", 0.0)):
        with tempfile.TemporaryDirectory() as folder:
            path = world_write.write(folder, world(image_share), SEED, _EXAMPLES.value, split="two",
                                     has_masks=False, progress=False)
            result = evaluate.evaluate(answerer, sources.examples(path.parent), questions.ask, lambda _: {},
                                       rows=16, title=medium)
        away = distances(list(result.answered))
        print(f"| {medium} | {len(away)} | {(away[:, 0] < away[:, 1]).mean():.3f} "
              f"| {(away[:, 0] < 0.06).mean():.3f} | {(away.min(axis=1) < 0.06).mean():.3f} |")


if __name__ == "__main__":
    app.run(main)
