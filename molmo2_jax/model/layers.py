"""Layers shared by the towers: pure functions first, then the modules that own parameters.

B batch, T positions, N heads, H head width, h = H / 2, D width; `...` any leading dimensions.
"""

import functools
import math
from collections.abc import Callable

import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from molmo2_jax import config as config_lib
from molmo2_jax import sharding
from molmo2_jax.attention import tiling
from molmo2_jax.model import quantized

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(tiling.OUT, tiling.LOG_SUM),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rms_norm(x, scale, eps: float):
    """Returns scale * x / rms(x) over the last axis; statistics in float32, cast back before the scale."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(x, scale, bias, eps: float):
    """Returns LayerNorm over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale + bias).astype(x.dtype)


def inverse_frequencies(theta: float, head_dim: int, yarn: config_lib.YarnConfig | None) -> np.ndarray:
    """Returns float32[H/2] radians per position; `yarn` lowers the low frequencies.

    Each step is rounded to float32 as in the reference: rounding once at the end changes last bits, which are
    0.002 radians at position 36863.

    Source: reference, olmo/nn/rope.py.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)
    inverse = 1 / periods
    if yarn is not None:
        def rotations_at(count):
            turns = yarn.original_length / (count * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(theta))
        low = max(math.floor(rotations_at(yarn.beta_fast)), 0)
        high = min(math.ceil(rotations_at(yarn.beta_slow)), head_dim - 1)
        span = np.float32(high - low if high != low else 1e-3)
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / span, 0, 1)
        inverse = 1 / (np.float32(yarn.factor) * periods) * ramp + inverse * (1 - ramp)
    assert inverse.dtype == np.float32
    return inverse


def rope_tables(positions_BT, inverse: np.ndarray, factor: float = 1.0):
    """Returns (cos, sin) float32[B, T, H/2]; bfloat16 would round position 257 to 256."""
    angles = positions_BT[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTNH, cos_BTh, sin_BTh):
    """Returns x with dimension i rotated against dimension i + H/2, in float32, cast back."""
    first_BTNh, second_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
    rotated = first_BTNh * cos - second_BTNh * sin, second_BTNh * cos + first_BTNh * sin
    return jnp.concatenate(rotated, -1).astype(x_BTNH.dtype)


def dropout(x_BTD, rate_BT, rng):
    """Returns x with elements dropped at a rate per position, the rest scaled up; x itself without rng."""
    if rng is None:
        return x_BTD
    keep_BT1 = 1.0 - rate_BT[..., None]
    kept = jax.random.uniform(rng, x_BTD.shape) < keep_BT1
    return jnp.where(kept, x_BTD / keep_BT1.astype(x_BTD.dtype), 0)


def _multiply(x, kernel, num_in: int):
    dimensions = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    return jax.lax.dot_general(x, kernel, (dimensions, ((), ())))


def _placed(x, kernel, place: Callable, axes: tuple[str | None, ...] | None):
    """Returns the kernel in x's dtype after `place(kernel, axes)`; 8 bits are moved as 8 bits."""
    if quantized.is_int8(kernel):
        return place(kernel.values, axes).astype(x.dtype)
    return place(kernel.astype(x.dtype), axes)


def _scaled(y, kernel):
    """Returns a product with the kernel: of 8 bits, its values alone have been multiplied."""
    return (y * kernel.scale).astype(y.dtype) if quantized.is_int8(kernel) else y


def contract(x, kernel, num_in: int, axes: tuple[str | None, ...] | None):
    """Returns x with its last `num_in` axes contracted against the first `num_in` of the kernel.

    The kernel, of logical `axes`, is cast to x's dtype and then gathered from the devices (None: it is
    already whole). Its gradient has its own dtype, and is summed in it over positions and devices. A
    quantized.Int8 is gathered first and has no gradient.
    """
    if quantized.is_int8(kernel):
        return _scaled(_multiply(x, _placed(x, kernel, sharding.gathered, axes), num_in), kernel)
    return _contract(x, kernel, num_in, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contract(x, kernel, num_in, axes):
    return _multiply(x, _placed(x, kernel, sharding.gathered, axes), num_in)


def _contract_forward(x, kernel, num_in, axes):
    # Not `_contract`: remat policies would not see the product inside it.
    return _multiply(x, _placed(x, kernel, sharding.gathered, axes), num_in), (x, kernel)


def _contract_backward(num_in, axes, residuals, grad):
    x, kernel = residuals
    num_out, num_rows = kernel.ndim - num_in, x.ndim - num_in
    outs = (tuple(range(grad.ndim - num_out, grad.ndim)), tuple(range(num_in, kernel.ndim)))

    def plain(x, grad):
        rows = tuple(range(num_rows))
        return jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)

    def folded(x, grad):  # XLA's CPU backend is four times slower at contracting two axes than one
        rows = math.prod(x.shape[:num_rows])
        product = jnp.matmul(x.reshape(rows, -1).T, grad.reshape(rows, -1),
                             preferred_element_type=kernel.dtype)
        return product.reshape(kernel.shape)

    on_device = jax.lax.platform_dependent(x, grad, cpu=folded, default=plain)
    whole = sharding.gathered(kernel.astype(grad.dtype), axes)
    return jax.lax.dot_general(grad, whole, (outs, ((), ()))), sharding.scattered(on_device, axes)


