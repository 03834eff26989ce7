"""Captions, questions and answers, multiple choice, conversations, text."""

import collections
import re
from collections.abc import Iterable, Iterator

from data_pipelines.schemas import grouping

CORRUPT_SCORE = 3           # lowest annotation_score of Molmo2-Cap that is used
MOST_IMAGES = 5
MOST_FIRST_TOKENS = 4096    # of the first message of a conversation without media
EXPLAIN = " Provide reasoning steps and then give the short answer."
HUMAN, GENERATED = 2 * 20901 / 28299, 2 * 7398 / 28299  # loss weights of ChartQA's two halves

# What asks for a number of things, and not for an amount of time, length, money, ...
_COUNTING = re.compile(
    r"\b(how many|what (is the )?number of)\b(?!.*\b(seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"percent|dollars?|euros?|cents?|met(er|re)s?|miles?|feet|inches|grams?|kilograms?|pounds?|degrees?|"
    r"lit(er|re)s?|calories)\b)", re.IGNORECASE)
NO_POINTING = "Answer without pointing. "
_NO_CATEGORY = re.compile(r"cod(e|ing)|puzzle|verifiable|non-english|hardcoded", re.IGNORECASE)


def _image(name) -> dict:
    return {"images": [f"media/{name}.jpg"]}


def _video(name) -> dict:
    return {"video": f"media/{name}.mp4"}


def _qa(question: str, answer: str, style: str) -> dict:
    return {"type": "qa", "question": question, "answer": answer, "style": style}


def _plainly(question: str) -> str:
    """Returns the question; one for a number asks not to point, so that it does not contradict other data."""
    return NO_POINTING + question if _COUNTING.search(question) else question


def molmo2_cap(rows: Iterable[dict]) -> Iterator[dict]:
    """video_id, annotation_score, merged_caption, video_caption, video_frame_merged_caption."""
    styles = (("merged_caption", {"style": "video_merged_caption"}),
              ("video_caption", {"style": "video_short_caption", "length": "short"}),
              ("video_frame_merged_caption", {"style": "video_long_caption"}))
    for row in rows:
        captions = [{"type": "caption", "text": row[column].strip(), **how} for column, how in styles
                    if (row[column] or "").strip()]
        if row["annotation_score"] >= CORRUPT_SCORE and captions:
            yield _video(row["video_id"]) | {"annotations": captions}


def pixmo_cap(rows: Iterable[dict], transcripts: bool = False) -> Iterator[dict]:
    """image_sha256, caption, transcripts (list): captions, in pre-training with the first transcript."""
    for row in rows:
        annotations = [{"type": "caption", "text": row["caption"]}]
        if transcripts and row["transcripts"]:
            annotations.append({"type": "caption", "text": row["transcripts"][0], "style": "transcript"})
        yield _image(row["image_sha256"]) | {"annotations": annotations}


def video_choice(rows: Iterable[dict]) -> Iterator[dict]:
    """video_id, Question, Answer, NegativeAnswers; perhaps subtitle [{start, end, text}] of a video."""
    for video, group in grouping.by(rows, "video_id"):
        subtitles = group[0].get("subtitle") or []
        choices = [{"type": "choice", "question": row["Question"], "answer": 0, "shuffle": True,
                    "options": [row["Answer"], *row["NegativeAnswers"]]} for row in group]
        yield _video(video) | ({"subtitles": subtitles} if subtitles else {}) | {"annotations": choices}


def human_qa(rows: Iterable[dict]) -> Iterator[dict]:
    """video_id, question, answer."""
    for video, group in grouping.by(rows, "video_id"):
        answered = [_qa(row["question"].strip(), row["answer"].strip(), "user_qa") for row in group
                    if row["answer"].strip()]
        if answered:
            yield _video(video) | {"annotations": answered}


def ask_model_anything(rows: Iterable[dict]) -> Iterator[dict]:
    """image_sha256, question, answer."""
    for image, group in grouping.by(rows, "image_sha256"):
        yield _image(image) | {"annotations": [
            _qa(_plainly(row["question"]), row["answer"], "user_qa") for row in group]}


def cap_qa(rows: Iterable[dict]) -> Iterator[dict]:
    """image_sha256, question (turns behind [USER] and [ASSISTANT]), answer (the last turn)."""
    for row in rows:
        parts = re.split(r"\[USER\]|\[ASSISTANT\]", row["question"])
        turns = [part.strip() for part in parts if part.strip()]
        turns = [_plainly(turn) if place % 2 == 0 else turn for place, turn in enumerate(turns)]
        if len(turns) % 2:
            yield _image(row["image_sha256"]) | {
                "annotations": [{"type": "chat", "turns": [*turns, row["answer"]]}]}


