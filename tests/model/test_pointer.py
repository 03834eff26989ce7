"""Pointing by choosing visual tokens: scores, loss and gradients against PyTorch, candidates, invariance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molmo2_jax import config as config_lib
from molmo2_jax import loss
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.model import molmo2
from molmo2_jax.model import pointer
from tests import packs

torch = pytest.importorskip("torch")

KINDS = ("patch", "subpatch", "location")


def config_of(style="qwen3", **changes):
    base = packs.random_config(style, 1)
    return dataclasses.replace(
        base, connector=dataclasses.replace(base.connector, has_output=False),
        pointer=config_lib.PointerConfig(**{"width": 12, "theta": 50.0} | changes))


def params_of(config, seed=0):
    """Returns parameters in which every entry has an effect."""
    rng = np.random.default_rng(seed)
    shapes = jax.tree.map(lambda x: x, state.boxed_params(molmo2.Molmo2(config, remat="none")))
    unboxed = jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda x: hasattr(x, "names"))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), unboxed)


def visual_of(rng, config, kind):
    """Returns crops with the tokens of a pointing model, and the rows that can be selected."""
    made = packs.video(rng, config, 3) if kind == "video" else packs.images(rng, config, 2)
    patch, low = config.special_id("<im_patch>"), config.special_id("<im_low>")
    tokens, selectable = made.crops.tokens.copy(), []
    seen = np.flatnonzero(tokens == patch)
    for place, at in enumerate(seen):
        is_overview = kind == "images" and place % 10 < 4
        tokens[at] = low if is_overview else patch
        selectable.append(not is_overview)
    crops = dataclasses.replace(made.crops, tokens=tokens)
    return dataclasses.replace(made, crops=crops), np.flatnonzero(selectable)


def pointing(rng, config, kind, branches=3):
    """Returns a tree whose branches hold groups of sorted points, each with its end, except one cut off."""
    visual, rows = visual_of(rng, config, kind)
    token, sub, loc = map(config.special_id, ("<|token_index|>", "<|vit_index|>", "<|vit_loc|>"))
    flat = packs.sequence(rng, config, visual, (1,) * branches)
    root = int((flat.branch < 0).sum())
    tokens, choice = flat.tokens[:root].tolist(), [-1] * root
    branch, positions = [-1] * root, list(range(root))
    for number in range(branches):
        text, chosen = packs.words(rng, config, 3), [-1] * 3
        for r in sorted(rng.choice(rows, int(rng.integers(0, 4))).tolist()):
            filled = np.flatnonzero(visual.crops.pooled[r] >= 0)
            text += [token, sub, loc, *packs.words(rng, config, 1)]
            chosen += [r, types.inner(int(rng.choice(filled))), types.inner(int(rng.integers(9))), -1]
        if number or kind == "images":
            text, chosen = text + [token], chosen + [types.NO_MORE]
        text, chosen = text + packs.words(rng, config, 2), chosen + [-1] * 2
        tokens, choice = tokens + text, choice + chosen
        branch += [number] * len(text)
        positions += range(root, root + len(text))
    image = np.full(len(tokens), -1, np.int32)
    image[:root] = flat.image[:root]
    return types.Sequence(
        tokens=np.array(tokens, np.int32), targets=np.array([*tokens[1:], 1], np.int32),
        weights=(np.array(branch) >= 0) * rng.uniform(0.1, 1, len(tokens)).astype(np.float32),
        positions=np.array(positions, np.int32), branch=np.array(branch, np.int32), image=image,
        patches=visual.crops.patches, pooled=visual.crops.pooled, choice=np.array(choice, np.int32))


def row_of(sequences, config, spare=0):
    """Returns a row that the sequences fill, but for `spare` tokens, crops and visual tokens."""
    shape = types.RowShape(T=sum(len(one.tokens) for one in sequences) + spare,
                           M=sum(len(one.patches) for one in sequences) + spare,
                           R=sum(len(one.pooled) for one in sequences) + spare,
                           W=math.prod(config.connector.video_window))
    return rows_lib.join(sequences, shape, config.vision.patch_shape, has_choices=True)


def pack(config, seed=0, spare=3):
    rng = np.random.default_rng(seed)
    return row_of([pointing(rng, config, "video"), packs.sequence(rng, config, None, (4,)),
                   pointing(rng, config, "images")], config, spare)


def ours(config, params, batch):
    """Returns (sums of the choices, states before the final norm, features, visual tokens)."""
    model, last = molmo2.Molmo2(config, remat="none"), config.text.num_layers - 1
    _, inside = model.apply({"params": params}, batch, taps=(last,), method="hidden")
    scored = model.apply({"params": params}, inside, method="choices")
    return loss.choice_sums(scored, batch, config, chunk=4), inside


def rotated(vector, place, theta):
    half = len(vector) // 2
    angle = place * torch.tensor([theta ** (-2 * i / len(vector)) for i in range(half)], dtype=torch.float64)
    first, second = vector[:half], vector[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(),
                      second * angle.cos() + first * angle.sin()])


def theirs(config, tree, x_TD, features_pA, batch):
    """Returns the three sums of cross-entropies of a row, point by point, how many are right, how many."""
    c = config.pointer
    linear = lambda name, x: x @ tree[name]["kernel"] + tree[name]["bias"]
    normed = lambda x: tree["norm"]["scale"] * x / torch.sqrt((x * x).mean() + 1e-6)
    tokens, choice, example, branch = (np.asarray(one[0]) for one in (
        batch.tokens, batch.choice, batch.example, batch.branch))
    patch, low = config.special_id("<im_patch>"), config.special_id("<im_low>")
    seen = [t for t in range(len(tokens)) if tokens[t] in (patch, low)]
    place, counted = {}, {}
    for r, t in enumerate(seen):
        if tokens[t] == patch:
            place[r] = counted.get(example[t], 0)
            counted[example[t]] = place[r] + 1
    total, right, number = [torch.zeros((), dtype=torch.float64) for _ in KINDS], [0, 0, 0], [0, 0, 0]

    def add(kind, scores, target, at):
        weight = float(batch.weights[0, at]) if c.loss_weight == "token" else 1.0
        keys, values = list(scores), torch.stack(list(scores.values()))
        total[kind] = total[kind] + weight * (torch.logsumexp(values, 0) - scores[target])
        right[kind] += keys[int(values.argmax())] == target
        number[kind] += 1

    previous, owner = None, None
    for t in np.flatnonzero(tokens == config.special_id("<|token_index|>")):
        if (example[t], branch[t]) != owner:
            previous, owner = None, (example[t], branch[t])
        query = rotated(linear("patch_q", normed(x_TD[t - 1])), place.get(previous, 0), c.theta)
        scores = {r: query @ rotated(linear("patch_k", normed(x_TD[seen[r]])), place[r], c.theta) / c.scale
                  for r in place if example[seen[r]] == example[t] and (previous is None or r >= previous)}
        scores[types.NO_MORE] = query @ tree["no_more"] / c.scale
        r = int(choice[t])
        add(0, scores, r, t - 1)
        previous = None if r == types.NO_MORE else r
        if r == types.NO_MORE:
            continue
        query = linear("sub_q", normed(x_TD[t]))
        window = np.asarray(batch.pooled[0, r])
        scores = {j: query @ linear("sub_k", features_pA[window[j]]) / c.width ** 0.5
                  for j in range(len(window)) if window[j] >= 0}
        add(1, scores, types.inner(int(choice[t + 1])), t)
        state_D = x_TD[t + 1] if c.raw_location_reference else normed(x_TD[t + 1])
        cells = linear("location", state_D)
        add(2, dict(enumerate(cells)), types.inner(int(choice[t + 2])), t + 1)
    return total, right, number


@pytest.mark.parametrize("changes", [
    {}, *(pytest.param(changes, marks=pytest.mark.slow(15)) for changes in (
        {"raw_location_reference": True, "score_scale": 7.0}, {"loss_weight": "one"}))])
@pytest.mark.slow(22)
def test_scores_loss_and_gradients_equal_those_of_pytorch(changes):
    config = config_of(**changes)
    params, batch = params_of(config), pack(config)
    sums, inside = ours(config, params, batch)
    x_BTD, features_BMPA = inside.layers[config.text.num_layers - 1], inside.features
    model = molmo2.Molmo2(config, remat="none")

    def of(pointing, x_BTD, features_BMPA):
        held = inside._replace(layers={config.text.num_layers - 1: x_BTD}, features=features_BMPA)
        scored = model.apply({"params": params | {"pointer": pointing}}, held, method="choices")
        return loss.choice_sums(scored, batch, config, chunk=4).nll.sum()

    gradients = jax.grad(of, argnums=(0, 1, 2))(params["pointer"], x_BTD, features_BMPA)
    leaf = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    tree, x_TD = jax.tree.map(leaf, params["pointer"]), leaf(x_BTD[0])
    features_pA = leaf(features_BMPA[0].reshape(-1, features_BMPA.shape[-1]))
    total, right, number = theirs(config, tree, x_TD, features_pA, batch)
    assert min(number) >= 5
    np.testing.assert_allclose(sums.nll, [one.item() for one in total], rtol=2e-5)
    assert sums.correct.tolist() == right and sums.number.tolist() == number
    sum(total).backward()
    for path, mine in jax.tree_util.tree_leaves_with_path(gradients[0]):
        grad = tree
        for key in path:
            grad = grad[key.key]
        wanted = np.zeros(mine.shape) if grad.grad is None else grad.grad.numpy()
        np.testing.assert_allclose(mine, wanted, atol=1e-4 * max(abs(wanted).max(), 1e-3), err_msg=str(path))
    np.testing.assert_allclose(gradients[1][0], x_TD.grad.numpy(), atol=1e-4 * abs(x_TD.grad.numpy()).max())
    np.testing.assert_allclose(gradients[2][0].reshape(features_pA.shape), features_pA.grad.numpy(),
                               atol=1e-4 * abs(features_pA.grad.numpy()).max())


def test_what_was_chosen_is_added_to_the_embedding():
    config = config_of()
    params, batch = params_of(config), pack(config)
    model = molmo2.Molmo2(config, remat="none")
    embed = lambda one: model.apply({"params": params}, one, method="embed")
    x_BTD, features_BMPA, visual_BRD = embed(batch)
    plain_BTD = embed(batch._replace(choice=np.full_like(batch.choice, -1)))[0]
    features = features_BMPA.reshape(-1, features_BMPA.shape[-1])
    expected = np.zeros(plain_BTD.shape[1:], np.float32)
    for t, token in enumerate(batch.tokens[0]):
        value = batch.choice[0, t]
        if token == config.special_id("<|token_index|>") and value != types.NO_MORE:
            expected[t] = visual_BRD[0, value]
        elif token == config.special_id("<|vit_index|>"):
            chosen = features[batch.pooled[0, batch.choice[0, t - 1], types.inner(value)]]
            layer = params["pointer"]["embed_sub"]
            expected[t] = chosen @ layer["kernel"] + layer["bias"]
    assert (abs(expected).max(1) > 0).sum() >= 10
    np.testing.assert_allclose((x_BTD - plain_BTD)[0], expected, atol=1e-5)


@pytest.mark.slow(60)
def test_a_pack_and_a_tree_have_the_losses_of_their_parts():
    config = config_of()
    params, rng = params_of(config), np.random.default_rng(4)
    held = [pointing(rng, config, kind) for kind in ("video", "images", "video")]
    whole = ours(config, params, row_of(held, config, spare=5))[0]
    parts = [ours(config, params, row_of([one], config))[0] for one in held]
    np.testing.assert_allclose(whole.nll, sum(one.nll for one in parts), rtol=2e-5)
    branches = []
    for number in range(3):
        kept = (held[1].branch < 0) | (held[1].branch == number)
        branches.append(dataclasses.replace(held[1], **{
            name: np.where(kept, getattr(held[1], name), 0)[kept] for name in (
                "tokens", "targets", "weights", "positions", "image", "choice")},
            branch=np.where(held[1].branch[kept] < 0, -1, 0).astype(np.int32)))
    alone = [ours(config, params, row_of([one], config))[0] for one in branches]
    np.testing.assert_allclose(parts[1].nll, sum(one.nll for one in alone), rtol=2e-5)
    assert parts[1].number.tolist() == sum(np.asarray(one.number) for one in alone).tolist()


def test_scores_depend_on_differences_of_positions_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 5, 16)), jnp.float32) for _ in range(2))
    q_places, k_places = (jnp.asarray(rng.integers(0, 50, (1, 5))) for _ in range(2))
    scores = [jnp.einsum("bne,bre->bnr", pointer.rotate(q, q_places + by, 50.0),
                         pointer.rotate(k, k_places + by, 50.0)) for by in (0, 37)]
    np.testing.assert_allclose(*scores, atol=1e-4)


@pytest.mark.parametrize("make, own, total", [
    (config_lib.molmo_point_8b, 7_514_633, 8_677_855_065), (config_lib.molmo_point_vid_4b, 5_139_977, None)])
def test_released_sizes_have_their_number_of_parameters(make, own, total):
    config = make()
    boxed = state.boxed_params(molmo2.Molmo2(config))
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    pointing = dict(boxed["pointer"])
    embed = count(pointing.pop("embed_sub"))
    assert count(pointing) == own and embed == 2304 * config.text.width + config.text.width
    assert ("new_head" in boxed) == (not config.text.tied_head)
    assert total is None or count(boxed) == total
