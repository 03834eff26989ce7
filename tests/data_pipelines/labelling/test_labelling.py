"""Exports of labelling tools, in the tools' real formats, become data folders that training can read."""

import fractions
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from data_pipelines import labelling
from data_pipelines import masks
from data_pipelines import sources
from data_pipelines.labelling import folder as folder_lib
from data_pipelines.labelling import labels
from data_pipelines.labelling import objects
from data_pipelines.world import write as world_write

WIDTH, HEIGHT, FPS, FRAMES = 48, 32, 12, 24   # of the video: two seconds


def pictures(number=FRAMES):
    return [np.full((HEIGHT, WIDTH, 3), 8 * frame, np.uint8) for frame in range(number)]


def draw_video(path):
    world_write.encode(path, pictures(), np.arange(FRAMES + 1) * 2, fractions.Fraction(1, 2 * FPS), 6)


@pytest.fixture
def export(tmp_path):
    """A folder with clip.mp4, a.png and b.png, as media of exports."""
    draw_video(tmp_path / "clip.mp4")
    for name in "ab":
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{name}.png")
    return tmp_path


def records(output):
    return [json.loads(line) for line in (output / "annotations.jsonl").read_text().splitlines()]


def converted(name, path, **how):
    """Returns (records, reasons for what was left out) of an export; training can read every record."""
    output = path.parent / "out"
    report = labelling.convert(name, path, output, **how)
    examples, errors = sources.read_folder(output)
    assert not errors and len(examples) == sum(report.records.values())
    return records(output), report.left_out


def of_kind(record, kind):
    return {one["label"]: one for one in record["annotations"] if one["type"] == kind}


COCO = {
    "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
               {"id": 8, "file_name": "b.png", "width": WIDTH, "height": HEIGHT}],
    "categories": [{"id": 1, "name": "cup"},
                   {"id": 2, "name": "person", "keypoints": ["nose", "left eye", "right eye"]}],
    "annotations": [
        {"id": 11, "image_id": 7, "category_id": 1, "bbox": [10, 4, 20, 8], "area": 160, "iscrowd": 0},
        {"id": 12, "image_id": 7, "category_id": 1, "bbox": [40, 20, 20, 8], "area": 160, "iscrowd": 0},
        {"id": 13, "image_id": 7, "category_id": 1, "bbox": [60, 0, 5, 5], "area": 25, "iscrowd": 0},
        {"id": 14, "image_id": 8, "category_id": 1, "bbox": [4, 4, 8, 8], "area": 64, "iscrowd": 0,
         "segmentation": [[4, 4, 12, 4, 12, 12, 4, 12]]},
        {"id": 15, "image_id": 8, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 1,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 4, HEIGHT * WIDTH - 4]}},
        {"id": 16, "image_id": 8, "category_id": 2, "bbox": [0, 0, 9, 9], "num_keypoints": 2, "iscrowd": 0,
         "keypoints": [5, 6, 2, 7, 5, 1, 0, 0, 0]}]}


def test_coco_boxes_masks_and_keypoints_become_points(export):
    (export / "coco.json").write_text(json.dumps(COCO))
    (first, second), left_out = converted("coco", export / "coco.json")
    assert first["images"] == ["../a.png"] and first["size"] == [[WIDTH, HEIGHT]]
    assert of_kind(first, "points")["cup"]["points"] == [
        {"id": 11, "x": 20.0, "y": 8.0}, {"id": 12, "x": 44.0, "y": 24.0}]  # the second leaves the frame
    found = of_kind(second, "points")
    assert set(found) == {"cup", "person nose"}
    assert [(one["x"], one["y"]) for one in found["person nose"]["points"]] == [(5, 6)]
    [mask] = second["masks"]
    inside = masks.decode(mask)
    assert mask["id"] == 14 and inside.sum() == 64 and inside[4:12, 4:12].all()
    [spot] = found["cup"]["points"]
    assert inside[round(spot["y"]), round(spot["x"])] and 6 <= spot["x"] <= 9
    crowd, hidden, outside = left_out
    assert hidden == "coco.json: annotations[5]: person left eye: is labelled as hidden"
    assert "annotations[4]" in crowd and "a crowd has no single point" in crowd
    assert outside == ("coco.json: annotations[2]: cup: a box must overlap the frame of 48 x 32; "
                       "got x 60 to 65, y 0 to 5")


