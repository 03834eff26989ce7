"""What the rows of published data sets call their media -> names of files in the folder of a task."""

import hashlib
from collections.abc import Mapping

MOST_IMAGES = 5


def image(row: Mapping) -> str:
    """Returns the file of a row's image: `image` where the file is known (published.py puts embedded images
    into files), else media/NAME.jpg, NAME being image_sha256, image_id, the SHA-256 of image_url, or id.

    Raises:
      KeyError: the row has none of them.
    """
    if isinstance(row.get("image"), str):
        return row["image"]
    for column in ("image_sha256", "image_id"):
        if row.get(column) is not None:
            return f"media/{row[column]}.jpg"
    return _downloaded(row["image_url"]) if row.get("image_url") else f"media/{row['id']}.jpg"


def images(row: Mapping) -> list[str]:
    """Returns the files of a row's images: `images`, or media/NAME.jpg by the SHA-256 of image_urls."""
    return list(row["images"]) if row.get("images") else [_downloaded(url) for url in row["image_urls"]]


def _downloaded(url: str) -> str:
    return f"media/{hashlib.sha256(url.encode()).hexdigest()}.jpg"


def video(row: Mapping) -> str:
    """Returns media/NAME.mp4, NAME being the first of clip, video_id, video, id; NAME keeps its suffix."""
    name = str(next(row[column] for column in ("clip", "video_id", "video", "id") if row.get(column)))
    return f"media/{name}" if name.endswith((".mp4", ".webm", ".mkv", ".avi", ".gif", ".mov")) else (
        f"media/{name}.mp4")
