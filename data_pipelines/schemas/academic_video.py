"""Academic sets of videos: questions with options or short answers, labelled segments, counts and captions.

Source: reference, olmo/data/academic_video_datasets.py, for the columns that each set publishes.
"""

from collections.abc import Iterator, Sequence

from data_pipelines.schemas import academic
from data_pipelines.schemas import answering
from data_pipelines.schemas import media

TIMED_TASKS = ("H1", "C1", "M1", "C4", "C5")   # of FunQA: their answers are frame numbers
UNSURE = "Not sure"                            # third option of Paxion
HOW_OFTEN = ("How often does this happen: {action}?", "How many times does the video show this: {action}?",
             "Count the repetitions of this action: {action}.")


def _choice(question: str, options: Sequence[str], answer: int, shuffle: bool = False) -> dict:
    return {"type": "choice", "question": question, "options": list(options), "answer": answer} | (
        {"shuffle": True} if shuffle else {})


def clip_of(row: dict) -> str:
    """Returns the group of a row with its own clip: the video, and start and end if it has them.

    Raises:
      StopIteration: the row names no video.
    """
    return " ".join([media.video(row), *(str(row[name]) for name in (
        "start", "end", "clip_start", "clip_end", "span") if row.get(name) is not None)])


def options_qa(rows: Sequence[dict], question: str = "question", options: str = "a0 a1 a2 a3 a4",
               answer: str = "answer", openly: bool = False) -> Iterator[dict]:
    """One column per option, and the index of the right one; empty options are dropped.

    question, options, answer: names of the columns. openly: also ask for the right option as a short answer.
    """
    annotations = []
    for row in rows:
        texts, right = [row[name] for name in options.split()], int(row[answer])
        if right < 0 or not texts[right]:
            raise ValueError(f"{answer} must be the number of an option; got {row[answer]}")
        annotations.append(_choice(row[question], [text for text in texts if text],
                                   right - sum(not text for text in texts[:right])))
        if openly:
            annotations.append(answering.qa(row[question], texts[right], academic.SHORT_ANSWER))
    yield {"video": media.video(rows[0]), "annotations": annotations}


def first_answer(rows: Sequence[dict]) -> Iterator[dict]:
    """video, question, answer (a list of answers that agree, or one): short answers, empty ones dropped."""
    annotations = []
    for row in rows:
        answer = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
        if answer.strip():
            annotations.append(answering.qa(row["question"], answer, academic.SHORT_ANSWER))
    if annotations:
        yield {"video": media.video(rows[0]), "annotations": annotations}


def joined_qa(rows: Sequence[dict]) -> Iterator[dict]:
    """question_id, video_name, question in one file, question_id, answer in another (ActivityNet-QA)."""
    answers = {row["question_id"]: row["answer"] for row in rows if "answer" in row}
    asked = [row for row in rows if row.get("question") and row["question_id"] in answers]
    if asked:
        yield {"video": media.video(asked[0]), "annotations": [answering.qa(
            row["question"].strip().rstrip("?") + "?", str(answers[row["question_id"]]),
            academic.SHORT_ANSWER) for row in asked]}


def video_of_question(row: dict) -> str:
    """Returns the part of question_id, as in v_VIDEO_3, that the questions of one video share.

    Raises:
      KeyError: the row has no question_id.
    """
    return row["question_id"].rpartition("_")[0]


def localized_narratives(rows: Sequence[dict]) -> Iterator[dict]:
    """video_name, qa_pairs [{raw_question, raw_answer}]."""
    for row in rows:
        found = [answering.qa(pair["raw_question"], pair["raw_answer"], academic.SHORT_ANSWER)
                 for pair in row["qa_pairs"]]
        if found:
            yield {"video": media.video(row), "annotations": found}


def actor_captions(rows: Sequence[dict]) -> Iterator[dict]:
    """video, captions, actor_names: one caption of each actor (captions of Video Localized Narratives)."""
    for row in rows:
        yield {"video": media.video(row), "annotations": [
            {"type": "caption", "text": text, "object": actor.lower(), "style": "video_object_caption"}
            for text, actor in zip(row["captions"], row["actor_names"], strict=True)]}


def paxion(rows: Sequence[dict]) -> Iterator[dict]:
    """rel_vid_path, label, label_action_antonym_clip_text (Something-Something), or video_uid, clip_start,
    clip_end, clip_text, action_antonym_clip_text (Ego4D): the action, its antonym, or not sure."""
    annotations, clip = [], {}
    for row in rows:
        if "clip_text" in row:
            clip = {"clip": [row["clip_start"], row["clip_end"]]}
            texts = [_sentence(row["clip_text"]), _sentence(row["action_antonym_clip_text"])]
        else:
            texts = [row["label"], row["label_action_antonym_clip_text"]]
        annotations.append(_choice("Which action does the video show?", [*texts, UNSURE], 0, shuffle=True))
    yield {"video": media.video(rows[0])} | clip | {"annotations": annotations}


def _sentence(narration: str) -> str:
    """Returns an Ego4D narration without the marker of its actor ("#C"), starting with a capital."""
    text = narration[2:].lstrip() if narration.startswith("#") else narration
    return text[:1].upper() + text[1:]


