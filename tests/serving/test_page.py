"""The demo page in a browser: what it sends, what it draws where and when, and that texts stay texts.

The answers here are given by the test; tests/launch/server/test_page.py asks a running server.
"""

import base64
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from molmo2_jax import serving
from molmo2_jax.render import pictures
from tests import browser

PAGE = pathlib.Path(serving.__file__).parent / "page"
HOST = "http://127.0.0.1:9"   # nothing listens there: every request is answered below
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".json": "application/json",
         ".mp4": "video/mp4", ".png": "image/png"}
EVIL = "<img src=x onerror=\"document.title='owned'\">"
TRACK = [(0.0, 70.0, 54.0), (0.5, 60.0, 43.2), (1.0, 50.0, 32.4), (1.5, 40.0, 43.2), (2.0, 30.0, 54.0)]
WITHIN = 2.0   # pixels of the screen between a point and the centre of its mark


def point(name, x, y, **where):
    return {"id": name, "label": "red diamond", "x": x, "y": y, **where}


TRACKED = [point("1", x, y, frame_time=time) for time, x, y in TRACK]


def said(text, points=(), sizes=(), **usage):
    """Returns the events of a streamed answer. sizes: of the media, as the server saw them."""
    first = {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
    parts = [{"choices": [{"index": 0, "delta": {"content": text[place:place + 9]}, "finish_reason": None}]}
             for place in range(0, len(text), 9)]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "molmo2": {"points": list(points), "times": [0.0], "sizes": list(sizes)}}
    numbers = {"prompt_tokens": 93, "completion_tokens": 12, "total_tokens": 105, **usage}
    events = [json.dumps(one) for one in (first, *parts, last, {"choices": [], "usage": numbers})]
    return "".join(f": queued\n\ndata: {one}\n\n" for one in (*events, "[DONE]"))


class Server:
    """Answers the page's requests. answers: what chat completions return, in turn; `asked`: their bodies."""

    def __init__(self):
        self.answers, self.asked, self.drawn = [], [], []

    def __call__(self, route):
        request = route.request
        path = request.url.removeprefix(HOST).lstrip("/") or "index.html"
        if path == "v1/models":
            return route.fulfill(json={"object": "list", "data": [{"id": "nano", "object": "model"}]})
        if path == "version":
            return route.fulfill(json={"version": "1", "needs_key": False})
        if path == "v1/chat/completions":
            self.asked.append(request.post_data_json)
            answer = self.answers.pop(0)
            if answer is None:   # never answered
                return None
            if isinstance(answer, str):
                return route.fulfill(body=answer, content_type="text/event-stream")
            return route.fulfill(**answer)
        if path == "v1/annotated":
            self.drawn.append(request.post_data_json)
            return route.fulfill(body=b"a film", content_type="video/mp4")
        file = PAGE / path.removeprefix("page/")
        return route.fulfill(body=file.read_bytes(), content_type=TYPES[file.suffix])


@pytest.fixture
def demo(new_page):
    """Opens the page; `page.server` is its Server."""
    def start(**options):
        page = new_page(**options)
        page.server = Server()
        page.route("**/*", page.server)
        page.goto(HOST + "/")
        page.get_by_text("nano", exact=True).wait_for()
        return page
    return start


def pick(page, name, question):
    """Chooses an example and waits until its question is there."""
    page.get_by_role("button", name=name).click()
    browser.expect(page.get_by_role("textbox", name="Question")).to_have_value(question)


def ask(page, answer, text=None):
    page.server.answers.append(answer)
    field = page.get_by_role("textbox", name="Question")
    if text is not None:
        field.fill(text)
    turns = page.locator(".turn footer").count()
    field.press("Enter")
    told = page.get_by_role("alert")
    page.locator(".turn footer").nth(turns).or_(told).first.wait_for()
    assert not told.is_visible(), told.inner_text()