def test_compressed_run_lengths_are_those_of_cocos_own_tools():
    assert masks.uncompressed("52203") == [5, 2, 2, 2, 5] == masks.uncompressed(compressed([5, 2, 2, 2, 5]))
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 5000, rng.integers(1, 12)).tolist()
        assert masks.uncompressed(compressed(counts)) == counts
    with pytest.raises(ValueError, match="must end with a number"):
        masks.uncompressed("P")


def compressed(counts):
    """Returns COCO's text of run lengths, by the rule of rleToString in maskApi.c."""
    text = ""
    for place, count in enumerate(counts):
        value, more = count - (counts[place - 2] if place > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 if more else bits) + 48)
    return text


def cvat_track(identity, label, shapes):
    return f'<track id="{identity}" label="{label}" source="manual">{"".join(shapes)}</track>'


def cvat_box(frame, x, outside=0, occluded=0):
    return (f'<box frame="{frame}" keyframe="1" outside="{outside}" occluded="{occluded:d}" xtl="{x}" '
            f'ytl="4.0" xbr="{x + 4}" ybr="8.0" z_order="0"><attribute name="colour">red</attribute></box>')


def cvat(body):
    return ('<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task><id>3</id>'
            f'<size>{FRAMES}</size><original_size><width>{WIDTH}</width><height>{HEIGHT}</height>'
            f'</original_size><source>clip.mp4</source></task></meta>{body}</annotations>')


def test_cvat_tracks_are_sampled_at_the_times_that_training_sees(export):
    shapes = [cvat_box(frame, frame, occluded=frame in (6, 7)) for frame in range(19)]
    shapes.append(cvat_box(19, 0, outside=1))
    points = ['<points frame="3" keyframe="1" outside="0" occluded="0" points="7.5,6.0" z_order="0"/>']
    tracks = cvat_track(0, "car", shapes) + cvat_track(5, "light", points)
    (export / "annotations.xml").write_text(cvat(tracks))
    [record], left_out = converted("cvat", export / "annotations.xml")
    assert not left_out and record["video"] == "../clip.mp4" and record["size"] == [WIDTH, HEIGHT]
    [track] = of_kind(record, "tracks")["car"]["tracks"]
    assert track == {"id": 0, "points": [
        {"time": 0.0, "x": 2.0, "y": 6.0}, {"time": 0.5, "x": 8.0, "y": 6.0, "occluded": True},
        {"time": 1.0, "x": 14.0, "y": 6.0}, {"time": 1.5, "x": 20.0, "y": 6.0}]}
    found = of_kind(record, "points")
    assert found["car"]["points"] == [{"id": 0, "time": 0.0, "x": 2.0, "y": 6.0}]
    assert found["light"]["points"] == [{"id": 5, "time": 0.25, "x": 7.5, "y": 6.0}]


def test_cvat_images_have_boxes_polygons_masks_and_skeletons(export):
    body = ('<image id="0" name="a.png" width="48" height="32">'
            '<polygon label="leaf" source="manual" occluded="0" points="10,10;20,10;20,20;10,20"/>'
            '<mask label="leaf" source="manual" occluded="0" rle="0, 3, 1, 2" left="30" top="5" width="3" '
            'height="2"/>'
            '<skeleton label="hand" source="manual"><points label="1" outside="0" occluded="0" points="3,4"/>'
            '<points label="2" outside="1" occluded="0" points="9,9"/></skeleton>'
            '<ellipse label="leaf" cx="1" cy="1" rx="1" ry="1"/></image>')
    (export / "annotations.xml").write_text(cvat(body))
    [record], left_out = converted("cvat", export / "annotations.xml")
    first, second = (masks.decode(mask) for mask in record["masks"])
    assert first.sum() == 100 and first[10:20, 10:20].all()
    assert second[5, 30:33].all() and second[6, 31:33].all() and second.sum() == 5
    assert of_kind(record, "points")["hand 1"]["points"][0]["x"] == 3.0
    assert len(left_out) == 1 and "got ellipse" in left_out[0]


