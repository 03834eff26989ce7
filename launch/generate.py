"""Answers questions about a video or images.

  python -m launch.generate --model=runs/mine --video=clip.mp4 --prompt="Point to the red circle." \\
      --render=points.png
  python -m launch.generate --model=hf/mine --image=a.png --prompt="What is this?" --stream \\
      --temperature=0.7 --top_p=0.9 --seed=1 --stop="." --max_new_tokens=200

--model is the work directory of a run or a Hugging Face folder. --prompt may be repeated; media are read once
for all questions. Points in the answers are listed in pixels, with their time in seconds or the number of
their image. --render draws them: a picture for .png and .jpg, an animation for .gif and .mp4. --stream prints
text as it is generated. An answer ends at the model's end token, before a --stop text, or after
--max_new_tokens tokens. Sampling: --temperature divides the logits, --top_k and --top_p keep the most likely
tokens, and --seed seeds the draw. If logits are not finite, for example after divergence, the command fails
and names the weights that are not finite.

Weights are split over as many chips of the machine as the model needs, or as --mesh says (--mesh=tensor=4).
Each chip reads only its part, in the dtype of the computation. As a job of several processes
(launch/tpu_run.sh), only those whose chips hold the visual input read its files; the first prints.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence

import jax
from absl import flags

from launch.support import answering
from launch.support import cli
from launch.support import hosts
from molmo2_jax import decode
from molmo2_jax import files
from molmo2_jax import generate
from molmo2_jax import render
from molmo2_jax import sharding
from molmo2_jax import types

_VIDEO = flags.DEFINE_string("video", None, "Video file in any format that FFmpeg reads.")
_IMAGE = flags.DEFINE_multi_string("image", [], "Image file")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Question")
_RENDER = flags.DEFINE_string(
    "render", None, f"File to write the frames to, with points drawn on them: {', '.join(render.SUFFIXES)}.")
_JSON = flags.DEFINE_bool("json", False, "Print text, points and timings as JSON, one line per question.")
_STREAM = flags.DEFINE_bool("stream", False, "Print the text while it is generated.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer; it is not printed")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Sampling temperature; 0 always takes the most likely token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many most likely tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the fewest tokens whose probabilities sum to this.")
for _name in ("model", "max_new_tokens", "seed", "dtype", "cache_dtype", "weights", "mesh", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    _check_flags()
    sampling = decode.Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
                               seed=cli.SEED.value)
    hosts.join()
    answerer = answering.load(cli.MODEL.value, sampling=sampling, stop=_STOP.value,
                              cache_dtype=cli.CACHE_DTYPE.value).answerer
    is_first = jax.process_index() == 0
    video, images = _VIDEO.value, tuple(_IMAGE.value)
    example = types.Example(annotations=(), video=video, images=images)
    if _STREAM.value:
        answers = show(answerer.stream(example, _PROMPT.value), _PROMPT.value, is_quiet=not is_first)
    else:
        answers = answerer.answer(example, _PROMPT.value)
        for prompt, answer in zip(_PROMPT.value, answers) if is_first else ():
            plain = f"{heading(prompt, _PROMPT.value)}{answer}"
            print(files.to_json(as_json(answer)) if _JSON.value else plain)
    if _RENDER.value and jax.process_index() == sharding.first_reader(answerer.mesh):
        points = tuple(point for answer in answers for point in answer.points)
        render.save_answer(dataclasses.replace(answers[0], points=points), _RENDER.value,
                           video=video, images=images)
        print(f"wrote {_RENDER.value}", file=sys.stderr)


def _check_flags() -> None:
    """Checks the flags before a large model is loaded.

    Raises:
      ValueError: a flag is missing, contradicts another one, or names a file that cannot be used.
    """
    if not (cli.MODEL.value and _PROMPT.value):
        raise ValueError("--model and --prompt must be given (--help explains them); got no "
                         + ("--prompt" if cli.MODEL.value else "--model"))
    if not all(map(str.strip, _PROMPT.value)):
        raise ValueError("--prompt must not be empty; got an empty one")
    media = [*_IMAGE.value, *([] if _VIDEO.value is None else [_VIDEO.value])]
    if _VIDEO.value and _IMAGE.value:
        raise ValueError("give one --video or --image files, not both; got both")
    if _STREAM.value and _JSON.value:
        raise ValueError("--stream prints text and --json prints whole answers, give one of them; got both")
    for path in () if hosts.is_job() else media:   # of a job, some processes need no files
        if not pathlib.Path(path).is_file():
            raise ValueError(f"--video and --image must name existing files; found none at {path!r}")
    if _RENDER.value:
        if not media:
            raise ValueError("--render needs a --video or --image files to draw on; got neither")
        render.suffix(_RENDER.value)
        cli.output_file(_RENDER.value)


def heading(prompt: str, prompts: Sequence[str]) -> str:
    """Returns a line with the question if there are several questions, else ""."""
    return f"> {prompt}\n" if len(prompts) > 1 else ""


def show(pieces: Iterable[generate.Piece], prompts: Sequence[str], is_quiet: bool = False
         ) -> list[generate.Answer]:
    """Prints pieces as they arrive, one answer after the other, and returns the answers.

    `is_quiet`: another process prints them.
    """
    ready, held, turn = {}, [heading(prompt, prompts) for prompt in prompts], 0
    for piece in pieces:
        held[piece.question] += piece.text
        if piece.answer:
            held[piece.question] += str(piece.answer).removeprefix(piece.answer.text) + "\n"
            ready[piece.question] = piece.answer
        while turn < len(prompts):
            print("" if is_quiet else held[turn], end="", flush=True)
            held[turn] = ""
            if turn not in ready:
                break
            turn += 1
    return [ready[number] for number in range(len(prompts))]


def as_json(answer: generate.Answer) -> dict:
    """Returns the answer as plain values; the index of a point is a time in seconds or an image number."""
    return {"text": answer.text,
            "points": [point._asdict() for point in answer.points],
            "tracks": [tracked._asdict() for tracked in answer.tracks],
            "is_complete": answer.is_complete, "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens, "logprob": answer.logprob, "seconds": dict(answer.seconds)}


if __name__ == "__main__":
    cli.start(main)
