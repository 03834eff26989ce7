"""The demo page of a running server, from a video that is uploaded to the one with points."""

import json
import pathlib
import re

import av
import numpy as np
import pytest

from molmo2_jax.render import pictures
from tests import browser
from tests.launch.server import conftest
from tests.serving import test_page as pages

CLIP = pages.PAGE / "examples/diamond.mp4"
POINTS = [{"id": 1, "x": 1, "y": 1, "frame_time": 0}]
QUESTION = "Track the red diamond."
WILD = 50    # temperature at which all tokens are about equally likely: the end comes after some hundred
COUNTS = """() => {
  window.counts = [];
  new MutationObserver(records => counts.push(...records.map(one => one.addedNodes.length)))
    .observe(document.querySelector("#points tbody"), {childList: true});   // also of chunks read at once
}"""


@pytest.fixture
def page(server, new_page):
    page = new_page()
    page.goto(server.url.removesuffix("v1"))
    browser.expect(page.get_by_role("alert")).to_have_text("This server asks for an API key.")
    page.get_by_label("API key").fill(conftest.KEY)
    page.get_by_label("API key").press("Enter")
    browser.expect(page.locator("#model")).to_have_text("molmo2")
    return page


def ask(page, text):
    answers = page.locator(".turn footer").count()
    page.get_by_role("textbox", name="Question").fill(text)
    page.keyboard.press("Enter")
    told = page.get_by_role("alert")
    page.locator(".turn footer").nth(answers).or_(told).first.wait_for()
    assert not told.is_visible(), told.inner_text()


@pytest.mark.slow(8)
def test_a_clip_is_uploaded_asked_about_pointed_at_and_downloaded(server, page):
    page.get_by_label("choose files").set_input_files(CLIP)
    page.locator("#film").wait_for()
    page.evaluate(COUNTS)
    ask(page, QUESTION)
    counts = page.evaluate("() => counts")
    assert counts == sorted(counts) and len(set(counts)) > 2   # points come while the answer is written
    asked = server.ask([conftest.video(conftest.data_url(CLIP, "video/mp4")), conftest.text(QUESTION)])
    points = asked.json()["molmo2"]["points"]
    assert len(points) == counts[-1] > 2
    rows = [row.split("\t") for row in page.locator("#points tbody tr").all_inner_texts()]
    assert rows == [[one["id"], "red diamond", f"{one['frame_time']:.1f} s", f"{one['x']:.1f}",
                     f"{one['y']:.1f}"] for one in points]
    for one in points[:-1]:
        page.get_by_role("button", name=f"{one['frame_time']:.1f} seconds: 1 point").click()
        pages.go_to(page, one["frame_time"])
        pages.assert_marked(page, one["id"], one["x"], one["y"])
    ask(page, "How many red diamond are there in the video?")
    assert "from the cache" in page.locator(".turn footer").last.inner_text()
    page.get_by_role("button", name=f"Show {len(points)} points").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    saved = json.loads(pathlib.Path(download.value.path()).read_text())
    assert [(one["id"], one["time"], one["x"], one["y"]) for one in saved["points"]] == [
        (one["id"], one["frame_time"], one["x"], one["y"]) for one in points]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download video with points").click()
    with av.open(str(download.value.path())) as film:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)]
    one = points[1]
    time, frame = min(frames, key=lambda pair: abs(pair[0] - one["frame_time"]))
    x, y = (round(one[name] * frame.shape[axis] / size)
            for name, axis, size in (("x", 1, 100), ("y", 0, 108)))
    np.testing.assert_allclose(frame[y, x], pictures.colour(one["id"]), atol=60)   # 4:2:0 blurs colours


def long_answer(server, question):
    """Returns (seed, text) of an answer at temperature WILD that goes on for hundreds of tokens."""
    for seed in range(100):
        found = server.ask(question, temperature=WILD, seed=seed).json()
        text = found["choices"][0]["message"]["content"]
        if found["usage"]["completion_tokens"] > 300 and not re.search("<(points|tracks)", text):
            return seed, text
    raise AssertionError("no seed has a long answer")


def written(turn):
    """Returns the text of an answer on the page; tags are shown as written below it."""
    code = turn.locator("code")
    return (code if code.count() else turn.locator("> div")).text_content()


@pytest.mark.slow(11)
def test_stop_frees_the_row_and_keeps_the_text_and_the_next_question_is_answered(server, page):
    seed, whole = long_answer(server, "Hello")
    cancelled = server.metric("molmo2_cancelled_total")
    temperature = page.get_by_label("Temperature")
    temperature.evaluate("input => { input.max = 100; }")
    temperature.fill(str(WILD))
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("textbox", name="Question").fill("Hello")
    page.keyboard.press("Enter")
    answers = page.locator(".turn.assistant")
    browser.expect(answers.locator("> div")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    browser.expect(page.locator(".turn footer")).to_contain_text("stopped")
    conftest.wait_until(lambda: server.metric("molmo2_rows_busy") == 0)
    assert server.metric("molmo2_cancelled_total") == cancelled + 1
    so_far = written(answers)
    assert so_far and whole.startswith(so_far) and len(so_far) < len(whole)
    temperature.fill("0")
    ask(page, "What?")
    turns = zip(("user", "assistant", "user"), ("Hello", so_far, "What?"))
    wanted = server.text([{"role": role, "content": words} for role, words in turns])
    assert written(answers.last) == wanted and page.locator(".turn").count() == 4


def test_what_cannot_be_drawn_is_refused_and_the_key_is_asked_for(server):
    for body, word in (({}, "video and points"),
                       ({"video": "file:///etc/passwd", "points": POINTS}, "file: URLs"),
                       ({"video": conftest.data_url(CLIP, "video/mp4"), "points": [{}]}, "id, x, y"),
                       ({"video": "data:video/mp4;base64,AAAA", "points": POINTS}, "the video")):
        response = server.http.post("/annotated", json=body)
        assert response.status_code == 400 and word in response.json()["error"]["message"], response.text
    assert server.http.post("/annotated", json={}, headers={"Authorization": ""}).status_code == 401
    root = server.url.removesuffix("/v1")
    for path in ("/page/../serve.py", "/page/%2e%2e/engine.py", "/page/nothing.js"):
        assert server.http.get(root + path).status_code == 404