def label_studio(sequence, frames=FRAMES):
    value = {"framesCount": frames, "duration": 2.0, "sequence": sequence, "labels": ["Player"]}
    return [{"id": 1, "data": {"video": "/data/upload/1/0a1b2c3d-clip.mp4"}, "annotations": [
        {"id": 9, "was_cancelled": False, "result": [
            {"id": "k3x", "type": "videorectangle", "from_name": "box", "to_name": "video", "value": value},
            {"id": "t1", "type": "timelinelabels", "from_name": "t", "to_name": "video", "value": {}}]}]}]


def test_label_studio_rectangles_move_between_their_key_frames(export):
    key = {"rotation": 0, "y": 25, "width": 25, "height": 25}
    sequence = [{"frame": 1, "enabled": True, "x": 0, "time": 0.04, **key},
                {"frame": 13, "enabled": False, "x": 50, "time": 1.04, **key},
                {"frame": 24, "enabled": True, "x": 0, "time": 1.96, **key}]
    (export / "project.json").write_text(json.dumps(label_studio(sequence)))
    [record], [reason] = converted("label_studio", export / "project.json")
    [track] = of_kind(record, "tracks")["Player"]["tracks"]
    assert track["points"] == [{"time": 0.0, "x": 6.0, "y": 12.0}, {"time": 0.5, "x": 18.0, "y": 12.0},
                               {"time": 1.0, "x": 30.0, "y": 12.0}]  # not enabled from frame 13 on
    assert "a region must be videorectangle" in reason and "got timelinelabels" in reason


def test_label_studio_frames_are_counted_at_its_own_rate(export):
    key = {"enabled": True, "rotation": 0, "y": 25, "width": 25, "height": 25}
    sequence = [{"frame": 1, "x": 0, **key}, {"frame": 25, "x": 50, **key}]   # 24 a second, the video 12
    (export / "project.json").write_text(json.dumps(label_studio(sequence, frames=48)))
    [record], _ = converted("label_studio", export / "project.json")
    [track] = of_kind(record, "tracks")["Player"]["tracks"]
    assert [(one["time"], one["x"]) for one in track["points"]] == [(0.0, 6.0), (0.5, 18.0), (1.0, 30.0)]


def test_label_studio_images_have_rectangles_and_key_points(export):
    tasks = [{"id": 2, "data": {"image": "/data/local-files/?d=shop/a.png"}, "annotations": [{"result": [
        {"id": "r", "type": "rectanglelabels", "original_width": WIDTH, "original_height": HEIGHT, "value": {
            "x": 25, "y": 25, "width": 25, "height": 25, "rotation": 90, "rectanglelabels": ["Box"]}},
        {"id": "p", "type": "keypointlabels", "original_width": WIDTH, "original_height": HEIGHT, "value": {
            "x": 50, "y": 50, "width": 0.4, "keypointlabels": ["Tip"]}}]}]}]
    (export / "project.json").write_text(json.dumps(tasks))
    [record], left_out = converted("label_studio", export / "project.json")
    found = of_kind(record, "points")
    # 12 x 8 pixels at (12, 8), turned by 90 degrees about that corner: x 4 to 12, y 8 to 20
    assert (found["Box"]["points"][0]["x"], found["Box"]["points"][0]["y"]) == (8.0, 14.0)
    assert found["Tip"]["points"][0]["x"] == 24.0 and not left_out


def test_vott_rows_name_images_and_moments_of_videos(export):
    (export / "vott.csv").write_text(
        '"image","xmin","ymin","xmax","ymax","label"\n"a.png",10,4,30,12,"cup"\n'
        '"clip.mp4#t=0.5.jpg",2.5,4,6.5,8,"ball"\n"clip.mp4#t=1.5",3,4,7,8,"ball"\n"gone.png",1,1,2,2,"cup"\n')
    found, left_out = converted("vott_csv", export / "vott.csv")
    image, video = found
    assert of_kind(image, "points")["cup"]["points"][0] == {"id": 1, "x": 20.0, "y": 8.0}
    assert [(one["time"], one["x"]) for one in of_kind(video, "points")["ball"]["points"]] == [
        (0.5, 4.5), (1.5, 5.0)]
    assert len(left_out) == 1 and "gone.png: 1 labels: must be a file; found none" in left_out[0]


