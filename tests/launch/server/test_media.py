"""Where media come from: what may be read, how frames are chosen, and what makes two requests the same."""

import base64
import http.server
import os
import threading

import pytest

from launch.server import errors
from launch.server import fields
from launch.server import media
from launch.server import reading
from molmo2_jax import config as config_lib

INPUTS = config_lib.InputConfig(max_frames=16, max_images=3)
PNG = b"\x89PNG not really"
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()


def wanted(*parts, **more):
    content = [*parts, {"type": "text", "text": "What?"}]
    return fields.read({"model": "m", "messages": [{"role": "user", "content": content}]} | more, "m")


def picture(url=DATA):
    return {"type": "image_url", "image_url": {"url": url}}


def video(url, **inside):
    return {"type": "video_url", "video_url": {"url": url} | inside}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "media"
    made.mkdir()
    (made / "a.mp4").write_bytes(b"film")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    return made


def sources(folder=None, **rules):
    return media.Sources(media.Rules(folder=folder, **rules), INPUTS)


def refused(job, *arguments):
    with pytest.raises(errors.Refused) as caught:
        job(*arguments)
    return caught.value


def test_the_key_is_that_of_the_content_and_of_what_is_chosen(folder):
    by_file = sources(folder).job(wanted(video(f"file://{folder}/a.mp4")))
    by_data = sources(folder).job(wanted(video("data:video/mp4;base64,ZmlsbQ==")))
    assert by_file.key == by_data.key and by_file.kind == "video"
    assert sources(folder).job(wanted(video(f"file://{folder}/a.mp4", fps=1))).key != by_file.key
    (folder / "a.mp4").write_bytes(b"other film")
    assert sources(folder).job(wanted(video(f"file://{folder}/a.mp4"))).key != by_file.key
    assert sources().job(wanted(picture(), picture())).key != sources().job(wanted(picture())).key
    assert sources().job(wanted()) is None


def test_files_outside_the_folder_are_refused_whatever_their_url(folder, tmp_path):
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "round.mp4").symlink_to(folder / "round.mp4")
    os.mkfifo(folder / "pipe.mp4")
    for url in (f"file://{folder}/../secret.mp4", f"file://{folder}/%2e%2e/secret.mp4", "file:///etc/passwd",
                f"file://{folder}/link.mp4", f"file://elsewhere{folder}/a.mp4", "file:a.mp4", "file://",
                f"file://{tmp_path}/nothing.mp4", f"file://{folder}/a.mp4%00.png", f"file://{folder}/%ff.mp4",
                "file:///proc/self/environ", f"file://{folder}x/a.mp4"):
        error = refused(sources(folder).job, wanted(video(url)))
        assert error.status == 400 and "must name files in the folder of --media_folder" in str(error), url
    for name in ("none.mp4", "pipe.mp4", ""):
        error = refused(sources(folder).job, wanted(video(f"file://{folder}/{name}")))
        assert error.status == 400 and "there is no such file" in str(error)
    assert refused(sources(folder).job, wanted(video(f"file://{folder}/round.mp4"))).status == 400
    assert "need a server with --media_folder" in str(refused(sources().job, wanted(video("file:///a.mp4"))))
    inside = folder / "inner"
    inside.mkdir()
    (inside / "link.mp4").symlink_to(folder / "a.mp4")   # a link within the folder is its business
    assert sources(folder).job(wanted(video(f"file://{inside}/link.mp4"))).files[0].path == f"{folder}/a.mp4"


@pytest.mark.parametrize("url, status, words", [
    ("ftp://host/a.png", 400, "must begin with data:"), ("/etc/passwd", 400, "must begin with data:"),
    ("data:image/png,plain", 400, "must be data:TYPE;base64"), ("data:image/png;base64,@@@", 400, "base64"),
    ("data:image/png;base64,", 400, "is empty"), ("data:text/html;base64,AAAA", 415, "must be of type image"),
    ("data:video/mp4;base64,AAAA", 415, "must be of type image"),
    ("http://example.org/a.png", 400, "in --allow_http"), ("gopher:x", 400, "must begin")])
def test_urls_of_other_kinds_are_refused(url, status, words):
    error = refused(sources().job, wanted(picture(url)))
    assert (error.status, error.param) == (status, "messages.0.content.0") and words in str(error)


