"""The media that a published row names -> file names in the folder of a task."""

import hashlib
from collections.abc import Mapping

MOST_IMAGES = 5
_FILMS = (".mp4", ".webm", ".mkv", ".avi", ".gif", ".mov")
# Columns that name a video, in the order in which they are looked for.
_VIDEO_COLUMNS = ("clip", "video_id", "video", "vid_name", "vid_filename", "video_name", "video_path",
                  "video_filename", "rel_vid_path", "video_uid", "uni_clipped_id", "visual_input", "id")


def image(row: Mapping) -> str:
    """Returns the file of a row's image.

    That is `image` if it is a file name (published.py writes embedded images to files), else
    media/NAME.jpg, where NAME is image_sha256, image_id, the SHA-256 of image_url, or id, whichever is
    found first.

    Raises:
      KeyError: the row has none of these columns.
    """
    if isinstance(row.get("image"), str):
        return row["image"]
    for column in ("image_sha256", "image_id"):
        if row.get(column) is not None:
            return f"media/{row[column]}.jpg"
    return _downloaded(row["image_url"]) if row.get("image_url") else f"media/{row['id']}.jpg"


def images(row: Mapping) -> list[str]:
    """Returns the files of a row's images: `images`, or media/NAME.jpg by the SHA-256 of image_urls.

    Raises:
      KeyError: the row has neither column.
    """
    return list(row["images"]) if row.get("images") else [_downloaded(url) for url in row["image_urls"]]


def _downloaded(url: str) -> str:
    return f"media/{hashlib.sha256(url.encode()).hexdigest()}.jpg"


def video(row: Mapping) -> str:
    """Returns media/NAME.mp4; NAME is the first of _VIDEO_COLUMNS. A video suffix of NAME is kept.

    Raises:
      StopIteration: the row has none of these columns.
    """
    name = str(next(row[column] for column in _VIDEO_COLUMNS if row.get(column)))
    return f"media/{name}" if name.endswith(_FILMS) else f"media/{name}.mp4"
