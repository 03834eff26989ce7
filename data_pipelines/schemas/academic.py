"""Academic sets, each with its own columns: diagrams, films with subtitles, segments, labels of actions."""

import ast
import math
from collections.abc import Iterator, Sequence

from data_pipelines.schemas import answering
from data_pipelines.schemas import media

SHORT_ANSWER = "video_short_answer"
MOST_WINDOWS = 5   # per query of QVHighlights; queries with more are left out
WHAT_HAPPENS = (
    "What is happening?", "What is the person doing?", "Which action does the video show?",
    "Name the activity in this clip.", "What is going on in the video?", "Label the action that you see.",
    "What activity is this?", "In a few words, what takes place here?")
WHEN = ("When does this happen: {query}", "Give the segments that show this: {query}",
        "Find the moments of the video that fit: {query}", "In which parts can this be seen? {query}")


def ai2d(rows: Sequence[dict]) -> Iterator[dict]:
    """image, question, answer_texts, correct_answer, abc_label, option_is_abc (one per option).

    If the diagram has its own letters and at most one option is not a letter, options are not lettered again.
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
    """image, question, choices, answer, hint.

    The hint precedes the question; rows without an image are left out.
    """
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
    """gif_name, question, answer, and for actions and transitions options a1 ... a5.

    With options, the question is asked as multiple choice and as a short answer.
    """
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

    The video is cut to the span `ts`; subtitles that do not overlap it are dropped. Rows without a span are
    left out.
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


def segments(rows: Sequence[dict], column: str = "annotations",
             style: str = "activitynet_label") -> Iterator[dict]:
    """id, annotations [{segment [start, end], label}], optional subset: only "training" is kept.

    column: the name of `annotations` in the rows. Segments without length are left out.
    """
    for row in rows:
        if row.get("subset", "training") == "training":
            for one in row[column]:
                if one["segment"][0] < one["segment"][1]:
                    yield {"video": media.video(row), "clip": one["segment"], "annotations": [
                        answering.qa(list(WHAT_HAPPENS), one["label"], style)]}


def quoted(text: str) -> list[str]:
    """Returns the texts of a list that is written as in Python: "['a', 'b']".

    Raises:
      ValueError: it is no such list.
    """
    try:
        found = ast.literal_eval(text.strip())
    except SyntaxError as error:
        raise ValueError(f"options must be a list of texts; got {text[:80]!r}") from error
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"options must be a list of texts; got {text[:80]!r}")
    return found


def label(rows: Sequence[dict], style: str = "kinetics_label") -> Iterator[dict]:
    """video_id, label (the name of an action), optional start and end in seconds."""
    for row in rows:
        clip = {"clip": [float(row["start"]), float(row["end"])]} if row.get("end") not in (None, "") else {}
        yield {"video": media.video(row)} | clip | {"annotations": [
            answering.qa(list(WHAT_HAPPENS), row["label"], style)]}
