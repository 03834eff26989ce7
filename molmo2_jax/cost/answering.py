"""What answering needs of a device's memory, by formula; compiling (aot/generate.py) gives the exact number.

T tokens of a row, M crops.
"""

import math
from typing import NamedTuple

from molmo2_jax import config as config_lib

TEXT_PER_FRAME = 15      # tokens around the visual tokens of a frame: time, markers
QUESTION_TOKENS = 1024   # room for questions
MARGIN = 1.1             # compiled programs of the released models need 0.9 to 1.05 of the formula


def longest_prompt(config: config_lib.Molmo2Config, inputs: config_lib.InputConfig) -> int:
    """Returns about the most tokens of a prompt about a video of `max_frames` frames."""
    rows, columns = config.connector.video_window
    side = config.vision.grid
    visual = -(-side // rows) * -(-side // columns)
    return min(config.text.max_positions, inputs.max_frames * (visual + TEXT_PER_FRAME) + QUESTION_TOKENS)


def cache_bytes(config: config_lib.Molmo2Config, tokens: int, width: int, parts: int = 1) -> float:
    """Returns the bytes of one row's keys and values on one of `parts` devices that share the heads.

    Args:
      width: bytes of a value.
    """
    t = config.text
    shared = parts if t.num_kv_heads % parts == 0 else 1
    return 2.0 * t.num_layers * t.num_kv_heads / shared * t.head_dim * tokens * width


def peak_bytes(config: config_lib.Molmo2Config, *, parameters: float, tokens: int, crops: int, rows: int,
               new_tokens: int, width: int, tensor: int = 1) -> float:
    """Returns about the peak of a device that answers `rows` rows with `tensor` devices.

    The larger of two moments: the ViT's activations, or the prompt's keys and values twice (as the layers
    give them and as decoding reads them) with the activations of an MLP.

    Args:
      parameters: bytes of the parameters on the device.
      width: bytes of a value of the computation.
    """
    v, t = config.vision, config.text
    vit = rows * crops / tensor * v.num_patches * (2 * v.mlp_width + 6 * v.width) * width
    prompt = rows * (2 * cache_bytes(config, tokens, width, tensor)
                     + tokens * (3 * t.mlp_width / tensor + 4 * t.width) * width)
    answers = rows * cache_bytes(config, new_tokens, width, tensor)
    return MARGIN * (parameters + answers + max(vit, prompt))


class Fit(NamedTuple):
    """How many devices share the rows and the weights, and about the bytes that each of them needs."""
    data: int
    tensor: int
    needed: float


def smallest(config: config_lib.Molmo2Config, *, parameters: float, devices: int, limit: float, rows: int,
             width: int, **row) -> Fit:
    """Returns the fewest devices along `tensor` that fit the limit, all of them if none do.

    The devices that are left share the rows.

    Args:
      parameters: bytes of all parameters.
      limit: bytes of a device.
      row: sizes of a row, see `peak_bytes`.
    """
    for tensor in [2**power for power in range(devices.bit_length()) if devices % 2**power == 0]:
        data = min(devices // tensor, rows)
        needed = peak_bytes(config, parameters=parameters / tensor, rows=math.ceil(rows / data),
                            width=width, tensor=tensor, **row)
        if needed <= limit:
            break
    return Fit(data, tensor, needed)