_contract.defvjp(_contract_forward, _contract_backward)


def contract_in_place(x, kernel, num_in: int, axes: tuple[str | None, ...]):
    """Returns the same as `contract` without gathering any part of the kernel, and without its gradient.

    Inputs and partial sums of outputs are exchanged instead, which moves less where positions are few, as in
    decoding.
    """
    x = sharding.along(x, axes, kernel.shape, slice(num_in))
    y = _multiply(x, _placed(x, kernel, sharding.scattered, axes), num_in)
    return _scaled(sharding.along(y, axes, kernel.shape, slice(num_in, None)), kernel)


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]):
    """Returns `module.param(name, init, shape)`, or the quantized.Int8 of this shape in its place.

    Raises:
      flax.errors.ScopeParamShapeError: the given parameter has another shape.
    """
    given = module.get_variable("params", name)
    if not quantized.is_int8(given):
        return module.param(name, init, shape)
    if given.shape != tuple(shape):
        raise flax.errors.ScopeParamShapeError(name, module.path, given.shape, tuple(shape))
    return given


RANK_AXIS = "embed"   # logical axis of an adapter's rank: stored split over devices as the width is


class LowRank(flax.struct.PyTreeNode):
    """An adapter of a kernel [in..., out...]: scale * (x A) B is added to the product with the kernel.

    a [in..., rank], b [rank, out...]. With a `key`, elements of x are dropped at `rate`, the rest scaled up.
    In a stack of layers, arrays and keys have a leading axis of layers.
    """
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    rate: float = flax.struct.field(pytree_node=False, default=0.0)

    def __call__(self, x, product, num_in: int, axes: tuple[str | None, ...]):
        """Returns the adapter's part of the output. `product` is `contract` or `contract_in_place`; `axes`
        are the kernel's."""
        if self.key is not None:
            keep = 1 - self.rate
            x = jnp.where(jax.random.bernoulli(self.key, keep, x.shape), x / keep, 0)
        narrow = self.scale * product(x, self.a, num_in, (*axes[:num_in], RANK_AXIS))
        return product(narrow, self.b, 1, (RANK_AXIS, *axes[num_in:]))


class Linear(nn.Module):
    """Contracts the last `num_in` axes of the input with the first `num_in` of a kernel of `shape`.

    The kernel is drawn with standard deviation `init_std`; None: fan_in**-0.5. If `is_in_place`, it is not
    gathered (`contract_in_place`). A LowRank beside the kernel, as "lora", is applied as well.
    """
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_in: int = 1
    use_bias: bool = False
    init_std: float | None = None
    dtype: str = "float32"
    is_in_place: bool = False

    @nn.compact
    def __call__(self, x):
        fan_in = math.prod(self.shape[:self.num_in])
        normal = nn.initializers.normal(self.init_std or fan_in ** -0.5)
        kernel = parameter(self, "kernel", nn.with_logical_partitioning(normal, self.axes), self.shape)
        product = contract_in_place if self.is_in_place else contract
        x = x.astype(self.dtype)
        y = product(x, kernel, self.num_in, self.axes)
        adapter = self.get_variable("params", "lora")
        if adapter is not None:
            y = y + adapter(x, product, self.num_in, self.axes)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.num_in:])
            y = y + self.param("bias", zeros, self.shape[self.num_in:]).astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale, initially 1."""
    size: int
    axis: str | None = "norm"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        return rms_norm(x, self.param("scale", ones, (self.size,)), self.eps)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale and bias, initially 1 and 0."""
    size: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        scale, bias = self.param("scale", ones, (self.size,)), self.param("bias", zeros, (self.size,))
        return layer_norm(x, scale, bias, self.eps)


class SwiGLU(nn.Module):
    """down( silu(gate x) * up x )."""
    width_in: int
    mlp_width: int
    width_out: int
    init_std: float | None
    out_std: float | None
    dtype: str
    mlp_axis: str = "mlp"
    is_in_place: bool = False   # see Linear

    @nn.compact
    def __call__(self, x):
        def linear(name, shape, axes, std):
            return Linear(shape, axes, init_std=std, dtype=self.dtype, is_in_place=self.is_in_place,
                          name=name)
        wide, narrow = (self.width_in, self.mlp_width), (self.mlp_width, self.width_out)
        gate = linear("gate", wide, ("embed", self.mlp_axis), self.init_std)(x)
        up = linear("up", wide, ("embed", self.mlp_axis), self.init_std)(x)
        return linear("down", narrow, (self.mlp_axis, "embed"), self.out_std)(jax.nn.silu(gate) * up)


