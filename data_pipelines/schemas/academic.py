"""Academic sets with columns of their own: diagrams, films with subtitles, segments, labels of actions."""

import math
from collections.abc import Iterator, Sequence

from data_pipelines.schemas import answering
from data_pipelines.schemas import media

MOST_WINDOWS = 5   # of QVHighlights
WHAT_HAPPENS = (
    "What is happening?", "What is the person doing?", "Which action does the video show?",
    "Name the activity in this clip.", "What is going on in the video?", "Label the action that you see.",
    "What activity is this?", "In a few words, what takes place here?")
WHEN = ("When does this happen: {query}", "Give the segments that show this: {query}",
        "Find the moments of the video that fit: {query}", "In which parts can this be seen? {query}")


def ai2d(rows: Sequence[dict]) -> Iterator[dict]:
    """image, question, answer_texts, correct_answer, abc_label, option_is_abc (one per option).

    Where the diagram has letters of its own and all options but one at most are letters, options carry none.
    """
    for row in rows:
        options, is_letter = list(row["answer_texts"]), list(row["option_is_abc"])
        is_lettered = bool(row["abc_label"]) and sum(is_letter) >= len(options) - 1
        if is_lettered:
            options = [text.upper() if letter else text
                       for text, letter in zip(options, is_letter, strict=True)]
        yield {"images": [media.image(row)], "annotations": [
            {"type": "choice", "question": row["question"], "options": options,
             "answer": row["correct_answer"], "labelled": not is_lettered}]}


def science_qa(rows: Sequence[dict]) -> Iterator[dict]:
    """image, question, choices, answer, hint: those with an image; the hint goes before the question."""
    for row in rows:
        if row.get("image"):
            question = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
            yield {"images": [media.image(row)], "annotations": [
                {"type": "choice", "question": question, "options": row["choices"], "answer": row["answer"]}]}


def video_qa(rows: Sequence[dict], style: str = "video_short_answer") -> Iterator[dict]:
    """video_id, question, answer."""
    yield {"video": media.video(rows[0]), "annotations": [
        answering.qa(row["question"], str(row["answer"]), style) for row in rows]}


def llava_video(rows: Sequence[dict], style: str = "video_short_answer") -> Iterator[dict]:
    """video, conversations [{from, value}]: pairs of question and answer."""
    texts = [turn["value"].replace("<image>", "").strip() for row in rows for turn in row["conversations"]]
    yield {"video": media.video(rows[0]), "annotations": [
        answering.qa(question, answer, style)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)]}


def perception_test(rows: Sequence[dict]) -> Iterator[dict]:
    """id, mc_question [{question, options, answer_id}]."""
    for row in rows:
        yield {"video": media.video(row), "annotations": [
            {"type": "choice", "question": one["question"], "options": one["options"],
             "answer": one["answer_id"]} for one in answering.pairs(row["mc_question"])]}


def tgif(rows: Sequence[dict]) -> Iterator[dict]:
    """gif_name, question, answer, and for actions and transitions options a1 ... a5: asked both ways."""
    annotations = []
    for row in rows:
        answer = row["answer"]
        if row.get("a1"):
            options, right = [row[f"a{number}"] for number in range(1, 6)], int(row["answer"])
            annotations.append({"type": "choice", "question": row["question"], "options": options,
                                "answer": right})
            answer = options[right]
        annotations.append(answering.qa(row["question"], str(answer), "video_short_answer"))
    yield {"video": f"media/{rows[0]['gif_name']}.gif", "annotations": annotations}


def tvqa(rows: Sequence[dict]) -> Iterator[dict]:
    """vid_name, q, a0 ... a4, answer_idx, ts ("12.3-20"), subtitles [{start, end, text}] in seconds.

    The video is cut to the span, of the subtitles those stay that overlap it.
    """
    for row in rows:
        start, end = (float(second) for second in row["ts"].split("-"))
        if not start < end < math.inf:
            continue
        said = [one for one in row.get("subtitles") or [] if one["start"] < end and one["end"] > start]
        yield {"video": f"media/{row['vid_name']}.mp4", "clip": [start, end]} | (
            {"subtitles": said} if said else {}) | {"annotations": [
                {"type": "choice", "question": row["q"], "answer": int(row["answer_idx"]),
                 "options": [row[f"a{number}"] for number in range(5)]}]}


def cinepile(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, examples [{question, choices, answer_key_position}], subtitles (one text)."""
    for row in rows:
        yield {"video": media.video(row)} | (
            {"subtitles": row["subtitles"]} if row.get("subtitles") else {}) | {"annotations": [
                {"type": "choice", "question": one["question"], "options": one["choices"],
                 "answer": one["answer_key_position"]} for one in answering.pairs(row["examples"])]}


def qv_highlights(rows: Sequence[dict]) -> Iterator[dict]:
    """vid, query, relevant_windows [[start, end]] in seconds."""
    for row in rows:
        windows = row["relevant_windows"]
        if 0 < len(windows) <= MOST_WINDOWS:
            answer = "Segments: " + ", ".join(f"[{start:g}-{end:g}]" for start, end in windows)
            yield {"video": f"media/{row['vid']}.mp4", "annotations": [answering.qa(
                [text.format(query=row["query"]) for text in WHEN], answer, "video_short_answer")]}


def activity_net(rows: Sequence[dict]) -> Iterator[dict]:
    """id, annotations [{segment [start, end], label}]; perhaps subset, of which "training" is used."""
    for row in rows:
        if row.get("subset", "training") == "training":
            for one in row["annotations"]:
                yield {"video": media.video(row), "clip": one["segment"], "annotations": [
                    answering.qa(list(WHAT_HAPPENS), one["label"], "activitynet_label")]}


def label(rows: Sequence[dict], style: str = "kinetics_label") -> Iterator[dict]:
    """video_id, label; perhaps start and end in seconds: names of actions."""
    for row in rows:
        clip = {"clip": [float(row["start"]), float(row["end"])]} if row.get("end") not in (None, "") else {}
        yield {"video": media.video(row)} | clip | {"annotations": [
            answering.qa(list(WHAT_HAPPENS), row["label"], style)]}
