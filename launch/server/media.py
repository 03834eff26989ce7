"""Media of a request: where their bytes come from, how frames are chosen, and the key of the result.

Nothing is decoded here; launch/server/reading.py does that, in other processes.
"""

import base64
import binascii
import dataclasses
import hashlib
import http.client
import ipaddress
import json
import os
import pathlib
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence

from launch.server import errors
from launch.server import fields
from launch.server import reading
from molmo2_jax import config as configs
from molmo2_jax.inputs import held_file

_CHUNK = 1 << 20
_KINDS = {"image": ("image/",), "video": ("video/", "image/gif", "application/octet-stream"),
          "frames": ("video/jpeg",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What media a server takes.

    folder: whose files `file://` may name; None: none. hosts: whose http(s) URLs are fetched. most_bytes: of
      one fetched file. seconds: in which it must arrive.
    """
    folder: pathlib.Path | None = None
    hosts: frozenset[str] = frozenset()
    most_bytes: int = 256 << 20
    seconds: float = 30.0


class Sources:
    """Turns the media of requests into reading.Job; called in threads."""

    def __init__(self, rules: Rules, inputs: configs.InputConfig):
        self._rules, self._inputs = rules, inputs
        self._folder = None if rules.folder is None else rules.folder.resolve(strict=True)
        self._hashes: dict[tuple, str] = {}
        self._lock = threading.Lock()

    def job(self, wanted: fields.Wanted) -> reading.Job | None:
        """Returns what is to be read for a request; None for text alone.

        Raises:
          errors.Refused: the media cannot be had, or may not be combined.
        """
        parts = wanted.parts
        if not parts:
            return None
        videos = [part for part in parts if part.kind == "video"]
        frames = [part for part in parts if part.seconds is not None]
        if wanted.frames_fps is not None and not videos and not frames:
            frames = [dataclasses.replace(part, seconds=number / wanted.frames_fps)
                      for number, part in enumerate(parts)]
        if len(videos) + bool(frames) > 1 or (videos or frames) and len(videos) + len(frames) < len(parts):
            raise errors.bad("a conversation must be about one video or about pictures, not both; got "
                             f"{len(parts)} media, of which {len(videos)} videos and {len(frames)} frames",
                             parts[-1].where)
        if videos:
            return self._video(videos[0])
        self._check_count(len(parts), bool(frames), parts[-1].where)
        files = [self.file(part.url, "image", f"picture {number}", part.where)
                 for number, part in enumerate(frames or parts, 1)]
        seconds = tuple(part.seconds for part in frames)
        if seconds and list(seconds) != sorted(seconds):
            raise errors.bad("times of frames must not decrease", frames[0].where)
        return self._job("frames" if frames else "images", files, seconds=seconds)

    def _check_count(self, count: int, are_frames: bool, where: str) -> None:
        most = self._inputs.max_frames if are_frames else self._inputs.max_images
        if count > most:
            raise errors.bad(
                f"at most {most} {'frames' if are_frames else 'pictures'} can be shown; got {count}"
                + ("" if are_frames else "; if they are frames of a video, add \"frames_as_video\": "
                   "{\"fps\": 2}, or a text like <1.5 seconds> before each"), where)

    def _video(self, part: fields.Part) -> reading.Job:
        if part.url.startswith("data:video/jpeg;base64,"):
            return self._listed(part)
        choice = sampling(part.options, self._inputs, part.where)
        return self._job("video", [self.file(part.url, "video", "the video", part.where)], **choice)

    def _listed(self, part: fields.Part) -> reading.Job:
        """Returns the frames of a list of JPEGs, whose times are index / fps, or 0, 1 / fps, ..."""
        listed = part.url.partition(",")[2].split(",")
        self._check_count(len(listed), True, part.where)
        for name in set(part.options) - {"fps"}:
            raise errors.bad(f"{name} does not apply to a list of frames; fps does", f"{part.where}.{name}")
        rate = _positive(part.options, "fps", part.where) or 1.0
        files = [held_file.HeldFile(f"frame {number}", _decoded(one, part.where))
                 for number, one in enumerate(listed)]
        return self._job("frames", files, seconds=tuple(number / rate for number in range(len(files))))

    def _job(self, kind: str, files: Sequence, **choice) -> reading.Job:
        digest = hashlib.sha256(json.dumps([kind, choice], sort_keys=True, default=str).encode())
        for file in files:
            digest.update(self._hash(file).encode())
        return reading.Job(kind=kind, files=tuple(files), key=digest.hexdigest(), **choice)

    def _hash(self, file: held_file.HeldFile | reading.NamedFile) -> str:
        if isinstance(file, held_file.HeldFile):
            return hashlib.sha256(file.content).hexdigest()
        found = os.stat(file.path)
        state = file.path, found.st_ino, found.st_size, found.st_mtime_ns
        with self._lock:
            known = self._hashes.get(state)
        if known is None:
            with open(file.path, "rb") as content:
                known = hashlib.file_digest(content, "sha256").hexdigest()
            with self._lock:
                while len(self._hashes) >= 4096:
                    del self._hashes[next(iter(self._hashes))]
                self._hashes[state] = known
        return known

    # Bytes

    def file(self, url: str, kind: str, name: str, where: str):
        """Returns the file of the URL in the field `where`, called `name` in messages; kind: image or video.

        Raises:
          errors.Refused: it cannot be had.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return held_file.HeldFile(name, _data(url, kind, where))
        if scheme == "file":
            return self._in_folder(url, name, where)
        if scheme in ("http", "https"):
            return held_file.HeldFile(name, self._fetched(url, where))
        raise errors.bad(f"{where}: a URL must begin with data:, file: or http(s):; got {_start(url)}", where)

    def _in_folder(self, url: str, name: str, where: str) -> reading.NamedFile:
        """Returns a file of the folder of media; links and `..` are followed before it is compared."""
        if self._folder is None:
            raise errors.bad(f"{where}: file: URLs need a server with --media_folder", where)
        try:
            split = urllib.parse.urlsplit(url)
            if split.netloc not in ("", "localhost"):
                raise ValueError
            path = pathlib.Path(urllib.parse.unquote(split.path, errors="strict"))
            if not path.is_absolute() or "\0" in str(path):
                raise ValueError
            path = path.resolve()
            is_inside = path.is_relative_to(self._folder)
        except (ValueError, OSError, RuntimeError):   # a name that is no path, or a circle of links
            is_inside = False
        if not is_inside:   # says nothing of what is there
            raise errors.bad(f"{where}: file: URLs must name files in the folder of --media_folder; got "
                             f"{_start(url)}", where)
        if not path.is_file() or not os.access(path, os.R_OK):
            raise errors.bad(f"{where}: there is no such file: {_start(url)}", where)
        return reading.NamedFile(str(path), name)

    def _fetched(self, url: str, where: str) -> bytes:
        try:
            split = urllib.parse.urlsplit(url)
            host, port = (split.hostname or "").lower(), split.port
        except ValueError:
            host = ""
        if host not in self._rules.hosts:
            raise errors.bad(f"{where}: http(s) URLs need a server that names their host in --allow_http; "
                             f"got {_start(url)}", where)
        try:
            address = public_address(host)
            return _fetch(split, host, port, address, self._rules)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise errors.Refused(422, f"{where}: {_start(url)} could not be fetched: {error}",
                                 where) from None


def _start(url: str) -> str:
    return repr(url if len(url) <= 120 else url[:120] + "...")


def _data(url: str, kind: str, where: str) -> bytes:
    head, comma, payload = url[len("data:"):].partition(",")
    media_type, *extra = head.split(";")
    if not comma or extra[-1:] != ["base64"]:
        raise errors.bad(f"{where}: a data: URL must be data:TYPE;base64,...; got {_start(url)}", where)
    if media_type and not media_type.lower().startswith((*_KINDS[kind], "application/octet-stream")):
        raise errors.Refused(415, f"{where}: must be of type {kind}/...; got {media_type[:80]!r}", where)
    return _decoded(payload, where)


def _decoded(payload: str, where: str) -> bytes:
    try:
        content = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise errors.bad(f"{where}: its base64 cannot be decoded", where) from None
    if not content:
        raise errors.bad(f"{where}: is empty", where)
    return content


def public_address(host: str) -> str:
    """Returns an address of a host.

    Raises:
      ValueError: one of its addresses is not public. OSError: it has none.
    """
    found = [str(one[4][0]) for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    if not all(ipaddress.ip_address(one).is_global for one in found):
        raise ValueError("its address is not a public one")
    return found[0]


def _fetch(split, host: str, port: int | None, address: str, rules: Rules) -> bytes:
    """Returns the content of a URL from the address that was checked; follows no redirect."""
    late = time.monotonic() + rules.seconds
    is_safe = split.scheme == "https"
    connection = (http.client.HTTPSConnection(host, port, context=ssl.create_default_context(),
                                              timeout=rules.seconds) if is_safe
                  else http.client.HTTPConnection(host, port, timeout=rules.seconds))
    # A second look-up of the name could have another result.
    setattr(connection, "_create_connection",  # noqa: B010, unknown to type checkers
            lambda to, *rest: socket.create_connection((address, to[1]), *rest))
    try:
        target = urllib.parse.quote(split.path or "/", safe="/%:@!$&'()*+,;=~-._")
        connection.request("GET", target + (f"?{split.query}" if split.query else ""))
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"its server answered {response.status}")
        parts, size = [], 0
        while part := response.read(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > rules.most_bytes:
                raise ValueError(f"it must have at most {rules.most_bytes} bytes")
            if time.monotonic() > late:
                raise ValueError(f"it must arrive within {rules.seconds:g} seconds")
        return b"".join(parts)
    finally:
        connection.close()


# How frames are chosen


def _positive(options: dict, name: str, where: str) -> float | None:
    value = options.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 1e-6 <= value <= 1e6):
        raise errors.bad(f"{name} must be a number > 0; got {value!r}", f"{where}.{name}")
    return float(value)


def sampling(options: dict, inputs: configs.InputConfig, where: str) -> dict:
    """Returns the fields of a reading.Job for options of sampling.

    Raises:
      errors.Refused: they are impossible or contradict each other.
    """
    mode, most = options.get("frame_sample_mode"), options.get("num_frames")
    if mode not in (None, "uniform_last_frame", "fps"):
        raise errors.bad(f"frame_sample_mode must be uniform_last_frame or fps; got {mode!r}",
                         f"{where}.frame_sample_mode")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < -1 or most == 0):
        raise errors.bad(f"num_frames must be a whole number >= 1, or -1 for the most there may be; got "
                         f"{most!r}", f"{where}.num_frames")
    if most is not None and most > inputs.max_frames:
        raise errors.bad(f"num_frames must be at most {inputs.max_frames} on this server; got {most}",
                         f"{where}.num_frames")
    fps, max_fps, rate = (_positive(options, name, where) for name in ("fps", "max_fps", "sampling_fps"))
    if rate is not None and mode != "fps":
        raise errors.bad("sampling_fps needs frame_sample_mode fps", f"{where}.sampling_fps")
    clip = _clip(options, where)
    frames = inputs.max_frames if most in (None, -1) else most
    if mode == "fps":
        if fps is not None and rate not in (None, fps):
            raise errors.bad(f"fps and sampling_fps must agree; got {fps:g} and {rate:g}", f"{where}.fps")
        return {"max_frames": frames, "clip": clip, "tracking_fps": rate or fps or inputs.max_fps,
                "max_tracking_fps": int(max_fps or inputs.max_tracking_fps)}
    if fps is not None and max_fps not in (None, fps):
        raise errors.bad(f"fps and max_fps must agree; got {fps:g} and {max_fps:g}", f"{where}.fps")
    is_uniform = most not in (None, -1) and mode is None and fps is None and max_fps is None
    chosen = reading.EVENLY if is_uniform else fps or max_fps or inputs.max_fps
    return {"max_frames": frames, "max_fps": chosen, "clip": clip}


def _clip(options: dict, where: str) -> tuple[float, float] | None:
    start, end = options.get("start"), options.get("end")
    if start is None and end is None:
        return None
    for name, value in (("start", start), ("end", end)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < 1e9):
            raise errors.bad(f"{name} must be seconds >= 0; got {value!r}", f"{where}.{name}")
    start, end = float(start or 0), 1e9 if end is None else float(end)
    if start >= end:
        raise errors.bad(f"start must be before end; got {start:g} and {end:g}", f"{where}.start")
    return start, end
