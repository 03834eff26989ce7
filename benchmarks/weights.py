"""What 8 bits cost a trained model: equal tokens, scores and bytes by how weights are stored.

  python -m benchmarks.weights --model=assets/nano --data=runs/clips/heldout [--limit=64]

All annotations of the folder are asked greedily. `same tokens` compares each answer's tokens, place by place,
and `same answers` whole answers, with those of float32. "int8 everywhere": also ViT and connector.
"""

import time

import jax
from absl import app
from absl import flags

from launch.support import cli
from launch.support import folders
from launch.support import trained
from molmo2_jax import finetune
from molmo2_jax import generate
from molmo2_jax.model import quantized

_LIMIT = flags.DEFINE_integer("limit", None, "Most records of the folder.")
SHOWN = ("f1", "accuracy", "jf")   # ends of the names of scores
KINDS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "float32 + int8": ("float32", "int8"),
         "bfloat16 + int8": ("bfloat16", "int8"), "float32 + int8 everywhere": ("float32", "everywhere"),
         "bfloat16 + int8 everywhere": ("bfloat16", "everywhere")}


def everywhere(params):
    """Returns the parameters with all kernels and the head in 8 bits."""
    def one(path, leaf):
        is_matrix = path.endswith(("kernel", "head"))
        return quantized.quantize(leaf, quantized.summed_axes(path)) if is_matrix else leaf

    return finetune.nested({path: one(path, leaf) for path, leaf in finetune.flat(params).items()})


def main(_) -> None:
    source = trained.load(cli.MODEL.value)
    [folder] = cli.data()
    data = folders.read(folder, _LIMIT.value)
    first: list[list[int]] = []
    for name, (dtype, weights) in KINDS.items():
        is_everywhere = weights == "everywhere"
        answerer = generate.Answerer(
            everywhere(source.params) if is_everywhere else source.params, source.model, source.inputs,
            source.tokenizer, dtype=dtype, weights="int8" if is_everywhere else weights, max_new_tokens=64)
        start = time.process_time()
        found = folders.score(answerer, data, rows=8, is_pretraining=source.is_pretraining)
        seconds = time.process_time() - start
        ids = [source.tokenizer.encode(one.answer.text) for one in found.result.answered]
        first = first or ids
        tokens = [a == b for one, other in zip(ids, first) for a, b in zip(one, other)]
        shown = {score: value for score, value in found.scores.items() if score.endswith(SHOWN)}
        if name == "float32":
            print(f"{len(ids)} answers, {sum(map(len, ids))} tokens")
            print(f"| weights | parameters, MB | same tokens | same answers | {' | '.join(shown)} | CPU s |")
            print("|" + "---|" * (5 + len(shown)))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(answerer.params)) / 1e6
        equal = sum(one == other for one, other in zip(ids, first)) / len(ids)
        print(f"| {name} | {size:.2f} | {sum(tokens) / sum(map(len, first)):.2%} | {equal:.1%} | "
              f"{' | '.join(f'{value:.3f}' for value in shown.values())} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