def test_pictures_and_videos_do_not_mix_and_are_counted():
    film = video("data:video/mp4;base64,AAAA")
    for parts in ((film, film), (film, picture())):
        assert "one video or about pictures" in str(refused(sources().job, wanted(*parts)))
    error = refused(sources().job, wanted(*[picture()] * 4))
    assert 'at most 3 pictures can be shown; got 4' in str(error) and 'add "frames_as_video"' in str(error)
    job = sources().job(wanted(*[picture()] * 4, frames_as_video={"fps": 2}))
    assert job.kind == "frames" and job.seconds == (0.0, 0.5, 1.0, 1.5)
    assert "at most 16 frames" in str(refused(
        sources().job, wanted(*[picture()] * 17, frames_as_video={"fps": 2})))


def test_a_list_of_jpegs_is_a_video_at_a_frame_a_second():
    url = "data:video/jpeg;base64," + ",".join(["AAAA", "BBBB", "CCCC"])
    job = sources().job(wanted(video(url)))
    assert (job.kind, job.seconds) == ("frames", (0.0, 1.0, 2.0)) and len(job.files) == 3
    assert sources().job(wanted(video(url, fps=4))).seconds == (0.0, 0.25, 0.5)
    assert refused(sources().job, wanted(video(url, num_frames=2))).param.endswith("num_frames")


@pytest.mark.parametrize("options, wanted_fields", [
    ({}, {"max_frames": 16, "max_fps": 2.0, "clip": None}),
    ({"num_frames": 8}, {"max_frames": 8, "max_fps": reading.EVENLY, "clip": None}),
    ({"num_frames": -1}, {"max_frames": 16, "max_fps": 2.0, "clip": None}),
    ({"fps": 1}, {"max_frames": 16, "max_fps": 1.0, "clip": None}),
    ({"fps": 1, "num_frames": 4}, {"max_frames": 4, "max_fps": 1.0, "clip": None}),
    ({"num_frames": 4, "frame_sample_mode": "uniform_last_frame"},
     {"max_frames": 4, "max_fps": 2.0, "clip": None}),
    ({"start": 1.5, "end": 3}, {"max_frames": 16, "max_fps": 2.0, "clip": (1.5, 3.0)}),
    ({"start": 1.5}, {"max_frames": 16, "max_fps": 2.0, "clip": (1.5, 1e9)}),
    ({"frame_sample_mode": "fps", "sampling_fps": 1, "max_fps": 5},
     {"max_frames": 16, "clip": None, "tracking_fps": 1.0, "max_tracking_fps": 5}),
])
def test_options_of_sampling(options, wanted_fields):
    assert media.sampling(options, INPUTS, "here") == wanted_fields


@pytest.mark.parametrize("options, name", [
    *(({"num_frames": value}, "num_frames") for value in (0, 17, 1.5)), ({"max_fps": -1}, "max_fps"),
    ({"fps": 0}, "fps"), ({"fps": "2"}, "fps"), ({"fps": 1, "max_fps": 2}, "fps"),
    ({"sampling_fps": 2}, "sampling_fps"), ({"frame_sample_mode": "random"}, "frame_sample_mode"),
    ({"frame_sample_mode": ["fps"]}, "frame_sample_mode"),
    ({"start": 3, "end": 1}, "start"), ({"end": "soon"}, "end"), ({"start": -1}, "start"),
    ({"frame_sample_mode": "fps", "fps": 1, "sampling_fps": 2}, "fps")])
def test_impossible_options_are_refused_by_name(options, name):
    error = refused(media.sampling, options, INPUTS, "here")
    assert (error.status, error.param) == (400, f"here.{name}")


class _Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, content = {"/a.png?q=1": (200, PNG), "/big": (200, b"x" * 3000), "/moved": (302, b""),
                           "/gone": (404, b"")}[self.path]
        self.send_response(status)
        self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_only_named_hosts_with_public_addresses_are_fetched_and_no_redirect_is_followed(monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), _Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        base = f"http://localhost:{site.server_port}"
        taken = sources(hosts=frozenset({"localhost"}), most_bytes=1000)
        error = refused(taken.job, wanted(picture(f"{base}/a.png?q=1")))
        assert error.status == 422 and "not a public one" in str(error)
        monkeypatch.setattr(media, "public_address", lambda host: "127.0.0.1")
        assert taken.job(wanted(picture(f"{base}/a.png?q=1"))).files[0].content == PNG
        for page, words in (("moved", "answered 302"), ("gone", "answered 404"), ("big", "at most 1000 b")):
            error = refused(taken.job, wanted(picture(f"{base}/{page}")))
            assert error.status == 422 and words in str(error)
        site.shutdown()
    assert refused(taken.job, wanted(picture(f"{base}/a.png?q=1"))).status == 422   # nobody listens