def test_rows_of_one_track_in_a_csv_are_one_object(export):
    rows = [("clip.mp4", 0.0, 4, 5, "ball", 3), ("clip.mp4", 0.4, 8, 5, "ball", 3),
            ("clip.mp4", 0.8, 12, 5, "ball", 3), ("clip.mp4", 0.5, 40, 30, "cup", ""),
            ("clip.mp4", 7.0, 1, 1, "cup", ""), ("a.png", "", 9, 9, "cup", ""),
            ("a.png", "", "x", 9, "cup", "")]
    (export / "points.csv").write_text("video,time,x,y,label,track\n" + "".join(
        ",".join(map(str, row)) + "\n" for row in rows))
    (video, image), left_out = converted("csv", export / "points.csv")
    [track] = of_kind(video, "tracks")["ball"]["tracks"]
    assert track == {"id": 3, "points": [{"time": 0.0, "x": 4.0, "y": 5.0},
                                         {"time": 0.5, "x": 9.0, "y": 5.0}]}
    assert of_kind(video, "points")["cup"]["points"] == [{"id": 4, "time": 0.5, "x": 40.0, "y": 30.0}]
    assert of_kind(image, "points")["cup"]["points"][0]["x"] == 9.0
    bad, late = left_out
    assert bad.startswith("points.csv: row 8: could not convert")
    assert late == "points.csv: row 6: cup: a time must be in the video, 0 to 2 seconds; got 7"


def test_davis_frames_become_a_video_and_masks_stay(tmp_path):
    root = tmp_path / "DAVIS"
    for name in ("JPEGImages/480p/bear", "Annotations/480p/bear"):
        (root / name).mkdir(parents=True)
    for frame, picture in enumerate(pictures(12)):
        Image.fromarray(picture).save(root / f"JPEGImages/480p/bear/{frame:05d}.jpg")
        values = np.zeros((HEIGHT, WIDTH), np.uint8)
        values[4:10, frame:frame + 8] = 1
        values[20:24, 20:24] = 2
        values[0, 0] = 255
        image = Image.fromarray(values)
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
        image.save(root / f"Annotations/480p/bear/{frame:05d}.png")
    (root / "davis_semantics.json").write_text(json.dumps({"bear": {"1": "bear"}}))
    [record], left_out = converted("davis", root, options=folder_lib.Options(frames_fps=12))
    assert record["video"] == "media/bear.mp4" and not left_out
    [bear], [other] = (of_kind(record, "tracks")[label]["tracks"] for label in ("bear", "object"))
    assert (bear["id"], other["id"]) == (1, 2) and [one["time"] for one in bear["points"]] == [0.0, 0.5]
    assert [(mask["id"], mask["time"]) for mask in record["masks"]] == [(1, 0.0), (1, 0.5), (2, 0.0),
                                                                        (2, 0.5)]
    for mask in record["masks"]:
        [point] = [one for track in (bear, other) if track["id"] == mask["id"]
                   for one in track["points"] if one["time"] == mask["time"]]
        inside = masks.decode(mask)
        assert inside[round(point["y"]), round(point["x"])]
        assert inside.sum() == {1: 48, 2: 16}[mask["id"]]


def test_a_last_odd_row_and_column_of_frames_goes_with_that_of_the_masks(tmp_path):
    root = tmp_path / "masks"
    for name in ("JPEGImages/one", "Annotations/one"):
        (root / name).mkdir(parents=True)
    for frame in range(2):
        Image.new("RGB", (33, 25)).save(root / f"JPEGImages/one/{frame}.png")
        Image.fromarray(np.ones((25, 33), np.uint8)).save(root / f"Annotations/one/{frame}.png")
    [record], left_out = converted("davis", root, options=folder_lib.Options(frames_fps=2))
    assert record["size"] == [32, 24] and not left_out
    assert {tuple(mask["size"]) for mask in record["masks"]} == {(24, 32)}