def check_remat(name: str) -> None:
    """Checks the name of a remat policy.

    Raises:
      ValueError: `name` is not a key of REMAT_POLICIES.
    """
    config_lib.require(name in REMAT_POLICIES, f"remat must be one of {tuple(REMAT_POLICIES)}", name)


class Stack:
    """The parameters of equal layers, and the loop that runs the layers in sequence.

    Either one tree whose leaves have a leading axis of layers, over which a loop scans; or a list with one
    tree per layer, unrolled in Python (see decode.ready). Only this class distinguishes the two. What the
    layers keep has the same form: stacked, or a list.
    """

    def __init__(self, params):
        self._params = params

    @classmethod
    def of(cls, module: nn.Module, name: str, block: nn.Module, num_layers: int, *example) -> "Stack":
        """Returns the stack of `num_layers` copies of `block`, the parameter `name` of `module`.

        `example` is a small input that `block` accepts. New parameters are stacked along an axis "layers".
        """
        def init(key):
            keys = jax.random.split(key, num_layers)
            stacked = jax.vmap(lambda k: block.init(k, *example)["params"])(keys)
            return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})
        # May hold quantized.Int8 and adapters; layers check their own shapes.
        given = module.get_variable("params", name)
        return cls(module.param(name, init) if given is None else nn.meta.unbox(given))

    def __len__(self) -> int:
        return len(self._params if isinstance(self._params, list) else jax.tree.leaves(self._params)[0])

    def __getitem__(self, part: slice) -> "Stack":
        is_list = isinstance(self._params, list)
        return Stack(self._params[part] if is_list else jax.tree.map(lambda leaf: leaf[part], self._params))

    def unrolled(self) -> list:
        """Returns the parameters as a list with one tree per layer."""
        return [jax.tree.map(lambda leaf: leaf[number], self._params) for number in range(len(self))]

    def run(self, body: Callable, x, per_layer=None, remat: str = "none", taps: tuple[int, ...] = ()):
        """Returns (x after the last layer, what the layers keep, {tap: x after that layer}).

        Without remat every activation is kept, and a loop would only copy them, so the scan is unrolled. A
        list is unrolled in Python without rematerialisation; what the layers keep is then a list, too. Of the
        layers' outputs only those of `taps` are kept.

        Args:
          body: (x, parameters of a layer, its part of `per_layer`) -> (x, what it keeps).
          per_layer: a tree of arrays with a leading axis of layers.
          remat: name of a policy, see REMAT_POLICIES.

        Raises:
          ValueError: `remat` is no policy, or a tap no layer.
        """
        check_remat(remat)
        config_lib.require(all(0 <= tap < len(self) for tap in taps),
                           f"taps must name layers 0 ... {len(self) - 1}", taps)
        if isinstance(self._params, list):
            kept, tapped = [], {}
            for number, params in enumerate(self._params):
                x, one = body(x, params, jax.tree.map(lambda leaf: leaf[number], per_layer))
                kept.append(one)
                tapped |= {number: x} if number in taps else {}
            return x, kept, tapped
        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)

        def step(carry, layer):
            (x, tapped), (is_tap, *given) = carry, layer
            x, kept = body(x, *given)
            return (x, tuple(jnp.where(now, x, before) for now, before in zip(is_tap, tapped))), kept

        # Carried and overwritten: slicing the stacked outputs would keep those of all layers.
        is_tap = tuple(np.arange(len(self)) == tap for tap in taps)
        start = x, (jnp.zeros_like(x),) * len(taps)
        given = is_tap, self._params, jax.tree.map(jnp.asarray, per_layer)
        (x, tapped), kept = jax.lax.scan(step, start, given, unroll=remat == "none")
        return x, kept, dict(zip(taps, tapped))

    def extend(self, body: Callable, x, per_layer, memory):
        """Returns (x after the last layer, the memory with the layers' writes).

        Args:
          body: (x, parameters of a layer, its part of `per_layer`, (read, written, place)) -> (x, written).
            `written` has a leading axis of layers; the body writes at index `place` of it.
          memory: a NamedTuple (read, written) stacked over the layers, or a list with one per layer.
        """
        if isinstance(self._params, list):
            kept = []
            for number, (params, (read, written)) in enumerate(zip(self._params, memory, strict=True)):
                given = jax.tree.map(lambda leaf: leaf[number], per_layer)
                x, written = body(x, params, given, (read, written, 0))
                kept.append(memory[number]._make((read, written)))
            return x, kept

        def step(carry, layer):
            (x, written), (params, given, read, place) = carry, layer
            return body(x, params, given, (read, written, place)), None

        layers = self._params, jax.tree.map(jnp.asarray, per_layer), memory[0], jnp.arange(len(self))
        (x, written), _ = jax.lax.scan(step, (x, memory[1]), layers, unroll=True)
        return x, memory._make((memory[0], written))

    @staticmethod
    def map_kept(function: Callable, kept):
        """Returns `function` applied to what layers kept: to the stack, or to each element of a list."""
        return [function(one) for one in kept] if isinstance(kept, list) else function(kept)
