"""The demo page: its files, and videos with the points of an answer drawn on them.

The page (molmo2_jax/serving/page) is a client of this server's own API. POST /v1/annotated, which it uses for
a download, takes {"video": URL, "points": [{"id", "x", "y", "frame_time"}, ...]} and returns an mp4 file.
"""

import asyncio
import dataclasses
import json
import pathlib
import resource
from collections.abc import Sequence

from starlette import requests
from starlette import responses
from starlette import routing
from starlette import staticfiles

from data_pipelines.stream import child
from launch.server import errors
from launch.server import media as media_lib
from molmo2_jax import serving
from molmo2_jax.inputs import points as points_lib
from molmo2_jax.inputs import video as videos
from molmo2_jax.serving import annotated

FOLDER = pathlib.Path(serving.__file__).parent / "page"
_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cache-Control": "no-cache"}
_MOST_WAITING = 4   # videos; drawing takes about as long as playing


@dataclasses.dataclass(frozen=True)
class Drawer:
    """Draws points on a video, in a process of its own.

    most_seconds: of the video. most_bytes: of the process's memory.
    """
    most_seconds: float
    most_bytes: int

    def __call__(self, video, points: Sequence[points_lib.Point]) -> bytes:
        """Returns an mp4 file.

        Raises:
          ValueError: the video cannot be read, or is too long.
        """
        resource.setrlimit(resource.RLIMIT_AS, (self.most_bytes, self.most_bytes))
        try:
            duration = videos.index(video).duration
            if duration > self.most_seconds:
                raise ValueError(f"a video may have {self.most_seconds:g} seconds; got {duration:g}")
            return annotated.mp4(video, points)
        except MemoryError:
            raise ValueError("the video must be drawn within "
                             f"{self.most_bytes / 2**30:g} GiB of memory") from None


def routes() -> list[routing.BaseRoute]:
    """Returns the routes of the page and its files."""
    return [routing.Route("/", _index, methods=["GET"]),
            routing.Mount("/page", staticfiles.StaticFiles(directory=FOLDER))]


async def _index(request: requests.Request) -> responses.Response:
    return responses.FileResponse(FOLDER / "index.html", headers=_HEADERS)


class Page:
    """Draws for clients, one video at a time. seconds: until one must be drawn."""

    def __init__(self, drawer: Drawer, seconds: float):
        self._child = child.Child(drawer, seconds / 2, tries=1, slack=5.0)
        self._waiting, self._lock = 0, asyncio.Lock()

    async def draw(self, raw: bytes, sources: media_lib.Sources) -> responses.Response:
        """Returns the response to the body of a request.

        Raises:
          errors.Refused: the video cannot be drawn, or too many wait.
        """
        if self._waiting >= _MOST_WAITING:
            raise errors.Refused(429, f"at most {_MOST_WAITING} videos may wait to be drawn", retry_after=5)
        self._waiting += 1
        try:
            video, points = await asyncio.to_thread(_understand, raw, sources)
            async with self._lock:
                film = await asyncio.shield(asyncio.to_thread(self._draw, video, points))
        finally:
            self._waiting -= 1
        return responses.Response(film, media_type="video/mp4", headers=_HEADERS)

    def _draw(self, video, points: Sequence[points_lib.Point]) -> bytes:
        try:
            return self._child(video, points)
        except child.Crashed as error:
            raise errors.bad("the video cannot be drawn: its decoder crashed or did not end",
                             "video") from error
        except ValueError as error:
            raise errors.bad(str(error), "video") from error

    def close(self) -> None:
        """Ends the process that draws."""
        self._child.close()


def _understand(raw: bytes, sources: media_lib.Sources):
    """Returns (file of the video, points) of a body."""
    try:
        body = json.loads(raw)
        url, values = body["video"], body["points"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise errors.bad("the body must be JSON with video and points") from None
    if not isinstance(url, str):
        raise errors.bad("video must be a URL", "video")
    try:
        points = annotated.points_of(values)
    except ValueError as error:
        raise errors.bad(str(error), "points") from error
    return sources.file(url, "video", "the video", "video"), points