CENTRE = """([canvas, colour]) => {
  const {width, height} = canvas, data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const box = canvas.getBoundingClientRect();
  let count = 0, x = 0, y = 0;
  for (let n = 0; n < width * height; n++)
    if (data[4 * n + 3] > 250 && colour.every((one, c) => Math.abs(data[4 * n + c] - one) < 8)) {
      count++; x += n % width + 0.5; y += Math.floor(n / width) + 0.5;
    }
  return count ? [box.left + x / count * box.width / width, box.top + y / count * box.height / height] : null;
}"""


def centre(page, name, number=0):
    """Returns (x, y) on the screen of the mark of an id on the canvas `number`; None if there is none."""
    canvas = page.locator("canvas.marks:visible").nth(number)
    return page.evaluate(CENTRE, [canvas.element_handle(), list(pictures.colour(name))])


def place(page, selector, size, x, y, number=0):
    """Returns where the pixel (x, y) of a video or image of `size` is on the screen."""
    box = page.locator(f"{selector}:visible").nth(number).bounding_box()
    scale = min(box["width"] / size[0], box["height"] / size[1])
    return (box["x"] + (box["width"] - scale * size[0]) / 2 + scale * x,
            box["y"] + (box["height"] - scale * size[1]) / 2 + scale * y)


def go_to(page, second):
    """Seeks the video and waits until the frame is there and painted."""
    page.evaluate("""second => new Promise(done => {
      const video = document.querySelector("video");
      video.pause();
      const painted = () => requestAnimationFrame(() => requestAnimationFrame(done));
      video.addEventListener("seeked", painted, {once: true});
      video.currentTime = second;
    })""", second)


def assert_marked(page, name, x, y, selector="video", size=(100, 108), number=0):
    found = centre(page, name, number)
    assert found is not None
    np.testing.assert_allclose(found, place(page, selector, size, x, y, number), atol=WITHIN)


@pytest.mark.parametrize("options", [
    {}, {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 2, "color_scheme": "dark"}])
