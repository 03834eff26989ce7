"""Multiple choice about videos: the twelve benchmarks of the short and the long average.

Every reader takes a row of the published files. Files are as their publishers lay them out, unpacked.

Source: reference, olmo/data/academic_video_datasets.py.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence

from data_pipelines.scoring import choices
from data_pipelines.scoring import temp_compass as temp_compass_rules
from data_pipelines.suites import benchmark
from data_pipelines.suites import metrics
from data_pipelines.suites import prompts
from data_pipelines.suites import rows
from molmo2_jax import types

HUB = benchmark.HUB
Benchmark = benchmark.Benchmark
Item = benchmark.Item
MVBENCH_VIDEOS = {   # task: folder below video/
    "action_sequence": "star/Charades_v1_480", "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video", "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480", "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation", "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video", "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos", "fine_grained_pose": "nturgbd", "character_order":
    "perception/videos", "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation"}
MLVU_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
TEMP_COMPASS_END = {"multi-choice": "Please directly give the best option:",
                    "yes_no": "Please answer yes or no:",
                    "caption_matching": "Please directly give the best option:"}


def _item(name: str, video: str, question: str, options: Sequence[str], right: int, prompt: str, *,
          reference: str = "", clip: tuple[float, float] | None = None,
          subtitles: tuple[tuple[float, float, str], ...] = ()) -> Item:
    """Returns a question; without `reference`, the right answer is the option's letter."""
    if not 0 <= right < len(options):
        raise ValueError(f"the right answer must be one of {len(options)} options; got number {right}")
    letter = prompts.LETTERS[right]
    example = types.Example(annotations=(), video=video, clip=clip, subtitles=subtitles, key=name)
    return Item(id=name, cluster=video, example=example, prompt=prompt,
                target=choices.Target(question, tuple(options), right), reference=reference or letter)


def _letter(text: str) -> int:
    return prompts.LETTERS.index(text.strip(" ().").upper()[:1])


def next_qa(row: dict, place: rows.Place) -> Iterator[Item]:
    """video, question, qid, answer (index), a0 ... a4."""
    options = [row[f"a{number}"].strip() for number in range(5)]
    question = row["question"].strip()
    video = place.media.find(f"NExTVideo/{row['video']}.mp4", f"{row['video']}.mp4")
    yield _item(f"{row['video']}_{row.get('qid', place.number)}_{row.get('type', '')}", video, question,
                options, int(row["answer"]), prompts.choice(question, options, prompts.DIRECTLY))


