"""Changes that make a step fit that does not, by computing the memory that each of them needs.

A miss is the memory that the compiler asked for. State and batch of it are known; gradients are as large as
parameters; the head and two layers of the decoder are there gathered (bfloat16), with their gradients
(float32); all else is taken to shrink with the tokens of a device.
"""

from molmo2_jax import config as config_lib

MARGIN = 1.03     # computed memory is raised by this: 27.4 GiB were computed where 27.5 were compiled
_GATHERED = 6     # bytes per parameter: bfloat16, and its float32 gradient


def gathered(model: config_lib.Molmo2Config, tensor: int) -> int:
    """Returns the bytes of head and two layers of the decoder, gathered, on one of `tensor` devices."""
    t = model.text
    layer = t.width * (2 * t.head_dim * (t.num_heads + t.num_kv_heads) + 3 * t.mlp_width)
    return _GATHERED * (t.width * t.vocab_size + 2 * layer) // tensor


def fitting(*, needed: float, available: float, parameters: int, optimiser: int, data: int, fixed: int,
            accumulate: int, rows_per_group: int, data_axis: int, fsdp_axis: int) -> list[str]:
    """Returns the changes after which a step that needs `needed` bytes is computed to fit in `available`.

    All sizes in bytes of a device. `fixed`: see gathered; `rows_per_group`: rows of one group of devices in a
    micro-batch. Each change alone suffices. If none does, the only entry says so.
    """
    rest = max(needed - 2 * parameters - optimiser - data - fixed, 0)
    state = parameters + optimiser + data + fixed
    found = []

    def offer(size, text):
        if MARGIN * size <= available:
            found.append(f"{text}: {MARGIN * size / 2**30:.1f} GiB computed")
        return MARGIN * size <= available

    for factor in (factor for factor in range(2, rows_per_group + 1) if rows_per_group % factor == 0):
        if offer(state + 2 * parameters + rest / factor,
                 f"train.TrainConfig.accumulate = {accumulate * factor} (micro-batches)"):
            break
    if optimiser:
        offer(needed - optimiser, "optim.OptimConfig.offload = True (moments in the hosts' memory)")
    for factor in (factor for factor in (2, 4, 8) if data_axis % factor == 0):
        if offer(needed - (2 * parameters + optimiser) * (1 - 1 / factor),
                 f"sharding.MeshConfig.fsdp = {fsdp_axis * factor} and data = {data_axis // factor}"):
            break
    for factor in (2, 4, 8):
        if offer(state + parameters + rest / factor,
                 f"{factor} times the chips (with more rows in parallel, or a larger context axis)"):
            break
    return found or ["none of accumulate, offload, a wider fsdp or 8 times the chips is enough by itself"]