def test_sequences_in_two_resolutions_become_two_videos(tmp_path):
    root = tmp_path / "DAVIS"
    for size, name in ((32, "480p"), (64, "1080p")):
        for part in ("JPEGImages", "Annotations"):
            (root / part / name / "bear").mkdir(parents=True)
        Image.new("RGB", (size, size)).save(root / f"JPEGImages/{name}/bear/0.jpg")
        Image.fromarray(np.ones((size, size), np.uint8)).save(root / f"Annotations/{name}/bear/0.png")
    found, _ = converted("davis", root)
    assert {record["video"]: record["size"] for record in found} == {
        "media/480p_bear.mp4": [32, 32], "media/1080p_bear.mp4": [64, 64]}


def tap_vid():
    points = np.zeros((2, 12, 2), np.float32)
    points[0, :, 0] = np.linspace(0, 11 / 24, 12)
    points[:, :, 1] = 0.5
    points[1, :, 0] = 2.0   # never inside
    occluded = np.zeros((2, 12), bool)
    occluded[0, 6], occluded[1] = True, True
    return {"video": np.stack(pictures(12)), "points": points, "occluded": occluded}


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
def test_tap_vid_points_become_tracks(tmp_path, suffix):
    path = tmp_path / f"tapvid.{suffix}"
    if suffix == "npz":
        np.savez(path, **tap_vid())
    else:
        path.write_bytes(pickle.dumps({"tapvid": tap_vid()}))
    [record], left_out = converted("tap_vid", path, options=folder_lib.Options(frames_fps=12))
    [track] = of_kind(record, "tracks")["point"]["tracks"]
    assert track == {"id": 0, "points": [{"time": 0.0, "x": 0.0, "y": 16.0},
                                         {"time": 0.5, "x": 12.0, "y": 16.0, "occluded": True}]}
    assert len(left_out) == 12 and "a point must be inside the frame of 48 x 32; got (96, 16)" in left_out[0]


def test_a_pickle_that_names_code_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": {"video": print}}))
    with pytest.raises(ValueError, match="arrays and plain values only; got builtins.print"):
        labelling.convert("tap_vid", tmp_path / "a.pkl", tmp_path / "out")


@pytest.mark.parametrize("settings", [
    "path: .\nnames:\n  0: cup\n  1: leaf\n", "names: ['cup', 'leaf']\nnc: 2\n", "names:\n- cup\n- leaf\n"])
def test_yolo_lines_are_boxes_or_polygons(tmp_path, settings):
    for name in ("images/train", "labels/train"):
        (tmp_path / "set" / name).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "set/images/train/a.png")
    (tmp_path / "set/data.yaml").write_text(settings)
    (tmp_path / "set/labels/train/a.txt").write_text(
        "0 0.5 0.25 0.25 0.5\n1 0 0 0.5 0 0.5 0.5 0 0.5\n1 0.5\n")
    (tmp_path / "set/labels/train/b.txt").write_text("0 0.5 0.25 0.25 0.5\n")
    [record], left_out = converted("yolo", tmp_path / "set")
    found = of_kind(record, "points")
    assert found["cup"]["points"] == [{"id": 1, "x": 24.0, "y": 8.0}]
    [mask] = record["masks"]
    assert found["leaf"]["points"][0]["id"] == mask["id"] == 2 and masks.decode(mask).sum() == 24 * 16
    assert len(left_out) == 2 and "got 1 numbers" in left_out[0] and "must have an image" in left_out[1]


def test_yolo_key_points_are_read_by_their_stated_shape(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "set/images/a.jpg")
    (tmp_path / "set/data.yaml").write_text("kpt_shape: [2, 3]\nnames: [cat]\n")
    (tmp_path / "set/labels/a.txt").write_text("0 0.5 0.5 0.2 0.2 0.25 0.5 2 0.75 0.5 0\n")
    [record], left_out = converted("yolo", tmp_path / "set")
    assert set(of_kind(record, "points")) == {"cat 1"} and not left_out


def marks_of_images(folder, number, group=None):
    for place in range(number):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{place}.png")
        medium = labels.Medium(folder / f"{place}.png", group=group and group(place))
        yield labels.Mark(medium, "cup", (1.0, 2.0), f"row {place}")


