"""The files next to the weights: input processors, tokenizer, chat template and generation settings.

Written as separate files, which transformers, the released remote code and vLLM all read; read from these or
from the nested processor_config.json that transformers writes.

Source: reference: olmo/hf_model/processing_molmo2.py, convert_molmo2_to_hf.py; transformers:
models/molmo2/processing_molmo2.py.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from molmo2_jax import config as config_lib
from molmo2_jax.hf import config as hf_config
from molmo2_jax.inputs import prompt
from molmo2_jax.inputs import text_file
from molmo2_jax.inputs import tokenizer as tokenizer_lib

IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

# Without these switches the overview of an image would get column tokens that training did not use.
_SWITCHES = {"image_use_col_tokens": True, "use_single_crop_col_tokens": False,
             "use_single_crop_start_token": True, "video_use_col_tokens": False}
_FRAME_TOKENS = "use_frame_special_tokens"  # the only switch with both values in use
_LOW_RES = "use_low_res_token_for_global_crops"   # <im_low> in overviews: true for models with a pointer
_NUM_POINTS = 31200   # ids by which generation frameworks carry choices: enough for 384 frames
_PADS = ("<|pad|>", tokenizer_lib.END_OF_TEXT)  # first of these that the vocabulary has, else EOS

_TEMPLATE = """\
{#- Visual placeholders, then an optional subtitle message, then user and assistant turns. -#}
{%- set plain_styles = STYLES -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- if part.get('style') and part['style'] not in plain_styles -%}
                {{- part['style'] ~ ': ' -}}
            {%- endif -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set media = namespace(images=0, videos=0) -%}
{%- for message in messages if message['content'] is not string -%}
    {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}{%- set media.images = media.images + 1 -%}
        {%- elif part['type'] == 'video' -%}{%- set media.videos = media.videos + 1 -%}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- for number in range(media.images) -%}
    {%- if media.images > 1 -%}{{- 'Image ' ~ (number + 1) -}}{%- endif -%}
    {{- '<|image|>' -}}
{%- endfor -%}
{{- '<|video|>' * media.videos -}}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'subtitle' -%}
    {{- text_of(messages[0]) -}}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('roles must alternate user, assistant, user, ...; got ' ~ message['role']) -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if not loop.first -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
        {{- '<|im_start|>user\\n' ~ text_of(message) ~ '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>assistant\\n' ~ text_of(message) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def chat_template() -> str:
    """Returns the Jinja template that writes a conversation as `inputs.prompt` does."""
    return _TEMPLATE.replace("STYLES", json.dumps(sorted(prompt.STYLES_WITHOUT_PREFIX)))


def _check_exportable(inputs: config_lib.InputConfig) -> None:
    for field in ("frame_time_text", "per_frame_special_tokens"):
        if not getattr(inputs, field):
            raise ValueError(f"{field} must be True to be exported, since other processors always write it; "
                             "got False")


def write(config: config_lib.Molmo2Config, inputs: config_lib.InputConfig) -> dict[str, dict[str, Any]]:
    """Returns {file name: JSON object} of the three processor files.

    Fields are those of the released files, and our own `max_images` and `high_res_crops`, which other readers
    ignore.

    Raises:
      ValueError: other processors cannot prepare inputs this way.
    """
    _check_exportable(inputs)
    side = config.vision.image_size
    pixels = {"size": {"height": side, "width": side}, "resample": 2, "image_mean": [0.5] * 3,
              "image_std": [0.5] * 3, "do_convert_rgb": True, "patch_size": config.vision.patch_size,
              "processor_class": "Molmo2Processor"}
    steps = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    fps = int(inputs.max_fps) if inputs.max_fps == int(inputs.max_fps) else inputs.max_fps
    return {
        IMAGE_FILE: {"image_processor_type": "Molmo2ImageProcessor", **pixels,
                     "max_crops": inputs.max_crops, "overlap_margins": list(inputs.overlap_margins),
                     "pooling_size": list(config.connector.image_window),
                     "max_images": inputs.max_images, "high_res_crops": inputs.high_res_crops},
        VIDEO_FILE: {"video_processor_type": "Molmo2VideoProcessor", **pixels, **steps,
                     "pooling_size": list(config.connector.video_window),
                     "frame_sample_mode": "uniform_last_frame", "num_frames": inputs.max_frames,
                     "max_fps": fps, "sampling_fps": 2, "do_sample_frames": True},
        PROCESSOR_FILE: {"processor_class": "Molmo2Processor", **_SWITCHES,
                         **({} if config.pointer is None else {_LOW_RES: True}),
                         _FRAME_TOKENS: inputs.use_frame_special_tokens},
    }


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object of a file.

    Raises:
      ValueError: the file is missing or contains no JSON object.
    """
    try:
        values = text_file.read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"a checkpoint folder must hold a readable {path.name}; {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(values).__name__}")
    return values


def _read_optional(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def uses_frame_tokens(folder: pathlib.Path) -> Any:
    """Returns `use_frame_special_tokens` of the processor file, unchecked; True if it is absent."""
    return _read_optional(folder / PROCESSOR_FILE).get(_FRAME_TOKENS, True)


def read(folder: pathlib.Path, config: config_lib.Molmo2Config
         ) -> tuple[config_lib.Molmo2Config, config_lib.InputConfig]:
    """Returns the config with the pooling windows of a checkpoint folder, and its InputConfig.

    Fields of a missing file keep their defaults; fields we do not use are ignored. Frame markers follow
    `use_frame_special_tokens` of the processor file, not of config.json, where the reference's converter
    writes false regardless of the training, as in the released 4B.

    Raises:
      ValueError: the files describe inputs that the model or `inputs` does not support; all such fields.
    """
    problems: list[str] = []
    joint = _read_optional(folder / PROCESSOR_FILE)
    section = lambda file, nested: hf_config.Section(
        file, _read_optional(folder / file) or joint.get(nested) or {}, problems)
    image, video = section(IMAGE_FILE, "image_processor"), section(VIDEO_FILE, "video_processor")
    switches = hf_config.Section(PROCESSOR_FILE, joint, problems)
    for field, value in _SWITCHES.items():
        switches.expect(value, field)
    switches.expect(config.pointer is not None, _LOW_RES)
    frame_tokens = uses_frame_tokens(folder)
    if not isinstance(frame_tokens, bool):  # other processors read null as false
        switches.complain(_FRAME_TOKENS, "must be true or false", frame_tokens)
    side = config.vision.image_size
    for one in (image, video):
        one.expect(config.vision.patch_size, "patch_size")
        one.expect({"height": side, "width": side}, "size")
        one.expect(2, "resample")
        one.expect([0.5] * 3, "image_mean", "image_std")
        one.expect(True, "do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    video.expect("uniform_last_frame", "frame_sample_mode")
    base, windows = config_lib.InputConfig(), config.connector
    values = dict(
        max_crops=image.read("max_crops", kind=int, default=base.max_crops),
        high_res_crops=image.read("high_res_crops", kind=int, default=base.high_res_crops),
        overlap_margins=image.read("overlap_margins", kind=list, default=base.overlap_margins),
        max_images=image.read("max_images", kind=int, default=base.max_images),
        max_frames=video.read("num_frames", kind=int, default=base.max_frames),
        max_fps=float(video.read("max_fps", kind=float, default=base.max_fps)),
        use_frame_special_tokens=frame_tokens)
    image_window = image.read("pooling_size", kind=list, default=windows.image_window)
    video_window = video.read("pooling_size", kind=list, default=windows.video_window)
    if problems:
        raise ValueError(f"the processor files in {folder} must fit the model: " + "; ".join(problems))
    connector = dataclasses.replace(windows, image_window=image_window, video_window=video_window)
    return dataclasses.replace(config, connector=connector), config_lib.InputConfig(**values)


def _pad_text(tokenizer: tokenizer_lib.Tokenizer) -> str:
    for text in _PADS:
        ids = tokenizer.encode(text)
        if len(ids) == 1 and ids[0] < tokenizer.vocab_size:
            return text
    return tokenizer.token(tokenizer.eos_id)


def write_tokenizer(folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer,
                    config: config_lib.Molmo2Config | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    For a model with a pointer, tokenizer.json also has the ids by which generation frameworks carry choices.
    """
    tokenizer.save(folder)
    if config is not None and config.pointer is not None:
        values = read_json(folder / "tokenizer.json")
        values["added_tokens"] += _choice_tokens(config)
        (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    pad = _pad_text(tokenizer)
    settings = json.loads(path.read_text(encoding="utf-8")) | {
        "bos_token": tokenizer.token(tokenizer.bos_id), "eos_token": tokenizer.token(tokenizer.eos_id),
        "pad_token": pad, "padding_side": "left", "add_bos_token": False,
        "processor_class": "Molmo2Processor"}
    write_json(path, settings)
    (folder / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    write_json(folder / "generation_config.json", {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.encode(pad)[0]})


def choice_ids(config: config_lib.Molmo2Config) -> dict[str, int]:
    """Returns {text: id} of the tokens after the special ones that a model with a pointer has on the hub:
    fillers up to the end of the second table, then `<POINT_k>`, which have no embedding."""
    fillers = config.text.additional_vocab_size - len(config_lib.SPECIAL_TOKENS)
    texts = [f"<EXTRA_TOKENS_POINT_{k}>" for k in range(fillers)]
    texts += [f"<POINT_{k}>" for k in range(_NUM_POINTS)]
    first = config.text.vocab_size + len(config_lib.SPECIAL_TOKENS)
    return {text: first + place for place, text in enumerate(texts)}


def _choice_tokens(config: config_lib.Molmo2Config) -> list[dict[str, Any]]:
    return [{"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": True, "special": False} for text, number in choice_ids(config).items()]


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object formatted as in the released folders, fields in alphabetical order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
