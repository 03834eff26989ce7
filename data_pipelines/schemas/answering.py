"""Captions, questions and answers, multiple choice, conversations, text."""

import collections
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.schemas import media

LOWEST_SCORE = 3            # annotation_score of Molmo2-Cap below which a row is left out
MOST_FIRST_TOKENS = 4096    # most tokens of the first message of a conversation without media
EXPLAIN = " Provide reasoning steps and then give the short answer."
HUMAN, GENERATED = 2 * 20901 / 28299, 2 * 7398 / 28299  # loss weights of ChartQA's two halves
STILL, FILM = (".jpg", ".jpeg", ".png", ".webp"), (".mp4", ".webm", ".mkv")

# Questions for a number of things, not for an amount of time, length, money, ...
_COUNTING = re.compile(
    r"\b(how many|what (is the )?number of)\b(?!.*\b(seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    r"percent|dollars?|euros?|cents?|met(er|re)s?|miles?|feet|inches|grams?|kilograms?|pounds?|degrees?|"
    r"lit(er|re)s?|calories)\b)", re.IGNORECASE)
NO_POINTING = (
    "Answer without pointing. ", "No points, please. ", "Do not point. ", "Say it, do not point. ",
    "Without pointing: ", "Reply in words, not points. ", "Give a plain answer. ", "Leave out any points. ",
    "Please do not mark anything. ", "Words only. ", "I need no coordinates. ", "Just tell me. ",
    "Skip the pointing. ", "Answer in text. ", "Pointing is not needed. ", "Say it without locations. ")
_NO_CATEGORY = re.compile(r"cod(e|ing)|puzzle|verifiable|non-english|hardcoded", re.IGNORECASE)


def qa(question: str | list[str], answer: str, style: str) -> dict:
    """Returns an annotation of type qa."""
    return {"type": "qa", "question": question, "answer": answer, "style": style}


def pairs(column) -> list[dict]:
    """Returns a list of dictionaries, also if the column of structures is stored as a structure of lists.

    Raises:
      ValueError: the lists have different lengths.
    """
    if isinstance(column, dict):
        return [dict(zip(column, values, strict=True)) for values in zip(*column.values(), strict=True)]
    return column


def _plainly(question: str) -> str:
    """Returns the question, with a prefix that asks not to point if it is a counting question.

    Without it, plain answers would contradict the point-and-count data.
    """
    if not _COUNTING.search(question):
        return question
    return NO_POINTING[zlib.crc32(question.encode()) % len(NO_POINTING)] + question


