"""The page of packed rows holds the arrays themselves, runs no foreign markup, and stays small."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from launch.support import examined
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.attention import tree_mask
from molmo2_jax.inputs import crops as crops_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import sequence as sequences
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.render import rows
from tests import browser

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
MODEL = examined.settings_of_no_run()
MEMBERS = [[{"key": f"{EVIL}:{n}", "source": EVIL, "annotations": 3, "branches": 2, "tokens": 9,
             "whole_tokens": 12, "left_out": [[EVIL, EVIL]]} for n in range(2)] for _ in range(2)]


def branch(question, answer, scale=1.0):
    return types.Branch(turns=(question, answer), weight=types.LossWeight(scale=scale))


def video(num_frames, *branches, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (num_frames, 72, 72, 3), np.uint8)
    frames = types.Frames(pixels=pixels, seconds=np.arange(num_frames) / 2, width=72, height=72,
                          duration=num_frames / 2, fps=2.0)
    crops = crops_lib.crops_of_frames(frames, MODEL.model, MODEL.inputs, MODEL.tokenizer)
    return sequences.build(crops, branches, MODEL.tokenizer)


def images(count, *branches, model=MODEL.model):
    pixels = [np.full((72, 72 + 40 * n, 3), 70 * n, np.uint8) for n in range(count)]
    crops = crops_lib.crops_of_images(pixels, model, MODEL.inputs, MODEL.tokenizer)
    return sequences.build(crops, branches, MODEL.tokenizer)


@pytest.fixture(scope="module")
def batch():
    """Two rows: a video tree and a text tree, and several images in one conversation."""
    first = [video(3, branch("Where?", EVIL, 0.2), branch("Why é?", "Because.")),
             sequences.build(None, [branch("a", "b"), branch("c", "d é")], MODEL.tokenizer)]
    second = [images(2, branch("Which?", "This one."))]
    shape = types.RowShape(T=max(sum(len(one.tokens) for one in row) for row in (first, second)) + 10,
                           M=40, R=500, W=9)
    return rows_lib.stack([rows_lib.join(row, shape, MODEL.model.vision.patch_shape)
                           for row in (first, second)])


class Data(html.parser.HTMLParser):
    """Collects the JSON of a page, its scripts, and every attribute."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.attributes, self._inside = [], [], False
        self.feed(page)
        self.json = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self._inside = tag == "script"
        self.attributes += attributes
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def page_of(batch, group=None, members=MEMBERS):
    return rows.page(EVIL, {"run": EVIL}, batch, batch.group if group is None else group, MODEL.tokenizer,
                     members, [(EVIL, EVIL)])


def expand(pairs, step=0):
    return np.concatenate([first + step * np.arange(count) for first, count in pairs])


def test_the_numbers_on_the_page_are_the_arrays(batch):
    data = Data(page_of(batch)).json
    for number, row in enumerate(data["rows"]):
        for name in ("tokens", "targets"):
            np.testing.assert_array_equal(row[name], getattr(batch, name)[number])
        for name in ("end", "group", "image", "example", "branch"):
            np.testing.assert_array_equal(expand(row[name]), getattr(batch, name)[number])
        np.testing.assert_array_equal(expand(row["weights"]).astype(np.float32), batch.weights[number])
        np.testing.assert_array_equal(expand(row["positions"], 1), batch.positions[number])
        spelt = "".join(data["texts"][str(one)] for one in row["tokens"]).replace("\\xc3\\xa9", "é")
        assert spelt == MODEL.tokenizer.spell(batch.tokens[number])
        crops = batch.patches[number].reshape(len(batch.patches[number]), -1).any(1)
        assert row["budgets"] == {
            "tokens": [int((batch.example[number] >= 0).sum()), batch.tokens.shape[1]],
            "crops": [int(np.flatnonzero(crops).max()) + 1, 40],
            "visual tokens": [int((batch.pooled[number] >= 0).any(1).sum()), 500]}
        assert row["members"] == MEMBERS[number]


def test_frames_have_their_times_and_images_their_numbers_and_crops(batch):
    labels = [label for label, _, _ in rows.shown(batch, 0, MODEL.tokenizer)]
    assert labels == ["0.0 s", "0.5 s", "1.0 s"]
    expected = video(3, branch("Where?", "x")).patches
    for number, (_, place, crops) in enumerate(rows.shown(batch, 0, MODEL.tokenizer)):
        np.testing.assert_array_equal(crops_lib.patchify(crops, 8), expected[number:number + 1])
        assert (batch.image[0][place] == number).all()
    (first, _, _), (second, _, crops) = rows.shown(batch, 1, MODEL.tokenizer)
    assert (first, second) == ("Image 1", "Image 2") and len(crops) > 1
    assert rows.picture(batch, 0, batch.group, MODEL.tokenizer).ndim == 3


def pointing():
    """Returns a row of a model that points by choosing visual tokens: two examples of images."""
    model = dataclasses.replace(MODEL.model, pointer=config.PointerConfig(width=16))
    point = "<|token_index:{}|><|vit_index:1|><|vit_loc:4|>1"
    answers = [f'<points coords="{point.format(row)}<|token_index:end|>">x</point>' for row in (30, 31)]
    held = [images(2, branch("Where?", one), model=model) for one in answers]
    return rows_lib.join(held, types.RowShape(T=700, M=40, R=500, W=9), has_choices=True), len(held[0].pooled)


