"""Small files of every benchmark in the publishers' schemas: FILES[name](folder, film) writes two questions.

The film has 10 seconds at 6 frames per second, 48 x 32 pixels; pictures have 20 x 10 pixels.
"""

import io
import json
import shutil

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from data_pipelines import masks
from molmo2_jax.render import pictures

WIDTH, HEIGHT = 48, 32
FPS, SECONDS = 6, 10


def film(path):
    """Writes the film: a square that moves."""
    frames = np.zeros((FPS * SECONDS, HEIGHT, WIDTH, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[10:20, number // 2:number // 2 + 8] = 200
    pictures.write_video(str(path), list(frames), FPS)
    return path


def picture(size=(20, 10), value=90):
    """Returns a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def embedded(value=90):
    return {"bytes": picture(value=value), "path": None}


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)


def document(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def put(folder, film_path, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film_path, folder / name)


def still(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())


def next_qa(folder, film_path):
    put(folder, film_path, "NExTVideo/4010069381.mp4")
    row = {"video": 4010069381, "frame_count": 369, "width": 640, "height": 480, "type": "CW", "qid": 3,
           "question": "why did the boy run ", "answer": 1, "a0": "to eat", "a1": "to catch the ball",
           "a2": "to hide", "a3": "to rest", "a4": "to wave "}
    table(folder / "MC/test-00000-of-00001.parquet",
          [row, row | {"qid": 4, "type": "TN", "question": "what happened next", "answer": 4}])


def perception_test(folder, film_path):
    put(folder, film_path, "videos/video_8241.mp4")
    row = {"video_name": "video_8241", "question_id": "11", "question": "Is the camera moving?",
           "options": ["I don't know", "No", "Yes"], "answer_id": "2", "area": "physics", "reasoning": "x",
           "tag": ["motion"]}
    table(folder / "mc_question_val/validation-00000-of-00001.parquet",
          [row, row | {"question_id": "12", "question": "Which is first?", "answer_id": "0"}])


def mvbench(folder, film_path):
    put(folder, film_path, "video/star/Charades_v1_480/ZS9XR.mp4", "video/tvqa/frames_fps3_hq/s1/video.mp4")
    (folder / "json").mkdir(parents=True, exist_ok=True)
    document(folder / "json/action_sequence.json", [
        {"video": "ZS9XR.mp4", "question": "What happened after?", "candidates": ["Ate it.", "Took it.",
         "Threw it."], "answer": "Took it.", "start": 2.0, "end": 6.0}])
    document(folder / "json/episodic_reasoning.json", [
        {"video": "s1", "question": "Why?", "candidates": ["Fun", "Fear"], "answer": "Fun", "start": 0,
         "end": 4, "fps": 3}])
    document(folder / "json/unknown_task.json", [{"video": "x"}])


def tomato(folder, film_path):
    put(folder, film_path, "videos/human/0001-01.mp4", "videos/object/0002.mp4")
    document(folder / "data/count.json", {
        "0": {"question": "How often?", "options": ["once", "twice", "never"], "answer": 1,
              "key": "0001-01", "demonstration_type": "human", "motion_type": "x", "variation": {}},
        "7": {"question": "Which way?", "options": ["left", "right"], "answer": 0, "key": "0002",
              "demonstration_type": "object", "motion_type": "y", "variation": {}}})


def motion_bench(folder, film_path):
    put(folder, film_path, "MotionBench/public-dataset/a.mp4", "MotionBench/self-collected/b.mp4")
    asked = "What moves?\nA. a car\nB. a dog\nC. a cat\nD. a bird\n"
    lines(folder / "MotionBench/video_info.meta.jsonl", [
        {"video_path": "a.mp4", "key": "ka", "question_type": "Motion", "video_info": {"duration": 10},
         "qa": [{"uid": "0", "question": asked, "answer": "B", "start": None, "end": None}]},
        {"video_path": "b.mp4", "key": "kb", "qa": [{"uid": "1", "question": asked, "answer": "NA"},
                                                    {"uid": "2", "question": asked, "answer": "D"}]}])


def temp_compass(folder, film_path):
    put(folder, film_path, "videos/1021488277.mp4")
    one = {"video_id": "1021488277", "dim": "action"}
    table(folder / "multi-choice/test-00000-of-00001.parquet", [one | {
        "question": "What is it doing?\nA. running\nB. eating\nC. sleeping", "answer": "B. eating"}])
    table(folder / "yes_no/test-00000-of-00001.parquet", [one | {
        "question": "Is it eating?", "answer": "yes"}])
    table(folder / "caption_matching/test-00000-of-00001.parquet", [one | {
        "question": "Which caption matches the video better?\nCaption A: A dog runs.\nCaption B: A dog eats.",
        "answer": "Caption B: A dog eats."}])
    table(folder / "captioning/test-00000-of-00001.parquet", [one | {
        "question": "Which information is consistent with the video? Write a caption.\nGenerated Caption:",
        "answer": "B. eating", "mc_question": "What is it doing?\nA. running\nB. eating",
        "mc_answer": "B. eating"}])


def video_mme(folder, film_path):
    put(folder, film_path, "data/fFjv93ACGo8.mp4")
    row = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "History",
           "url": "u", "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting",
           "question": "How many?", "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C"}
    table(folder / "videomme/test-00000-of-00001.parquet",
          [row, row | {"question_id": "001-2", "question": "Who?", "answer": "A"}])
    document(folder / "subtitles.json", {"fFjv93ACGo8": {
        "0": {"start": 1.0, "end": 2.5, "text": "hello"}, "1": {"start": 4.0, "end": 5.0, "text": "there"}}})


def long_video_bench(folder, film_path):
    put(folder, film_path, "videos/86CxyhFV9MI.mp4")
    row = {"id": "86CxyhFV9MI_0", "video_id": "86CxyhFV9MI", "video_path": "86CxyhFV9MI.mp4",
           "subtitle_path": "86CxyhFV9MI_en.json", "question": "What is on the table?",
           "candidates": ["a cup", "a pen", "a hat", "a key", "a map"], "correct_choice": 4, "level": "L1-P",
           "duration": 6.0, "duration_group": 15, "question_category": "S2E",
           "starting_timestamp_for_subtitles": 100}
    document(folder / "lvb_val.json", [row, row | {"id": "86CxyhFV9MI_1", "correct_choice": 0}])
    document(folder / "subtitles/86CxyhFV9MI_en.json", [
        {"start": "00:01:30.000", "end": "00:01:50.500", "line": "a long one"},
        {"start": "00:01:42.000", "end": "00:01:44.000", "line": "in between"},
        {"start": "00:05:00.000", "end": "00:05:01.000", "line": "much later"}])


def mlvu(folder, film_path):
    put(folder, film_path, "MLVU/video/1_plotQA/movie101_66.mp4")
    row = {"video": "movie101_66.mp4", "duration": 480.0, "question": "What color?",
           "candidates": ["Yellow", "Red"], "answer": "Red", "question_type": "plotQA"}
    document(folder / "MLVU/json/1_plotQA.json", [row, row | {"question": "Which one?", "answer": "Yellow"}])
    document(folder / "MLVU/json/8_sub_scene.json", [
        {"video": "x.mp4", "question": "Describe", "answer": "y"}])


def lvbench(folder, film_path):
    put(folder, film_path, "Cm73ma6Ibcs.mp4")
    lines(folder / "video_info.meta.jsonl", [{"key": "Cm73ma6Ibcs", "type": "cartoon", "qa": [
        {"uid": "1", "question": "What year?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633", "answer": "D",
         "question_type": ["key information retrieval"], "time_reference": "00:15-00:19"},
        {"uid": "2", "question": "Who?\n(A) Ann\n(B) Bob", "answer": "A", "question_type": [],
         "time_reference": ""}]}])


def video_eval_pro(folder, film_path):
    put(folder, film_path, "videos/videos_filtered/v1.mp4")
    row = {"video": "v1.mp4", "question": "What is it?", "options": ["A. a cup", "B. a pen"], "answer": "B",
           "answer_text": "a pen", "source": "Video-MME", "qa_subtype": "x", "qa_type": "Local Perception",
           "meta": "m"}
    table(folder / "data/test-00000-of-00001.parquet", [row, row | {"question": "Where?", "answer": "A"}])


def ego_schema(folder, film_path):
    put(folder, film_path, "videos/001934bb.mp4")
    row = {"question_idx": "7", "question": "What is the goal?", "video_idx": "001934bb",
           "option": ["A. To eat", "B. To cook", "C. To run", "D. To sit", "E. To read"], "answer": "1"}
    table(folder / "Subset/test-00000-of-00001.parquet", [row, row | {"question_idx": "8", "answer": "4"}])


def video_count(folder, film_path):
    put(folder, film_path, "youtube-cc/youtube-cc-kw-2fps/abc_2fps.mp4", "generated/sora2-2fps/s_2fps.mp4")
    row = {"video_id": "abc", "video_source": "youtube", "video_duration": 10.0, "clip_start": 2.0,
           "clip_end": 6.0, "question": "How many dogs are there?", "label": "dogs", "category": "animal",
           "count": 3}
    table(folder / "data/val-00000-of-00001.parquet", [
        row, row | {"video_id": "sora2/s", "label": "cars", "category": "action/event", "count": 26}])


def burst_count(folder, film_path):
    put(folder, film_path, "videos/YFCC100M/v_1.mp4")
    images = [f"{number:05d}.jpg" for number in range(400)]   # 80 seconds, of which 63 are shown
    mask = {"rle": "PP3", "is_gt": True}
    row = {"id": 1, "dataset": "YFCC100M", "seq_name": "v_1", "width": WIDTH, "height": HEIGHT, "fps": 5,
           "all_image_paths": images, "annotated_image_paths": [images[n] for n in (0, 300, 330)],
           "segmentations": [{"1": mask, "2": mask}, {"2": mask, "3": mask, "4": mask}, {"5": mask}],
           "track_category_ids": {"1": 805, "2": 805, "3": 805, "4": 77, "5": 805, "6": 90},
           "neg_category_ids": [], "not_exhaustive_category_ids": [90]}
    crowd = row | {"seq_name": "v_2", "not_exhaustive_category_ids": [805]}
    document(folder / "test/all_classes.json", {"sequences": [row, crowd], "split": "test", "categories": [
        {"id": 805, "name": "person"}, {"id": 77, "name": "bus_(vehicle)"}, {"id": 90, "name": "bird"}]})


def square(left, top, size=8):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:top + size, left:left + size] = True
    return mask


def rle(mask):
    found = masks.encode(mask)
    return {"size": found["size"], "counts": found["counts"]}


def video_point(folder, film_path):
    put(folder, film_path, "media/abc_2fps.mp4")
    shown = [{"frame_id": frame, "rle": rle(square(8, 8))} for frame in (2, 3)]
    row = {"video_id": "abc", "video_source": "youtube", "video_duration": 10.0, "label": "red ball",
           "two_fps_timestamps": [1.0, 1.0], "points": [{"x": 12.0, "y": 12.0}, {"x": 36.0, "y": 20.0}],
           "masks": [shown, [{"frame_id": 2, "rle": rle(square(32, 16))}]], "width": WIDTH, "height": HEIGHT}
    table(folder / "data/val-00000-of-00001.parquet", [row, row | {"label": "ball"}])


def compressed(mask):
    """Returns run lengths as COCO's own tools write them."""
    counts, text = masks.encode(mask)["counts"], ""
    for number, count in enumerate(counts):
        value = count - (counts[number - 2] if number > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 * more))
            if not more:
                break
    return {"size": list(mask.shape), "counts": text}


def molmo2_track(folder, film_path):
    put(folder, film_path, "videos/APTv2/clip_1.mp4", "videos/sav/clip_2.mp4")
    # two objects: the first in all frames, the second from 5 seconds on
    where = [[[12.0, 12.0]] * 60, [None] * 30 + [[36.0, 20.0]] * 30]
    shapes = [[compressed(square(8, 8))] * 60, [None] * 30 + [compressed(square(32, 16))] * 30]
    row = {"id": "a_1", "video": "clip", "clip": "clip_1", "video_dataset": "APTv2", "fps": 6.0,
           "start_frame": 0, "end_frame": 59, "exp": "cats", "w": WIDTH, "h": HEIGHT,
           "mask_id": ["0", "1"],
           "points": [{"object_id": str(n), "points": places} for n, places in enumerate(where)],
           "masks": [{"object_id": str(n), "masks": found} for n, found in enumerate(shapes)]}
    table(folder / "data/test-00000-of-00001.parquet", [
        row, row | {"id": "a_2", "clip": "clip_2", "video_dataset": "sav", "exp": "cup"}])


def referring(**more):
    """Returns a row of one object that is hidden at 3 seconds."""
    return {"id": "track_0", "video": "v1", "qid": "0", "expression": "dog", "fps": 6.0,
            "sampling_fps": 1, "width": WIDTH, "height": HEIGHT, "mask_id": ["0"], "obj_id": ["1"],
            "anno_id": ["11"], "frame_trajectories": [
                {"frame": second * 6, "time": float(second), "points": [
                    {"id": "0", "point": [12.0, 12.0], "occluded": second == 3}]} for second in range(10)],
            } | more


def referring_rows(folder, film_path, *, video="v1", **more):
    put(folder, film_path, "videos/v1.mp4")
    table(folder / "track/valid-00000-of-00001.parquet", [
        referring(video=video, **more),
        referring(video=video, **more, id="track_1", qid="1", expression="it", sampling_fps=2)])


def mevis_valid_u(folder, film_path):
    referring_rows(folder, film_path)
    document(folder / "MeViS_release/valid_u/mask_dict.json", {
        "11": [None if frame == 18 else compressed(square(8, 8)) for frame in range(60)]})


def pngs(folder, values):
    """Writes 60 masks, empty at 3 seconds, whose pixels have one of the values."""
    folder.mkdir(parents=True)
    for frame in range(60):
        image = np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, value in enumerate(values):
            if frame != 18:
                image[square(8 + 24 * number, 8)] = value
        Image.fromarray(image).save(folder / f"{frame:05d}.png")


def ref_yt_vos(folder, film_path):
    referring_rows(folder, film_path)
    pngs(folder / "valid/Annotations/v1/0", [255])


def ref_davis17(folder, film_path):
    referring_rows(folder, film_path)
    pngs(folder / "DAVIS/Annotations/480p/v1", [1, 2])


def reason_vos(folder, film_path):
    referring_rows(folder, film_path, anno_id=["mose_v1_1"])
    pngs(folder / "ReasonVOS/Annotations/mose_v1_1", [255])


def cap_eval(folder, film_path):
    put(folder, film_path, "vimeo/vimeo_77.mp4", "ego4d/e1.mp4", "ego4d/e2_bounded_decimal_2_1.5_3.0.mp4")
    row = {"video_id": "77", "source": "vimeo", "video_start": None, "video_end": None, "duration": 10.0,
           "atomic_statements": ["A dog runs.", "The dog is brown."], "statement_categories": [
               "Action", "Attribute"], "aggregated_caption": "A brown dog runs."}
    table(folder / "data/test-00000-of-00001.parquet", [
        row, row | {"video_id": "e1", "source": "ego4d", "video_start": 2.0, "video_end": 6.0},
        row | {"video_id": "e2", "source": "ego4d", "video_start": 1.5, "video_end": 3.0}])


def qv_highlights(folder, film_path):
    put(folder, film_path, "videos/NUsG9BgSes0_210.0_360.0.mp4")
    row = {"qid": 2579, "query": "A girl talks.", "duration": 150, "vid": "NUsG9BgSes0_210.0_360.0",
           "relevant_clip_ids": [41], "saliency_scores": [[1, 1, 2]], "relevant_windows": [[82, 150]]}
    lines(folder / "highlight_val_release.jsonl", [
        row, row | {"qid": 2580, "relevant_windows": [[2, 4], [10, 12]]},
        row | {"qid": 2581, "relevant_windows": [[n, n + 1] for n in range(0, 12, 2)]}])