def multi_image_qa(rows: Iterable[dict]) -> Iterator[dict]:
    """id, images (names), qa_pairs [{question, answer}]."""
    for row in rows:
        if 2 <= len(row["images"]) <= MOST_IMAGES:
            yield {"images": row["images"], "annotations": [
                _qa(_plainly(pair["question"]), pair["answer"], "correction_qa")
                for pair in _pairs(row["qa_pairs"])]}


def _pairs(pairs) -> list[dict]:
    """Returns a list of dictionaries, also where a column of structures is stored as a structure of lists."""
    if isinstance(pairs, dict):
        return [dict(zip(pairs, values, strict=True)) for values in zip(*pairs.values(), strict=True)]
    return pairs


def cosyn(rows: Iterable[dict], kind: str = "chart") -> Iterator[dict]:
    """id, images (names; one id.jpg without), qa_pairs [{question, explanation, answer}] of one kind."""
    for row in rows:
        images = row.get("images") or [f"media/{row['id']}.jpg"]
        if len(images) <= MOST_IMAGES:
            yield {"images": images, "annotations": [
                _qa(pair["question"] + EXPLAIN, f"{pair['explanation']} Answer: {pair['answer']}",
                    f"cosyn_{kind}_exp") for pair in _pairs(row["qa_pairs"])]}


def vqa(rows: Iterable[dict], style: str = "vqa2") -> Iterator[dict]:
    """image_id, message_list [{question, answers}]: the most frequent answer, of equals the first."""
    for row in rows:
        questions = []
        for message in row["message_list"]:
            answers = message.get("answers") or [message["answer"]]
            answer = collections.Counter(answers).most_common(1)[0][0]
            questions.append(_qa(message["question"], answer, message.get("style", style)))
        yield _image(row["image_id"]) | {"annotations": questions}


def chart_qa(rows: Iterable[dict]) -> Iterator[dict]:
    """image_id, query, label (one text or a list of one), human_or_machine (0: human)."""
    for row in rows:
        label = row["label"][0] if isinstance(row["label"], list) else row["label"]
        weight = GENERATED if row["human_or_machine"] else HUMAN
        yield _image(row["image_id"]) | {"weight": weight, "annotations": [
            _qa(row["query"], label, "chart_qa")]}


def a_okvqa(rows: Iterable[dict]) -> Iterator[dict]:
    """image_id, question, choices, correct_choice_idx, direct_answers: as choice and as short answer."""
    for row in rows:
        direct = collections.Counter(row["direct_answers"]).most_common(1)[0][0]
        yield _image(row["image_id"]) | {"annotations": [
            {"type": "choice", "question": row["question"], "options": row["choices"],
             "answer": row["correct_choice_idx"]}, _qa(row["question"], direct, "a_okvqa_da")]}


def mantis(rows: Iterable[dict]) -> Iterator[dict]:
    """images (names), mc_question, choices, correct_choice_idx: questions about several images."""
    for row in rows:
        if 2 <= len(row["images"]) <= MOST_IMAGES:
            yield {"images": row["images"], "annotations": [
                {"type": "choice", "question": row["mc_question"], "options": row["choices"],
                 "answer": row["correct_choice_idx"], "shuffle": True}]}


def label(rows: Iterable[dict], question: str = "What is happening?", style: str = "kinetics_label"
          ) -> Iterator[dict]:
    """video_id, label; perhaps start and end in seconds: names of actions."""
    for row in rows:
        clip = {"clip": [row["start"], row["end"]]} if row.get("end") is not None else {}
        yield _video(row["video_id"]) | clip | {"annotations": [_qa(question, row["label"], style)]}


def tulu(rows: Iterable[dict], most_first_tokens: int = MOST_FIRST_TOKENS) -> Iterator[dict]:
    """messages [{role, content}], category, source, first_message_qwen3_tokens and two flags.

    A system message goes before the first question. Code, puzzles, other languages and identities are out.
    """
    for row in rows:
        if (row["empty_messages"] or row["has_special_token"] or _NO_CATEGORY.search(row["category"])
                or _NO_CATEGORY.search(row["source"])
                or row["first_message_qwen3_tokens"] > most_first_tokens):
            continue
        turns = [message["content"] for message in row["messages"]]
        if row["messages"][0]["role"] == "system":
            turns = [f"System: {turns[0]}\n{turns[1]}", *turns[2:]]
        turns = turns[:len(turns) // 2 * 2]
        if turns:
            yield {"annotations": [{"type": "chat", "turns": turns}]}


def hardcodes(rows: Iterable[dict]) -> Iterator[dict]:
    """questions (list), response, perhaps images (names): one record per question."""
    for row in rows:
        for question in row["questions"]:
            yield ({"images": row["images"]} if row.get("images") else {}) | {
                "annotations": [_qa(question, row["response"], "user_qa")]}
