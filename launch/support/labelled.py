"""The flags of launch.prepare --from, which makes a data folder from the export of a labelling tool."""

import pathlib

from absl import flags

from data_pipelines import labelling
from data_pipelines.labelling import folder
from launch.support import cli

FROM = flags.DEFINE_enum(
    "from", None, sorted(labelling.FORMATS), "Labelling tool, or format, that --input is an export of.")
_INPUT = flags.DEFINE_string("input", None, "Export of --from: a file; for davis and yolo a folder.")
_HELDOUT = flags.DEFINE_float(
    "heldout", 0.0, "Share of the videos and images for OUTPUT/heldout, the rest for OUTPUT/train.")
_ROOT = flags.DEFINE_string(
    "media_root", None, "Folder that file names in --input are relative to; by default that of --input.")
_FRAMES_FPS = flags.DEFINE_float(
    "frames_fps", 24.0, "Frames per second of the videos that --input holds as frames.")
FLAGS = ("from", "input", "heldout", "media_root", "frames_fps")
_SHOWN = 3  # reasons that are printed


def prepare() -> None:
    """Writes the data folder that the flags describe, and prints what was written and left out.

    Raises:
      ValueError: a flag is missing, or labelling.convert refuses the export.
    """
    if not _INPUT.value or not cli.OUTPUT.value:
        raise ValueError("--from needs --input, the export, and --output, the data folder to write; got "
                         f"--input={_INPUT.value} --output={cli.OUTPUT.value}")
    output = pathlib.Path(cli.OUTPUT.value)
    report = labelling.convert(
        FROM.value, pathlib.Path(_INPUT.value), output,
        pathlib.Path(_ROOT.value) if _ROOT.value else None,
        folder.Options(heldout=_HELDOUT.value, frames_fps=_FRAMES_FPS.value))
    (output / "left_out.txt").write_text("".join(f"{one}\n" for one in report.left_out), encoding="utf-8")
    for name, number in report.records.items():
        print(f"{name}/annotations.jsonl: {number} records")
    print(f"{report.media} videos or images, {report.points} points, {report.tracks} tracks; left out: "
          f"{len(report.left_out) or 'nothing'}")
    for reason in report.left_out[:_SHOWN]:
        print(f"  {reason}")
    if len(report.left_out) > _SHOWN:
        print(f"  ... all in {output / 'left_out.txt'}")