def test_a_track_runs_along_with_the_video(demo, options):
    page = demo(**options)
    pick(page, "track the diamond", "Track the red diamond.")
    ask(page, said("<tracks coords=\"0.0 1 700 500\">red diamond</tracks>", TRACKED))
    (request,) = page.server.asked
    (message,) = request["messages"]
    assert [part["type"] for part in message["content"]] == ["video_url", "text"]
    data = message["content"][0]["video_url"]["url"].removeprefix("data:video/mp4;base64,")
    assert base64.b64decode(data) == (PAGE / "examples/diamond.mp4").read_bytes()
    assert request["model"] == "nano" and request["stream"] and request["temperature"] == 0
    for time, x, y in TRACK[:-1]:
        page.get_by_role("group", name="pointed moments").get_by_role(
            "button", name=f"{time:.1f} seconds: 1 point").press("Enter")
        go_to(page, time)
        assert_marked(page, "1", x, y)
    go_to(page, 0.75)   # between two times
    assert_marked(page, "1", 55.0, 37.8)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= page.viewport_size["width"]
    rows = page.locator("#points tbody tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["1", "red diamond", f"{time:.1f} s", f"{x:.1f}", f"{y:.1f}"] for time, x, y in TRACK]


def test_a_point_is_shown_at_its_time_only_and_moments_are_a_key_away(demo):
    page = demo()
    pick(page, "count and point", "How many red diamond are there in the video?")
    ask(page, said("Two.", [point("1", 20, 30, frame_time=0.5), point("2", 80, 60, frame_time=1.5)]))
    go_to(page, 0.1)
    assert centre(page, "1") is None and centre(page, "2") is None
    page.get_by_role("button", name="next pointed moment").press("Enter")
    browser.expect(page.locator("video")).to_have_js_property("currentTime", 0.5)
    page.get_by_role("button", name="next pointed moment").press("Enter")
    browser.expect(page.locator("video")).to_have_js_property("currentTime", 1.5)
    go_to(page, 1.6)
    assert centre(page, "1") is None
    assert_marked(page, "2", 80, 60, size=(110, 102))
    page.get_by_role("button", name="previous pointed moment").press("Enter")
    browser.expect(page.locator("video")).to_have_js_property("currentTime", 1.5)
    line = page.locator("#timeline").bounding_box()
    page.mouse.click(line["x"] + 0.1 * line["width"], line["y"] + line["height"] - 2)
    duration = page.evaluate("() => document.querySelector('video').duration")
    assert page.evaluate("() => document.querySelector('video').currentTime") == pytest.approx(
        0.1 * duration, abs=0.02)


def test_points_are_on_the_image_that_they_name_and_names_and_answers_stay_text(demo, tmp_path):
    page = demo()
    files = []
    for number, size in enumerate(((90, 60), (60, 120))):
        Image.new("RGB", size, (90, 90, 90)).save(tmp_path / f"{number} {EVIL.replace('/', '')}.png")
        files.append(tmp_path / f"{number} {EVIL.replace('/', '')}.png")
    page.get_by_label("choose files").set_input_files(files)
    page.locator("#pictures img").nth(1).wait_for()
    points = [point("1", 30, 100, image=2) | {"label": EVIL}, point("2", 45, 30, image=1)]
    ask(page, said(f"{EVIL} <points coords=\"2 1 500 833\">{EVIL}</points>", points), f"Where is {EVIL}?")
    assert [part["type"] for part in page.server.asked[0]["messages"][0]["content"]] == [
        "image_url", "image_url", "text"]
    assert_marked(page, "2", 45, 30, "img", (90, 60), 0)
    assert_marked(page, "1", 30, 100, "img", (60, 120), 1)
    assert centre(page, "1", 0) is None and centre(page, "2", 1) is None
    assert page.title() == "Molmo2" and page.locator("[onerror]").count() == 0
    for selector in ("#log", "#pictures", "#points"):
        assert "onerror=" in page.locator(selector).inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    saved = json.loads(pathlib.Path(download.value.path()).read_text())
    assert saved["model"] == "nano" and saved["media"] == [one.name for one in files]
    assert [(one["id"], one["image"], one["x"], one["y"]) for one in saved["points"]] == [
        ("1", 2, 30, 100), ("2", 1, 45, 30)]
    assert [one["role"] for one in saved["messages"]] == ["user", "assistant"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download image with points").click()
    with Image.open(download.value.path()) as image:
        assert image.size == (90, 60)
        np.testing.assert_allclose(image.convert("RGB").getpixel((45, 30)), pictures.colour("2"), atol=8)


def test_points_are_in_the_pixels_of_the_server_also_where_the_browser_shows_others(demo):
    page = demo()   # as of a video whose pixels are not square
    pick(page, "track the diamond", "Track the red diamond.")
    ask(page, said("Here.", [point("1", 25.0, 54.0, frame_time=0.5)], [(50, 216)]))
    go_to(page, 0.6)
    assert_marked(page, "1", 50.0, 27.0)


def test_the_next_turn_continues_and_an_earlier_answer_can_be_shown_again(demo):
    page = demo()
    pick(page, "track the diamond", "Track the red diamond.")
    ask(page, said("first", TRACKED))
    ask(page, said("second", [point("1", 20, 30, frame_time=1.0)],
                   prompt_tokens_details={"cached_tokens": 60}), "And now?")
    messages = page.server.asked[1]["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert isinstance(messages[0]["content"], list) and messages[1:] == [
        {"role": "assistant", "content": "first"}, {"role": "user", "content": "And now?"}]
    assert "60 from the cache" in page.locator("#log").inner_text()
    assert page.locator("#points tbody tr").count() == 1
    page.get_by_role("button", name="Show 5 points").click()
    assert page.locator("#points tbody tr").count() == 5
    with page.expect_download() as download:
        page.get_by_role("button", name="Download video with points").click()
    assert pathlib.Path(download.value.path()).read_bytes() == b"a film"
    assert download.value.suggested_filename == "diamond_points.mp4"
    ((sent,),) = [page.server.drawn]
    assert sent["video"].startswith("data:video/mp4;base64,") and sent["points"] == [
        {"id": "1", "label": "red diamond", "x": x, "y": y, "frame_time": time} for time, x, y in TRACK]
    page.get_by_role("button", name="New conversation").click()
    ask(page, said("again"), "Hello?")
    assert len(page.server.asked[2]["messages"]) == 1


def test_a_question_without_media_is_a_text_and_options_are_sent_as_numbers(demo):
    page = demo()
    page.get_by_text("Sampling and frames").click()
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("New tokens, at most").fill("64")
    ask(page, said("Hello."), "Hi")
    (request,) = page.server.asked
    assert request["messages"] == [{"role": "user", "content": "Hi"}]
    assert {name: request[name] for name in ("temperature", "top_p", "seed", "max_completion_tokens")} == {
        "temperature": 0.7, "top_p": 0.9, "seed": 3, "max_completion_tokens": 64}
    assert "top_k" not in request and "media_io_kwargs" not in request
    pick(page, "track the diamond", "Track the red diamond.")
    page.get_by_label("Frames, at most").fill("4")
    page.get_by_label("From second").fill("0.5")
    page.get_by_label("To second").fill("1.5")
    ask(page, said("Yes.", [point("1", 20, 30, frame_time=0.4)]))
    assert page.server.asked[1]["media_io_kwargs"] == {"video": {"num_frames": 4, "start": 0.5, "end": 1.5}}
    assert "0.9 s" in page.locator("#points tbody").inner_text()   # from the start of the video


def test_an_answer_can_be_stopped_and_the_question_asked_again(demo):
    page = demo()
    page.server.answers.append(None)
    field = page.get_by_role("textbox", name="Question")
    field.fill("Slow?")
    field.press("Enter")
    page.get_by_role("button", name="Stop").click()
    browser.expect(field).to_have_value("Slow?")
    assert page.locator(".turn").count() == 0
    ask(page, said("Fast."))
    assert "Fast." in page.locator("#log").inner_text()


def test_errors_of_the_server_are_said_and_what_it_ignored(demo, new_page):
    new_page.excused += ["status of 429", "status of 400"]
    page = demo()
    error = {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": None}
    page.server.answers.append({"status": 429, "headers": {"retry-after": "2"}, "json": {"error": error}})
    field = page.get_by_role("textbox", name="Question")
    field.fill("Now?")
    field.press("Enter")
    browser.expect(page.get_by_role("alert")).to_have_text("the queue is full (try again in 2 s)")
    browser.expect(field).to_have_value("Now?")
    page.server.answers.append({"body": 'data: {"error": {"message": "it broke"}}\n\n',
                                "content_type": "text/event-stream"})
    field.press("Enter")
    browser.expect(page.get_by_role("alert")).to_have_text("it broke")
    page.server.answers.append({"body": said("Yes."), "content_type": "text/event-stream",
                                "headers": {"x-ignored-fields": "fps", "content-type": "text/event-stream"}})
    field.press("Enter")
    browser.expect(page.get_by_role("alert")).to_have_text("The server ignored: fps")
    assert re.search(r"Yes\.", page.locator("#log").inner_text())


def test_one_video_or_images_but_not_both(demo, tmp_path):
    page = demo()
    page.get_by_label("choose files").set_input_files([PAGE / "examples/two.png", PAGE / "examples/hops.mp4"])
    browser.expect(page.get_by_role("alert")).to_have_text("Choose one video, or images.")
    (tmp_path / "odd.avi").write_bytes(b"no film")
    page.get_by_label("choose files").set_input_files([tmp_path / "odd.avi"])
    browser.expect(page.get_by_text("cannot play this file")).to_be_visible()


def test_every_control_can_be_reached_by_keyboard_and_has_a_name(demo):
    page = demo()
    pick(page, "track the diamond", "Track the red diamond.")
    ask(page, said("first", TRACKED))
    names = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, video, summary")]
      .filter(one => one.checkVisibility() && !(one.labels && one.labels.length)
        && !one.getAttribute("aria-label") && !one.textContent.trim())
      .map(one => one.outerHTML)""")
    assert names == []
    page.locator("body").press("Tab")
    reached = set()
    for _ in range(40):
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {"video", "previous", "next", "moment", "files", "json", "film_file", "question", "send",
            "fresh"} <= reached