def test_a_model_with_a_pointer_shows_the_crops_of_each_image_and_what_tokens_choose():
    batch, first_visual = pointing()
    plain = rows_lib.join([images(2, branch("Where?", "There.")) for _ in range(2)],
                          types.RowShape(T=700, M=40, R=500, W=9))
    found, wanted = (rows.shown(one, 0, MODEL.tokenizer) for one in (batch, plain))
    assert len(found) == len(wanted) == 4
    for (_, _, crops), (_, _, others) in zip(found, wanted):   # overviews, written with <im_low>, count too
        np.testing.assert_array_equal(crops, others)
    row = Data(page_of(batch, members=[[]])).json["rows"][0]
    assert [*row["choices"].values()] == [
        text for number in (30, first_visual + 31) for text in (
            f"<|token_index:{number}|>", "<|vit_index:1|>", "<|vit_loc:4|>", "<|token_index:end|>")]
    assert all(MODEL.tokenizer.spell([row["tokens"][int(place)]])[:-2] in text
               for place, text in row["choices"].items())
    assert Data(page_of(plain, members=[[]])).json["rows"][0]["choices"] == {}


def test_texts_are_escaped(batch):
    data = Data(page_of(batch))
    assert len(data.scripts) == 2 and not [name for name, _ in data.attributes if name.startswith("on")]
    assert not re.search(r"https?:", page_of(batch, members=[[], []]))


def long_batch():
    """One row of 16,384 tokens with 128 frames of noise, and 15,000 tokens of text in three branches."""
    words = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 130
    one = video(128, *(branch(f"{n}?", words) for n in range(3)))
    assert len(one.tokens) > 16_384
    cut = sequences.truncate(one, 16_384)
    return rows_lib.join([cut], types.RowShape(T=16_384, M=128, R=2_000, W=9))


def test_the_page_of_a_long_row_is_smaller_than_8_megabytes_and_opens(new_page, tmp_path):
    batch = long_batch()
    path = tmp_path / "rows.html"
    path.write_text(page_of(batch, members=[[]]), encoding="utf-8")
    assert path.stat().st_size < 8e6
    page = new_page()
    page.goto(path.as_uri())
    # A page that is not frozen answers to events: the last token is chosen by a key, and painted.
    page.focus("#tokens")
    page.keyboard.press("End")
    browser.expect(page.locator("#said")).to_contain_text("token 16,383:")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("() => document.querySelectorAll('.t').length") > 10_000
    assert "16,384 of 16,384 (100.0 %)" in page.inner_text("#budgets")


def test_the_mask_on_the_page_is_that_of_the_model(batch, new_page, tmp_path):
    path = tmp_path / "rows.html"
    for attention in ("image_tokens", "within_image", "causal"):
        mask = tree_mask.from_batch(batch, attention)
        path.write_text(page_of(batch, np.asarray(mask.group)), encoding="utf-8")
        page = new_page()
        page.goto(path.as_uri())
        for number in range(2):
            page.select_option("#number", str(number))
            found = page.evaluate("""() => {
              const {sees, row} = window.inspector, T = row().T;
              return Array.from({length: T}, (_, i) =>
                Array.from({length: T}, (_, j) => sees(i, j) ? "x" : ".").join(""));
            }""")
            dense = np.asarray(tree_mask.dense(mask))[number]
            assert found == ["".join(".x"[int(one)] for one in line) for line in dense]


def test_the_chosen_token_says_whom_it_sees_and_keys_choose_another(batch, new_page, tmp_path):
    path = tmp_path / "rows.html"
    path.write_text(page_of(batch), encoding="utf-8")
    page = new_page(color_scheme="dark", viewport={"width": 390, "height": 800})
    page.goto(path.as_uri())
    dense = np.asarray(tree_mask.dense(tree_mask.from_batch(batch, "image_tokens")))[0]
    token = int(np.flatnonzero(batch.weights[0] > 0)[2])
    page.focus("#tokens")
    for _ in range(token - 1):
        page.keyboard.press("ArrowRight")
    page.locator(f"[data-first='{token}']").hover()
    said = page.inner_text("#said").splitlines()
    assert said[0].startswith(f"token {token}: ") and f"position {batch.positions[0][token]}" in said[1]
    assert said[2].endswith(f"loss weight {float(f'{batch.weights[0][token]:.6g}'):g}")
    assert said[3].startswith(f"sees {dense[token].sum()} tokens: ")
    assert said[4].startswith(f"seen by {dense[:, token].sum()} tokens: ")
    # The page is dark, no wider than the phone, and its texts are texts.
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"
    assert page.title() == EVIL and EVIL in page.inner_text("#tokens")
    assert page.evaluate("() => document.querySelectorAll('#tokens script, [onerror]').length") == 0
    page.keyboard.press("+")
    assert page.inner_text("#window").startswith("tokens ")
    page.keyboard.press("0")
    assert page.inner_text("#window").startswith("all ")


def test_bytes_that_are_no_text_of_their_own_are_spelt_as_bytes():
    tokenizer: tokenizers.Tokenizer = MODEL.tokenizer
    ids = tokenizer.encode("é<|im_end|>a")
    assert tokenizer.spell(ids) == "é<|im_end|>a" and tokenizer.decode(ids) == "é"
    assert "".join(rows._spelt(one, tokenizer) for one in ids).endswith("<|im_end|>a")