def test_a_split_divides_no_video_and_depends_on_names_alone(tmp_path):
    def names(output, split):
        return {one["images"][0].rpartition("/")[2] for one in records(output / split)}
    marks = list(marks_of_images(tmp_path, 20, group=lambda place: f"video {place // 4}"))
    report = folder_lib.write(marks, tmp_path / "out", folder_lib.Options(heldout=0.2))
    assert sorted(report.records.values()) == [4, 16] and report.media == 20
    assert {int(name[:-4]) // 4 for name in names(tmp_path / "out", "heldout")} & {
        int(name[:-4]) // 4 for name in names(tmp_path / "out", "train")} == set()
    folder_lib.write(reversed(marks), tmp_path / "again", folder_lib.Options(heldout=0.2))
    assert names(tmp_path / "out", "heldout") == names(tmp_path / "again", "heldout")


def test_an_empty_split_or_export_gets_one_sentence(tmp_path):
    marks = list(marks_of_images(tmp_path, 3))
    with pytest.raises(ValueError, match="heldout must leave a video or image for each split; got 0.1 of 3"):
        folder_lib.write(marks, tmp_path / "out", folder_lib.Options(heldout=0.1))
    outside = [mark._replace(place=(99.0, 2.0)) for mark in marks]
    with pytest.raises(ValueError, match="usable label; got none, and left out 3: row 0: cup: a point must"):
        folder_lib.write(outside, tmp_path / "out")
    with pytest.raises(ValueError, match="got none, and left out 0: the export has no labels"):
        folder_lib.write([], tmp_path / "out")


def test_a_folder_does_not_mix_records_with_and_without_splits(tmp_path):
    marks = list(marks_of_images(tmp_path, 4))
    folder_lib.write(marks, tmp_path / "out")
    with pytest.raises(ValueError, match="must not mix records with and without --heldout: remove .*out/ann"):
        folder_lib.write(marks, tmp_path / "out", folder_lib.Options(heldout=0.5))
    folder_lib.write(marks, tmp_path / "split", folder_lib.Options(heldout=0.5))
    folder_lib.write(marks, tmp_path / "split", folder_lib.Options(heldout=0.25))
    with pytest.raises(ValueError, match="remove .*split/train/annotations.jsonl"):
        folder_lib.write(marks, tmp_path / "split")


def test_media_of_another_size_than_the_export_states_are_left_out(export):
    wrong = COCO | {"images": [COCO["images"][0] | {"width": 96}, COCO["images"][1]]}
    (export / "coco.json").write_text(json.dumps(wrong))
    found, left_out = converted("coco", export / "coco.json")
    assert len(found) == 1
    assert "must have the size that the export states, 96 x 32; got 48 x 32" in left_out[-1]


@pytest.mark.parametrize("name, content, rule", [
    ("coco", "{}", "must have images, annotations and categories; got none of images"),
    ("cvat", "<a/>", "must be the XML of CVAT, with <annotations>; got <a>"),
    ("cvat", "{", "must be the XML of CVAT"),
    ("label_studio", "{}", "must be Label Studio's export in format JSON"),
    ("vott_csv", "a,b\n", "must have the columns image, xmin"),
    ("csv", "video,x\n", "got none of time, y, label"),
    ("tap_vid", "x", "must be a pickle of TAP-Vid")])
def test_a_file_of_another_format_is_refused_in_one_sentence(tmp_path, name, content, rule):
    (tmp_path / "export").write_text(content)
    with pytest.raises(ValueError, match=rule):
        labelling.convert(name, tmp_path / "export", tmp_path / "out")


def test_exports_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--input of --from=yolo must be a folder"):
        labelling.convert("yolo", tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ValueError, match="--from must be one of coco, csv, cvat"):
        labelling.convert("voc", tmp_path, tmp_path / "out")


def test_every_object_keeps_its_own_id_or_gets_a_free_one():
    names = {("cup", 7): 1, ("cup", "12"): 1, ("cup", "k3x"): 1, ("ball", 7): 1, ("ball", ("mark", 3)): 1}
    ids = objects._ids(names)
    assert len(set(ids.values())) == len(names) and ids["cup", "12"] == 12
    assert {ids["cup", 7], ids["ball", 7], ids["cup", "k3x"], ids["ball", ("mark", 3)]} == {13, 14, 15, 16}
