"""Compiles answering for an absent TPU slice: prefill and decoding on a mesh, as decode.py runs them."""

import dataclasses

import jax
import jax.numpy as jnp

from molmo2_jax import config as config_lib
from molmo2_jax import decode
from molmo2_jax import sharding
from molmo2_jax import state as state_lib
from molmo2_jax import types
from molmo2_jax.aot import step as aot_step
from molmo2_jax.cost import answering
from molmo2_jax.cost import chips as chips_lib
from molmo2_jax.cost import flops as flops_lib
from molmo2_jax.cost import hlo
from molmo2_jax.model import molmo2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersReport:
    """What is known of the two programs; bytes of one device, operations of the prefill of all rows."""
    topology: str
    mesh: dict[str, int]
    dtype: str
    weights: str | None         # "int8", or None: in dtype
    rows: int
    questions: int              # per row
    prompt_tokens: int
    crops: int
    new_tokens: int             # most tokens of each answer
    parameters: int
    memory: int                 # keys and values of prompts and answers
    prefill_peak: int
    decode_peak: int
    available: int
    flops: flops_lib.Flops
    prefill_seconds: float      # lower bound: operations
    token_seconds: float        # lower bound: each device reads its weights, keys and values, and exchanges
    exchanged: float            # bytes that a device sends for one token
    most_rows: int              # that fit, by the bytes of a row; 0 if not even one does
    compile_seconds: float

    @property
    def headroom(self) -> int:
        return self.available - max(self.prefill_peak, self.decode_peak)


def compile_answers(model_config: config_lib.Molmo2Config, shape: types.RowShape, topology: str, *,
                    rows: int = 1, questions: int = 1, new_tokens: int = 512, dtype: str = "float32",
                    weights: str | None = None, mesh_config: sharding.MeshConfig | None = None
                    ) -> AnswersReport:
    """Returns the AnswersReport of answering prompts of `shape` on devices of the slice.

    Args:
      rows: of all devices, rounded up to a multiple of the mesh's data x fsdp.
      weights: see decode.stored.
      mesh_config: over the first devices of the slice; None: `smallest_mesh`.

    Raises:
      ValueError: unknown topology, or a mesh with more devices than the slice has.
      aot_step.DoesNotFit: a ValueError that says by how much, and what may help.
    """
    chip = chips_lib.find(topology).chip
    found = aot_step.devices(topology)
    config = mesh_config or smallest_mesh(model_config, shape, chip, len(found), rows, new_tokens, dtype,
                                          weights)
    mesh = sharding.mesh_of_first(config, found)
    groups, parts = (mesh.shape[a] * mesh.shape[b] for a, b in (("data", "fsdp"), ("tensor", "context")))
    rows, shape = -(-rows // groups) * groups, shape._replace(M=-(-shape.M // parts) * parts)
    with jax.set_mesh(mesh):
        begin, advance, params, memory = lower(model_config, shape, rows, questions, new_tokens, dtype,
                                               weights, mesh)
        hints = lambda *_: _hints(dtype, weights, rows // groups, mesh, len(found))
        (reading, first), (writing, second) = (aot_step.compile_lowered(program, hints)
                                               for program in (begin, advance))
    once = _read(model_config, shape, rows, questions)
    exchanged = sum(hlo.collectives(writing.as_text(), mesh.size).values())
    peaks = [one.memory_analysis().peak_memory_in_bytes for one in (reading, writing)]
    return AnswersReport(
        topology=chips_lib.find(topology).name, mesh=dict(mesh.shape), dtype=dtype, weights=weights,
        rows=rows, questions=questions, prompt_tokens=shape.T, crops=shape.M, new_tokens=new_tokens,
        parameters=params, memory=memory, prefill_peak=peaks[0], decode_peak=peaks[1], available=chip.memory,
        flops=once, prefill_seconds=once.total / (chip.flops * mesh.size),
        token_seconds=(params + memory) / chip.memory_rate + exchanged / chip.ici_rate, exchanged=exchanged,
        most_rows=int(groups * ((chip.memory - params) // ((max(peaks) - params) / (rows / groups)))),
        compile_seconds=first + second)


def smallest_mesh(model_config, shape: types.RowShape, chip: chips_lib.Chip, num_devices: int, rows: int,
                  new_tokens: int, dtype: str, weights: str | None) -> sharding.MeshConfig:
    """Returns the mesh with the fewest devices along `tensor` that fits by formula; all devices if none."""
    fit = answering.smallest(
        model_config, parameters=decode.stored_bytes(
            state_lib.boxed_params(molmo2.Molmo2(model_config)), dtype, weights), devices=num_devices,
        limit=chip.memory, rows=rows, width=jnp.dtype(dtype).itemsize, tokens=shape.T, crops=shape.M,
        new_tokens=new_tokens)
    return sharding.MeshConfig(data=fit.data, fsdp=1, tensor=fit.tensor)


def _hints(dtype: str, weights: str | None, rows: int, mesh, num_devices: int) -> list[str]:
    tensor = 2 * mesh.shape["tensor"]
    return [*(["--dtype=bfloat16"] if dtype == "float32" else []),
            *([] if weights else ["--weights=int8"]),
            *([f"fewer rows (here {rows} on each device)"] if rows > 1 else []),
            *([f"--mesh=tensor={tensor}"] if tensor <= num_devices else []),
            "a chip with more memory", "fewer tokens or crops in the prompt"]


def _read(model_config, shape, rows: int, questions: int) -> flops_lib.Flops:
    """Returns the operations of prefill: the head reads only the last token of each question."""
    T, M, R, W = shape
    once = flops_lib.forward(model_config, tokens=rows * T, crops=rows * M, windows=rows * R, slots=W,
                             pairs=rows * T * T / 2)
    spared = 2.0 * rows * (T - questions) * model_config.text.width * model_config.text.vocab_size
    return once._replace(decoder=once.decoder - spared)


def lower(model_config, shape, rows, questions, new_tokens, dtype, weights, mesh):
    """Returns (lowered decode.begin, lowered decode.advance, bytes of parameters, bytes of the memory), for
    the mesh that is set."""
    whole = sharding.replicated(mesh)
    model = molmo2.Molmo2(model_config, dtype=dtype, remat="none")
    params = decode.abstract_stored(state_lib.abstract_params(model, mesh), dtype, weights)
    batch = aot_step.abstract_batch(model_config, shape, rows, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    asked = decode.Questions(*(jax.ShapeDtypeStruct((rows, questions), jnp.int32, sharding=whole),) * 3)
    begin = decode.begin.lower(model, params, batch, asked, number, number, None, num_new=new_tokens,
                               sampling=decode.GREEDY, cache_dtype=None)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), begin.out_info,
                         decode.layout(begin.out_info, mesh))
    advance = decode.advance.lower(model, params, state, number, number, None, sampling=decode.GREEDY)
    return begin, advance, aot_step.bytes_per_device(params), aot_step.bytes_per_device(state.memory)
