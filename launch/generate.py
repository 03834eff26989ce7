"""Answers questions about a video or images.

  python -m launch.generate --model=runs/mine --video=clip.mp4 --prompt="Point to the red circle." \\
      --render=points.png
  python -m launch.generate --model=hf/mine --image=a.png --prompt="What is this?" --stream \\
      --temperature=0.7 --top_p=0.9 --seed=1 --stop="." --max_new_tokens=200

--model is the work directory of a run or a Hugging Face folder. --prompt may be repeated: the media are read
once for all questions. Points of the answers are listed in pixels with their time in seconds or the number
of their image; --render draws them: a picture for .png and .jpg, an animation for .gif and .mp4. --stream
shows text as soon as it is complete. An answer ends where the model ends it, before a --stop text, or after
--max_new_tokens tokens. Sampling: --temperature divides the logits, then --top_k and --top_p leave the most
likely tokens, then --seed decides the draw. Logits that are not finite, as of a diverged run, end the command
with one sentence that names such weights.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence

from absl import flags

from launch import cli
from launch import trained
from molmo2_jax import decode
from molmo2_jax import files
from molmo2_jax import generate
from molmo2_jax import render
from molmo2_jax import types

_VIDEO = flags.DEFINE_string("video", None, "Any video FFmpeg reads.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A question")
_RENDER = flags.DEFINE_string(
    "render", None, f"File that receives the points drawn on the frames: {', '.join(render.SUFFIXES)}.")
_JSON = flags.DEFINE_bool("json", False, "Print text, points and timings as JSON, a line per question.")
_STREAM = flags.DEFINE_bool("stream", False, "Print the text while it is written.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text that ends the answer before it")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among this many most likely tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens that reach this probability.")
_CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, ["float32", "bfloat16"],
                                 "Of the keys and values kept while answering; default: that of --dtype.")
for _name in ("model", "max_new_tokens", "seed", "dtype", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    _check_flags()
    sampling = decode.Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
                               seed=cli.SEED.value)
    source = trained.load(cli.MODEL.value)
    answerer = generate.Answerer(
        source.params, source.model, source.inputs, source.tokenizer, sampling=sampling, stop=_STOP.value,
        max_new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value, cache_dtype=_CACHE_DTYPE.value)
    video, images = _VIDEO.value, tuple(_IMAGE.value)
    example = types.Example(annotations=(), video=video, images=images)
    if _STREAM.value:
        answers = show(answerer.stream(example, _PROMPT.value), _PROMPT.value)
    else:
        answers = answerer.answer(example, _PROMPT.value)
        for prompt, answer in zip(_PROMPT.value, answers):
            plain = f"{heading(prompt, _PROMPT.value)}{answer}"
            print(files.to_json(as_json(answer)) if _JSON.value else plain)
    if _RENDER.value:
        points = tuple(point for answer in answers for point in answer.points)
        render.save_answer(dataclasses.replace(answers[0], points=points), _RENDER.value,
                           video=video, images=images)
        print(f"wrote {_RENDER.value}", file=sys.stderr)


def _check_flags() -> None:
    """Raises ValueError for what can be seen before a large model is read."""
    if not (cli.MODEL.value and _PROMPT.value):
        raise ValueError("--model and --prompt must be given (--help explains them); got no "
                         + ("--prompt" if cli.MODEL.value else "--model"))
    if not all(map(str.strip, _PROMPT.value)):
        raise ValueError("--prompt must be a question; got an empty one")
    media = [*_IMAGE.value, *([] if _VIDEO.value is None else [_VIDEO.value])]
    if _VIDEO.value and _IMAGE.value:
        raise ValueError("a question is about one --video or about --image files; got both")
    if _STREAM.value and _JSON.value:
        raise ValueError("--stream prints text and --json whole answers; got both")
    for path in media:
        if not pathlib.Path(path).is_file():
            raise ValueError(f"--video and --image must name files; found none at {path!r}")
    if _RENDER.value:
        if not media:
            raise ValueError("--render draws on a --video or on --image files; got neither")
        render.suffix(_RENDER.value)
        cli.output_file(_RENDER.value)


def heading(prompt: str, prompts: Sequence[str]) -> str:
    """Returns a line that names the question, if there are several."""
    return f"> {prompt}\n" if len(prompts) > 1 else ""


def show(pieces: Iterable[generate.Piece], prompts: Sequence[str]) -> list[generate.Answer]:
    """Prints pieces as they come, one answer after the other, and returns the answers."""
    ready, held, turn = {}, [heading(prompt, prompts) for prompt in prompts], 0
    for piece in pieces:
        held[piece.question] += piece.text
        if piece.answer:
            held[piece.question] += str(piece.answer).removeprefix(piece.answer.text) + "\n"
            ready[piece.question] = piece.answer
        while turn < len(prompts):
            print(held[turn], end="", flush=True)
            held[turn] = ""
            if turn not in ready:
                break
            turn += 1
    return [ready[number] for number in range(len(prompts))]


def as_json(answer: generate.Answer) -> dict:
    """Returns the answer as plain values; the index of a point is a time (s) or an image number."""
    return {"text": answer.text,
            "points": [point._asdict() for point in answer.points],
            "tracks": [tracked._asdict() for tracked in answer.tracks],
            "is_complete": answer.is_complete, "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens, "logprob": answer.logprob, "seconds": dict(answer.seconds)}


if __name__ == "__main__":
    cli.start(main)
