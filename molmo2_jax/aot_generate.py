"""Compiles answering for a TPU that is not there: reading a prompt and writing, on one chip as decode.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from molmo2_jax import aot
from molmo2_jax import chips as chips_lib
from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import flops as flops_lib
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import types
from molmo2_jax.model import molmo2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersReport:
    """What is known of the two programs; bytes of one chip, operations of reading one batch of prompts."""
    topology: str
    dtype: str
    rows: int
    questions: int              # of each row
    prompt_tokens: int
    crops: int
    new_tokens: int             # room for each answer
    parameters: int
    memory: int                 # keys and values of prompts and answers
    prefill_peak: int
    decode_peak: int
    available: int
    flops: flops_lib.Flops
    prefill_seconds: float      # no faster: operations
    token_seconds: float        # no faster: parameters, keys and values are read once
    compile_seconds: float

    @property
    def headroom(self) -> int:
        return self.available - max(self.prefill_peak, self.decode_peak)


def compile_answers(model_config: config_lib.Molmo2Config, shape: types.RowShape, topology: str, *,
                    rows: int = 1, questions: int = 1, new_tokens: int = 512, dtype: str = "float32"
                    ) -> AnswersReport:
    """Returns the AnswersReport of answering prompts of `shape` on one chip of the slice.

    Raises:
      ValueError: unknown topology.
      aot.DoesNotFit: a ValueError that says by how much, and what would help.
    """
    chip = chips_lib.find(topology).chip
    mesh = sharding.make_mesh(sharding.MeshConfig(), aot.devices(topology)[:1])
    with jax.set_mesh(mesh):
        begin, advance, params, memory = _lower(model_config, shape, rows, questions, new_tokens, dtype, mesh)
        hints = lambda: (["--dtype=bfloat16"] if dtype == "float32" else []) + [
            "a chip with more memory", "fewer tokens or crops in the prompt"]
        (reading, first), (writing, second) = (aot.compile_lowered(program, hints, chip)
                                               for program in (begin, advance))
    once = _read(model_config, shape, rows, questions)
    return AnswersReport(
        topology=chips_lib.find(topology).name, dtype=dtype, rows=rows, questions=questions,
        prompt_tokens=shape.T, crops=shape.M, new_tokens=new_tokens, parameters=params, memory=memory,
        prefill_peak=reading.memory_analysis().peak_memory_in_bytes,
        decode_peak=writing.memory_analysis().peak_memory_in_bytes, available=chip.memory, flops=once,
        prefill_seconds=once.total / chip.flops, token_seconds=(params + memory) / chip.memory_rate,
        compile_seconds=first + second)


def _read(model_config, shape, rows: int, questions: int) -> flops_lib.Flops:
    """Returns the operations of reading the prompts: the head sees the last token of each question only."""
    T, M, R, W = shape
    once = flops_lib.forward(model_config, tokens=rows * T, crops=rows * M, windows=rows * R, slots=W,
                             pairs=rows * T * T / 2)
    spared = 2.0 * rows * (T - questions) * model_config.text.width * model_config.text.vocab_size
    return once._replace(decoder=once.decoder - spared)


def _lower(model_config, shape, rows, questions, new_tokens, dtype, mesh):
    """Returns (lowered decode.begin, lowered decode.advance, bytes of parameters, bytes of the memory)."""
    place = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.replicated(mesh)))
    model = molmo2.Molmo2(model_config, dtype=dtype, remat="none")
    params = place(jax.eval_shape(functools.partial(decode.ready, dtype=dtype, unroll=False),
                                  state_lib.abstract_params(model, mesh)))
    batch = place(aot.abstract_batch(model_config, shape, rows, mesh))
    number = place(jax.ShapeDtypeStruct((), jnp.int32))
    asked = decode.Questions(*(place(jax.ShapeDtypeStruct((rows, questions), jnp.int32)),) * 3)
    begin = decode.begin.lower(model, params, batch, asked, number, number, None, num_new=new_tokens,
                               sampling=decode.GREEDY, cache_dtype=None)
    state = place(begin.out_info)
    advance = decode.advance.lower(model, params, state, number, number, None, sampling=decode.GREEDY)
    return begin, advance, aot.bytes_per_device(params), aot.bytes_per_device(state.memory)