def clevrer(rows: Sequence[dict]) -> Iterator[dict]:
    """video_filename, questions [{question, answer}] or [{question, choices [{choice, answer}]}].

    Questions with several right choices, or none, are left out.
    """
    for row in rows:
        annotations = []
        for one in row["questions"]:
            if "answer" in one:
                annotations.append(answering.qa(one["question"], one["answer"], academic.SHORT_ANSWER))
                continue
            right = [place for place, choice in enumerate(one["choices"]) if choice["answer"] == "correct"]
            if len(right) == 1:
                annotations.append(_choice(one["question"], [choice["choice"] for choice in one["choices"]],
                                           right[0]))
        if annotations:
            yield {"video": media.video(row), "annotations": annotations}


def funqa(rows: Sequence[dict]) -> Iterator[dict]:
    """visual_input, instruction, and task, output (a short answer) or gt (the number of an option, from 1).

    Questions whose answers are frame numbers are left out. The last line of an instruction with gt lists
    the options, the line before it is the question.
    """
    annotations = []
    for row in rows:
        if "gt" in row:
            *_, question, listed = row["instruction"].split("\n")
            options = academic.quoted(listed.partition("The Options are:")[2])
            options = [option.partition(": ")[2] or option for option in options]
            annotations.append(_choice(question.replace("The Question is:", "").strip(), options,
                                       int(row["gt"]) - 1))
        elif row["task"] not in TIMED_TASKS:
            annotations.append(answering.qa(row["instruction"], row["output"], academic.SHORT_ANSWER))
    if annotations:
        yield {"video": media.video(rows[0]), "annotations": annotations}


def star(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, start, end, question, answer, choices [{choice}]: as short answer and as choice."""
    annotations = []
    for row in rows:
        options = [one["choice"] for one in row["choices"]]
        annotations.append(answering.qa(row["question"], row["answer"], academic.SHORT_ANSWER))
        if row["answer"] in options:
            annotations.append(_choice(row["question"], options, options.index(row["answer"])))
    yield {"video": media.video(rows[0]), "clip": [float(rows[0]["start"]), float(rows[0]["end"])],
           "annotations": annotations}


def how2qa(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, span "[start:end]", three wrong options, question, answer; the file has no header."""
    start, end = (float(second) for second in rows[0]["span"].strip("[] ").split(":"))
    if start < end:
        yield {"video": media.video(rows[0]), "clip": [start, end], "annotations": [_choice(
            row["question"], [row["answer"], row["wrong0"], row["wrong1"], row["wrong2"]], 0, shuffle=True)
            for row in rows]}


def camerabench(rows: Sequence[dict]) -> Iterator[dict]:
    """video_path, mc_qa_list [{Question, Answer, NegativeAnswers}]."""
    for row in rows:
        yield {"video": media.video(row), "annotations": [
            _choice(one["Question"], [one["Answer"], *one["NegativeAnswers"]], 0, shuffle=True)
            for one in answering.pairs(row["mc_qa_list"])]}


def countix(rows: Sequence[dict]) -> Iterator[dict]:
    """video_path, class, count: how often an action is repeated."""
    for row in rows:
        yield {"video": media.video(row), "annotations": [answering.qa(
            [text.format(action=row["class"]) for text in HOW_OFTEN], str(row["count"]),
            academic.SHORT_ANSWER)]}


def motion_caption(rows: Sequence[dict]) -> Iterator[dict]:
    """video_path, motion_caption."""
    for row in rows:
        yield {"video": media.video(row), "annotations": [
            {"type": "caption", "text": row["motion_caption"], "style": "video_motion_caption"}]}


def charades_sta(rows: Sequence[dict]) -> Iterator[dict]:
    """line: "VIDEO START END##SENTENCE"; spans without length are left out."""
    for row in rows:
        span, sentence = row["line"].strip().split("##")
        name, start, end = span.split(" ")
        if float(start) < float(end):
            yield {"video": media.video({"video_id": name}), "clip": [float(start), float(end)],
                   "annotations": [answering.qa(list(academic.WHAT_HAPPENS), sentence, "charades_sta")]}


def youcook2(rows: Sequence[dict]) -> Iterator[dict]:
    """id, subset, annotations [{segment [start, end], sentence}]: each clip alone, and all in the video."""
    for row in rows:
        if row["subset"] != "training":
            continue
        captions = []
        for one in row["annotations"]:
            start, end = one["segment"]
            text = one["sentence"].rstrip(".") + "."
            if start < end:
                captions.append({"type": "caption", "length": "short", "text": text, "start": start,
                                 "end": end})
                yield {"video": media.video(row), "clip": [start, end], "annotations": [
                    answering.qa(list(academic.WHAT_HAPPENS), text, "youcook2_label")]}
        if captions:
            yield {"video": media.video(row), "annotations": captions}


def ego4d(rows: Sequence[dict]) -> Iterator[dict]:
    """clip, corrupt, message_list [{question, answer, style}]: clips that are cut already."""
    for row in rows:
        if not row.get("corrupt"):
            yield {"video": media.video(row), "annotations": [
                answering.qa(one["question"], one["answer"], one["style"])
                for one in answering.pairs(row["message_list"])]}


def epic_kitchens(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, start_timestamp and stop_timestamp "00:00:01.089", narration."""
    for row in rows:
        clip = [_seconds(row["start_timestamp"]), _seconds(row["stop_timestamp"])]
        yield {"video": media.video(row), "clip": clip, "annotations": [
            answering.qa(list(academic.WHAT_HAPPENS), row["narration"], "epic_kitchens_label")]}


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