def perception_test(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_name, question_id, question, options, answer_id."""
    video = place.media.find(f"videos/{row['video_name']}.mp4", f"{row['video_name']}.mp4")
    yield _item(f"{row['video_name']}_{row['question_id']}", video, row["question"], row["options"],
                int(row["answer_id"]), prompts.choice(row["question"], row["options"], prompts.DIRECTLY))


def mvbench(row: dict, place: rows.Place) -> Iterator[Item]:
    """video, question, candidates, answer (text), and in five tasks start and end in seconds."""
    task = place.file.stem
    if task not in MVBENCH_VIDEOS:
        return
    folder = f"video/{MVBENCH_VIDEOS[task]}"
    name = f"{row['video']}/video.mp4" if task == "episodic_reasoning" else row["video"]
    clip = None if row.get("end") is None else (float(row["start"]), float(row["end"]))
    yield _item(f"{task}_{place.number}", place.media.find(f"{folder}/{name}"), row["question"],
                row["candidates"], row["candidates"].index(row["answer"]),
                prompts.choice(row["question"], row["candidates"], prompts.ONLY_LETTER), clip=clip)


def tomato(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, demonstration_type, key, question, options, answer (index)."""
    video = place.media.find(f"videos/{row['demonstration_type']}/{row['key']}.mp4", f"{row['key']}.mp4")
    line = prompts.lettered(row["options"])[int(row["answer"])]
    yield _item(f"{place.file.stem}_{row['id']}", video, row["question"], row["options"],
                int(row["answer"]), prompts.formatted(row["question"], row["options"]), reference=line)


def motion_bench(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_path, key, qa [{uid, question with its options, answer (a letter, "NA" in the test set)}]."""
    video = place.media.find(f"self-collected/{row['video_path']}", f"public-dataset/{row['video_path']}",
                             row["video_path"])
    for one in row["qa"]:
        if one["answer"] != "NA":
            question, options = prompts.split(one["question"])
            yield _item(f"{one['uid']}_{row['key']}", video, question, options, _letter(one["answer"]),
                        one["question"])


def temp_compass(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_id, question with its options, answer, dim; the folder of the file names the kind."""
    kind = place.file.parent.name
    if kind not in TEMP_COMPASS_END:
        return
    video = place.media.find(f"videos/{row['video_id']}.mp4", f"{row['video_id']}.mp4")
    name = f"{kind}_{place.number}_{row['video_id']}"
    prompt = f"{row['question']}\n{TEMP_COMPASS_END[kind]}"
    answer = row["answer"].strip()
    if kind == "yes_no":
        prompt, target = prompts.short("video_short_answer", prompt), answer.lower().rstrip(".")
        if target not in ("yes", "no"):
            raise ValueError(f"an answer must be yes or no; got {answer!r}")
    elif kind == "caption_matching":
        lines = [line.strip() for line in row["question"].split("\n")[1:] if line.strip()]
        right = temp_compass_rules.read_match(answer, lines)
        if right is None:
            raise ValueError(f"the answer must be one of the captions; got {answer!r}")
        target = temp_compass_rules.Match(tuple(lines), right)
        answer = lines[right]
    else:
        question, options = prompts.split(row["question"])
        target = choices.Target(question, tuple(options), _letter(answer))
    yield Item(id=name, cluster=video, example=types.Example(annotations=(), video=video, key=name),
               prompt=prompt, target=(kind.replace("-", "_"), target), reference=answer)


def temp_compass_captions(row: dict, place: rows.Place) -> Iterator[Item]:
    """video_id, question ("... Generated Caption:"), mc_question with its options, mc_answer ("B. text")."""
    video = place.media.find(f"videos/{row['video_id']}.mp4", f"{row['video_id']}.mp4")
    name = f"captioning_{place.number}_{row['video_id']}"
    answer = row["mc_answer"].strip()
    yield Item(id=name, cluster=video, example=types.Example(annotations=(), video=video, key=name),
               prompt=row["question"], target=temp_compass_rules.Captioned(row["mc_question"], answer),
               reference=prompts.unmarked(answer))


def _video_mme(with_subtitles: bool):
    def read(folder: pathlib.Path) -> Iterator[Item | ValueError]:
        said: dict = {}
        if with_subtitles:
            said = json.loads((folder / "subtitles.json").read_text(encoding="utf-8"))

        def make(row: dict, place: rows.Place) -> Iterator[Item]:
            lines = list(row["options"])
            prompt = "\n".join([prompts.VIDEO_MME, row["question"], *lines, prompts.VIDEO_MME_END])
            entries = said.get(row["videoID"], {})
            entries = entries.values() if isinstance(entries, dict) else entries
            subtitles = tuple((float(one["start"]), float(one["end"]), one["text"]) for one in entries)
            yield _item(row["question_id"], place.media.find(f"data/{row['videoID']}.mp4",
                                                             f"{row['videoID']}.mp4"),
                        row["question"], [prompts.unmarked(line) for line in lines], _letter(row["answer"]),
                        prompt, subtitles=subtitles)
        yield from rows.each(make, "videomme/test-*.parquet")(folder)
    return read


def long_video_bench(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, video_path, question, candidates, correct_choice, subtitle_path, duration,
    starting_timestamp_for_subtitles: subtitles of the excerpt are shifted by its start."""
    options = row["candidates"]
    yield _item(str(row["id"]), place.media.find(f"videos/{row['video_path']}", row["video_path"]),
                row["question"], options, int(row["correct_choice"]),
                prompts.choice(row["question"], options, prompts.DIRECTLY),
                subtitles=_long_video_bench_subtitles(row, place))


def _long_video_bench_subtitles(row: dict, place: rows.Place) -> tuple[tuple[float, float, str], ...]:
    path = pathlib.Path(place.media.find(f"subtitles/{row['subtitle_path']}", row["subtitle_path"]))
    if not path.is_file():
        raise ValueError(f"subtitles must be unpacked; there is no {path}")
    begin, duration = float(row["starting_timestamp_for_subtitles"]), float(row["duration"])
    found = []
    for one in json.loads(path.read_text(encoding="utf-8")):
        if "timestamp" in one:
            start, end = one["timestamp"]
            end, text = end if isinstance(end, float) else duration, one["text"]
        else:
            start, end, text = _clock(one["start"]), _clock(one["end"]), one["line"]
        if end >= begin and start <= begin + duration:
            found.append((max(float(start) - begin, 0.0), float(end) - begin, text))
    return tuple(found)


def _clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def mlvu(row: dict, place: rows.Place) -> Iterator[Item]:
    """video, question, candidates, answer (text); files json/NUMBER_TASK.json."""
    folder = place.file.stem
    if folder.partition("_")[2] not in MLVU_TASKS:
        return
    yield _item(f"{folder}_{place.number}", place.media.find(f"video/{folder}/{row['video']}", row["video"]),
                row["question"], row["candidates"], row["candidates"].index(row["answer"]),
                prompts.choice(row["question"], row["candidates"], prompts.DIRECTLY))


def lvbench(row: dict, place: rows.Place) -> Iterator[Item]:
    """key, qa [{uid, question with "(A) ..." lines, answer (a letter)}]."""
    video = place.media.find(f"{row['key']}.mp4")
    for one in row["qa"]:
        question, options = prompts.split(one["question"])
        yield _item(str(one["uid"]), video, question, options, _letter(one["answer"]),
                    prompts.choice(question, options, prompts.ONLY_LETTER))


def video_eval_pro(row: dict, place: rows.Place) -> Iterator[Item]:
    """video, question, options with letters, answer (a letter)."""
    prompt = "\n".join([row["question"], *row["options"], prompts.ONLY_LETTER])
    yield _item(f"{place.name}_{row['video']}", place.media.find(f"videos_filtered/{row['video']}",
                                                                  row["video"]),
                row["question"], [prompts.unmarked(one) for one in row["options"]], _letter(row["answer"]),
                prompt)


def ego_schema(row: dict, place: rows.Place) -> Iterator[Item]:
    """question_idx, video_idx, question, option (with letters), answer (index)."""
    prompt = "\n".join([row["question"], *row["option"], prompts.DIRECTLY])
    video = place.media.find(f"videos/{row['video_idx']}.mp4", f"{row['video_idx']}.mp4")
    yield _item(f"{row['question_idx']}_{row['video_idx']}", video, row["question"],
                [prompts.unmarked(one) for one in row["option"]], int(row["answer"]), prompt)


def _of(*percent: float) -> dict:
    return {"accuracy_reference": percent}


SHORT = (
    Benchmark(name="next_qa", title="NExT-QA", folder="next_qa", origin=f"{HUB}lmms-lab/NExTQA, MC, test",
              files=("MC/test-*.parquet",), rows=rows.each(next_qa, "MC/test-*.parquet"),
              metric=metrics.choice("next_qa"), published=_of(85.5, 86.2, 84.3)),
    Benchmark(name="perception_test", title="PerceptionTest", folder="perception_test",
              origin=f"{HUB}lmms-lab/PerceptionTest_Val, validation",
              files=("mc_question_val/validation-*.parquet",),
              rows=rows.each(perception_test, "mc_question_val/validation-*.parquet"),
              metric=metrics.choice("perception_test"), published=_of(81.3, 82.1, 79.6)),
    Benchmark(name="mvbench", title="MVBench", folder="mvbench",
              origin=f"{HUB}OpenGVLab/MVBench; the videos of NTU RGB+D must be asked for, and the frames of "
              "TVQA joined to video.mp4 at 3 frames/s",
              files=("json/action_sequence.json",), rows=rows.each(mvbench, "json/*.json"),
              metric=metrics.choice("mvbench"), max_new_tokens=32, published=_of(75.1, 75.9, 74.8)),
    Benchmark(name="tomato", title="TOMATO", folder="tomato",
              origin="https://github.com/yale-nlp/TOMATO, data and videos",
              files=("data/*.json",), rows=rows.each(tomato, "data/*.json"),
              metric=metrics.choice("tomato"), max_new_tokens=32, published=_of(39.8, 39.6, 36.2)),
    Benchmark(name="motion_bench", title="MotionBench", folder="motion_bench",
              origin=f"{HUB}zai-org/MotionBench, the questions with answers",
              files=("MotionBench/video_info.meta.jsonl | video_info.meta.jsonl",),
              rows=rows.each(motion_bench, "MotionBench/video_info.meta.jsonl", "video_info.meta.jsonl"),
              metric=metrics.choice("motion_bench"), published=_of(61.6, 62.2, 60.6)),
    Benchmark(name="temp_compass", title="TempCompass", folder="temp_compass",
              origin=f"{HUB}lmms-lab/TempCompass: multiple choice, yes/no and caption matching (captions: "
              "temp_compass_captions)",
              files=tuple(f"{kind}/test-*.parquet" for kind in TEMP_COMPASS_END),
              rows=rows.each(temp_compass, "*/test-*.parquet"),
              metric=metrics.TEMP_COMPASS, max_new_tokens=192, published=_of(72.8, 73.4, 73.0)),
)
LONG = (
    Benchmark(name="video_mme", title="Video-MME", folder="video_mme",
              origin=f"{HUB}lmms-lab/Video-MME, test", files=("videomme/test-*.parquet",),
              rows=_video_mme(False), metric=metrics.choice("video_mme"), published=_of(69.6, 69.9, 64.9)),
    Benchmark(name="video_mme_subtitles", title="Video-MME with subtitles", folder="video_mme",
              origin=f"{HUB}lmms-lab/Video-MME, test, and subtitles.json of {HUB}allenai/Molmo2-VideoMME",
              files=("videomme/test-*.parquet", "subtitles.json"), rows=_video_mme(True),
              metric=metrics.choice("video_mme"), published=_of(75.7, 75.8, 69.2)),
    Benchmark(name="long_video_bench", title="LongVideoBench", folder="long_video_bench",
              origin=f"{HUB}longvideobench/LongVideoBench, validation, with subtitles; gated: accept its "
              "licence on the page",
              files=("lvb_val.json",), rows=rows.each(long_video_bench, "lvb_val.json"),
              metric=metrics.choice("long_video_bench"), published=_of(68.0, 67.5, 63.7)),
    Benchmark(name="mlvu", title="MLVU", folder="mlvu",
              origin=f"{HUB}MLVU/MVLU, the seven tasks of multiple choice; gated: accept its licence on "
              "the page",
              files=("MLVU/json/*.json | json/*.json",),
              rows=rows.each(mlvu, "MLVU/json/*.json", "json/*.json"),
              metric=metrics.choice("mlvu"), published=_of(63.0, 60.2, 55.2)),
    Benchmark(name="lvbench", title="LVBench", folder="lvbench",
              origin=f"{HUB}zai-org/LVBench, test; the page says how to download the videos",
              files=("video_info.meta.jsonl",), rows=rows.each(lvbench, "video_info.meta.jsonl"),
              metric=metrics.choice("lvbench"), published=_of(53.9, 52.8, 49.6)),
    Benchmark(name="video_eval_pro", title="VideoEvalPro", folder="video_eval_pro",
              origin=f"{HUB}TIGER-Lab/VideoEval-Pro, test, multiple choice",
              files=("data/test-*.parquet",), rows=rows.each(video_eval_pro, "data/test-*.parquet"),
              metric=metrics.choice("video_eval_pro"), max_new_tokens=32,
              published=_of(59.9, 60.4, 55.1)),
    Benchmark(name="ego_schema", title="EgoSchema", folder="ego_schema",
              origin=f"{HUB}lmms-lab/egoschema, Subset (the questions with answers)",
              files=("Subset/test-*.parquet",), rows=rows.each(ego_schema, "Subset/test-*.parquet"),
              metric=metrics.choice("ego_schema"), max_new_tokens=32, published=_of(61.2, 62.0, 56.8)),
)
CAPTIONING = (
    Benchmark(name="temp_compass_captions", title="TempCompass, captions", folder="temp_compass",
              origin=f"{HUB}lmms-lab/TempCompass, captioning; published scores are of the judge "
              "gpt-3.5-turbo-1106",
              files=("captioning/test-*.parquet",),
              rows=rows.each(temp_compass_captions, "captioning/test-*.parquet"),
              metric=metrics.CAPTION_CHOICES, max_new_tokens=192, needs_judge=True),
)
