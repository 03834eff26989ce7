"""Answers a question about a video or images.

  python -m launch.generate --model=runs/mine --video=clip.mp4 --prompt="Point to the red circle." \
      --render=points.png

--model is the work directory of a run or a Hugging Face folder. Points of the answer are listed in
pixels with their time in seconds or the number of their image; --render draws them: a picture for .png
and .jpg, an animation for .gif and .mp4.
"""

import json

from absl import flags

from launch import cli
from launch import trained
from molmo2_jax import decode
from molmo2_jax import generate
from molmo2_jax import render

_VIDEO = flags.DEFINE_string("video", None, "Any video FFmpeg reads.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image; may be repeated.")
_PROMPT = flags.DEFINE_string("prompt", None, "The question.")
_RENDER = flags.DEFINE_string("render", None, "File that receives the points drawn on the frames.")
_JSON = flags.DEFINE_bool("json", False, "Print text, points and timings as JSON.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0.0)
for _name in ("model", "max_new_tokens", "seed", "dtype", "traceback"):
    flags.declare_key_flag(_name)


def main(arguments: list[str]) -> None:
    cli.no_arguments(arguments)
    if not (cli.MODEL.value and _PROMPT.value):
        raise ValueError("--model and --prompt are needed (--help explains them)")
    if _VIDEO.value and _IMAGE.value:
        raise ValueError("a question is about one --video or about --image files; got both")
    source = trained.load(cli.MODEL.value)
    media = {"video": _VIDEO.value, "images": tuple(_IMAGE.value)}
    answer = generate.answer(
        source.params, source.model, source.inputs, source.tokenizer, _PROMPT.value, **media,
        max_new_tokens=cli.MAX_NEW_TOKENS.value, dtype=cli.DTYPE.value,
        sampling=decode.Sampling(temperature=_TEMPERATURE.value, seed=cli.SEED.value))
    print(json.dumps(as_json(answer)) if _JSON.value else answer)
    if _RENDER.value:
        render.save_answer(answer, _RENDER.value, **media)


def as_json(answer: generate.Answer) -> dict:
    """Returns the answer as plain values; the index of a point is a time (s) or an image number."""
    return {"text": answer.text,
            "points": [point._asdict() for point in answer.points],
            "tracks": [tracked._asdict() for tracked in answer.tracks],
            "is_complete": answer.is_complete, "prompt_tokens": answer.prompt_tokens,
            "new_tokens": answer.new_tokens, "logprob": answer.logprob, "seconds": dict(answer.seconds)}


if __name__ == "__main__":
    cli.start(main)