def molmo2_cap(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, annotation_score, merged_caption, video_caption, video_frame_merged_caption."""
    styles = (("merged_caption", {"style": "video_merged_caption"}),
              ("video_caption", {"style": "video_short_caption", "length": "short"}),
              ("video_frame_merged_caption", {"style": "video_long_caption"}))
    for row in rows:
        captions = [{"type": "caption", "text": row[column].strip(), **how} for column, how in styles
                    if (row[column] or "").strip()]
        if row["annotation_score"] >= LOWEST_SCORE and captions:
            yield {"video": media.video(row), "annotations": captions}


def pixmo_cap(rows: Sequence[dict], transcripts: bool = False) -> Iterator[dict]:
    """image_url, caption, transcripts (list).

    transcripts: add one transcript, drawn at each use, as in pre-training.
    """
    for row in rows:
        annotations = [{"type": "caption", "text": row["caption"]}]
        spoken = [text for text in row["transcripts"] or () if text.strip()] if transcripts else []
        if spoken:
            annotations.append({"type": "caption", "text": spoken, "style": "transcript"})
        yield {"images": [media.image(row)], "annotations": annotations}


def video_choice(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, Question, Answer, NegativeAnswers, optional subtitle [{start, end, text}] of the video."""
    subtitles = rows[0].get("subtitle") or []
    yield {"video": media.video(rows[0])} | ({"subtitles": subtitles} if subtitles else {}) | {
        "annotations": [{"type": "choice", "question": row["Question"], "answer": 0, "shuffle": True,
                         "options": [row["Answer"], *row["NegativeAnswers"]]} for row in rows]}


def human_qa(rows: Sequence[dict]) -> Iterator[dict]:
    """video_id, question, answer."""
    answered = [qa(row["question"].strip(), row["answer"].strip(), "user_qa") for row in rows
                if row["answer"].strip()]
    if answered:
        yield {"video": media.video(rows[0]), "annotations": answered}


def ask_model_anything(rows: Sequence[dict]) -> Iterator[dict]:
    """image_sha256, question, answer."""
    yield {"images": [media.image(rows[0])], "annotations": [
        qa(_plainly(row["question"]), row["answer"], "user_qa") for row in rows]}


def cap_qa(rows: Sequence[dict]) -> Iterator[dict]:
    """image_url, question (turns marked by [USER] and [ASSISTANT]), answer (the last turn)."""
    for row in rows:
        parts = re.split(r"\[USER\]|\[ASSISTANT\]", row["question"])
        turns = [part.strip() for part in parts if part.strip()]
        turns = [_plainly(turn) if place % 2 == 0 else turn for place, turn in enumerate(turns)]
        if len(turns) % 2:
            yield {"images": [media.image(row)],
                   "annotations": [{"type": "chat", "turns": [*turns, row["answer"]]}]}


def multi_image_qa(rows: Sequence[dict]) -> Iterator[dict]:
    """image_urls or images, qa_pairs [{question, answer}]."""
    for row in rows:
        images = media.images(row)
        if 2 <= len(images) <= media.MOST_IMAGES:
            yield {"images": images, "annotations": [
                qa(_plainly(pair["question"]), pair["answer"], "correction_qa")
                for pair in pairs(row["qa_pairs"])]}


def cosyn(rows: Sequence[dict], kind: str = "chart", explained: bool = True) -> Iterator[dict]:
    """id, image or images, qa_pairs [{question, explanation, answer}].

    kind: the type of document, part of the style. explained: ask for the explanation before the answer.
    """
    for row in rows:
        images = media.images(row) if row.get("images") else [media.image(row)]
        if len(images) <= media.MOST_IMAGES:
            asked = pairs(row["qa_pairs"])
            yield {"images": images, "annotations": [
                qa(pair["question"] + EXPLAIN, f"{pair['explanation']} Answer: {pair['answer']}",
                   f"cosyn_{kind}_exp") for pair in asked] if explained else [
                qa(pair["question"], pair["answer"], f"cosyn_{kind}") for pair in asked]}


def vqa(rows: Sequence[dict], style: str = "vqa2") -> Iterator[dict]:
    """image, message_list [{question, answers}]: the most frequent answer is used, the first of equals."""
    for row in rows:
        questions = []
        for message in pairs(row["message_list"]):
            answers = message.get("answers") or [message["answer"]]
            answer = collections.Counter(answers).most_common(1)[0][0]
            questions.append(qa(message["question"], answer, message.get("style") or style))
        yield {"images": [media.image(row)], "annotations": questions}


def chart_qa(rows: Sequence[dict]) -> Iterator[dict]:
    """image, query, label (one text or a list of one), human_or_machine (0: human)."""
    for row in rows:
        label = row["label"][0] if isinstance(row["label"], list) else row["label"]
        weight = GENERATED if row["human_or_machine"] else HUMAN
        yield {"images": [media.image(row)], "weight": weight, "annotations": [
            qa(row["query"], label, "chart_qa")]}


def a_okvqa(rows: Sequence[dict]) -> Iterator[dict]:
    """image, question, choices, correct_choice_idx, direct_answers: asked as choice and as short answer."""
    for row in rows:
        direct = collections.Counter(row["direct_answers"]).most_common(1)[0][0]
        yield {"images": [media.image(row)], "annotations": [
            {"type": "choice", "question": row["question"], "options": row["choices"],
             "answer": row["correct_choice_idx"]}, qa(row["question"], direct, "a_okvqa_da")]}


def mantis(rows: Sequence[dict]) -> Iterator[dict]:
    """images, mc_question, choices, correct_choice_idx: rows with one image or too many are left out."""
    for row in rows:
        if 2 <= len(row["images"]) <= media.MOST_IMAGES:
            yield {"images": row["images"], "annotations": [
                {"type": "choice", "question": row["mc_question"], "options": row["choices"],
                 "answer": row["correct_choice_idx"], "shuffle": True}]}


def tulu(rows: Sequence[dict], most_first_tokens: int = MOST_FIRST_TOKENS) -> Iterator[dict]:
    """messages [{role, content}], category, source, first_message_qwen3_tokens, and two flags.

    A system message is prepended to the first question. Code, puzzles, languages other than English and
    hard-coded identities are left out.
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


def hardcodes(rows: Sequence[dict], media_folder: str = "") -> Iterator[dict]:
    """questions (list), response, optional images: one record per question.

    A question without images gets random files of media_folder, so that the answer does not depend on the
    absence of media: nothing 35 %, an image 25 %, a video 25 %, two to five images 15 %.
    """
    names = sorted(path.name for path in pathlib.Path(media_folder).glob("*")) if media_folder else []
    stills, films = ([name for name in names if name.endswith(endings)] for endings in (STILL, FILM))
    for row in rows:
        for question in row["questions"]:
            shown = {"images": row["images"]} if row.get("images") else _beside(question, stills, films)
            yield shown | {"annotations": [qa(question, row["response"], "user_qa")]}


def _beside(question: str, stills: Sequence[str], films: Sequence[str]) -> dict:
    """Returns media to show with a question about none, drawn with the question as seed."""
    rng = np.random.RandomState(zlib.crc32(question.encode()))
    draw, number = rng.uniform(), rng.randint(2, media.MOST_IMAGES + 1)
    if draw < 0.35:
        return {}
    if 0.60 <= draw < 0.85:
        return {"video": f"media/{films[rng.randint(len(films))]}"} if films else {}
    chosen = rng.permutation(len(stills))[:1 if draw < 0.60 else number]
    return {"images": [f"media/{stills[place]}" for place in chosen]} if len(chosen) else {}
