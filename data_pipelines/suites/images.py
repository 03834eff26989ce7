"""Questions about one image: the nine benchmarks of the image average that are answered in words, and others
of the published suite without a headline.

Source: reference, olmo/data/academic_image_datasets.py.
"""

import ast
import collections
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.schemas import answering
from data_pipelines.schemas import media as media_names
from data_pipelines.scoring import choices
from data_pipelines.scoring import math_vista as math_vista_rules
from data_pipelines.scoring import short_answers
from data_pipelines.suites import benchmark
from data_pipelines.suites import metrics
from data_pipelines.suites import prompts
from data_pipelines.suites import rows
from molmo2_jax import types
from molmo2_jax.inputs import points

HUB = benchmark.HUB
Benchmark = benchmark.Benchmark
Item = benchmark.Item
VQA_SAMPLE, VQA_SEED = 8192, 69282      # questions of VQA v2 that the published figure is of
WITHOUT_LETTERS = 2                     # options of a diagram that are no letters from which on all get one
_SHORT = "Please answer directly with a single word or number."
_OPTION_IMAGE = re.compile("<img='(.*?)'>")


def item(name: str, image: Any, prompt: str, target: Any, reference: str, cluster: str = "") -> Item:
    """Returns a question about one image, or about none (None)."""
    images = () if image is None else (image,)
    return Item(id=name, cluster=cluster or str(image or name), prompt=prompt, target=target,
                example=types.Example(annotations=(), images=images, key=name), reference=reference)


def asked_as_choice(name: str, image: Any, question: str, options: Sequence[str], right: int, *,
                    is_labelled: bool = True, cluster: str = "") -> Item:
    """Returns a multiple-choice question in the layout of the formatter (form F)."""
    if not 0 <= right < len(options):
        raise ValueError(f"the right answer must be one of {len(options)} options; got number {right}")
    lines = prompts.lettered(options) if is_labelled else options
    return item(name, image, prompts.formatted(question, options, is_labelled=is_labelled),
                choices.Target(question, tuple(options), right, is_labelled), lines[right], cluster)


def _most_common(answers: Sequence[str]) -> str:
    return collections.Counter(answers).most_common(1)[0][0]


def ai2d(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, question_id, question, answer_texts, correct_answer, abc_label, option_is_abc,
    has_transparent_box: diagrams with opaque boxes are left out."""
    if row["abc_label"] and not row["has_transparent_box"]:
        return
    options, is_letter = list(row["answer_texts"]), list(row["option_is_abc"])
    is_lettered = bool(row["abc_label"]) and sum(is_letter) > len(options) - WITHOUT_LETTERS
    if is_lettered:
        options = [text.upper() if letter else text for text, letter in zip(options, is_letter, strict=True)]
    yield asked_as_choice(str(row["question_id"]), place.media.image(row["image"]), row["question"], options,
                          int(row["correct_answer"]), is_labelled=not is_lettered,
                          cluster=str(row.get("image_id", "")))


def chart_qa(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, query, label (one text or a list), human_or_machine (0: human)."""
    accepted = row["label"] if isinstance(row["label"], list) else [row["label"]]
    part = "augmented" if row["human_or_machine"] else "human"
    yield item(place.name, place.media.image(row["image"]), prompts.short("chart_qa", row["query"]),
               (tuple(accepted), part), accepted[0])


def doc_qa(row: dict, place: rows.Place) -> Iterator[Item]:
    """questionId, question, image (a file name), answers."""
    yield item(str(row["questionId"]), place.media.image(row["image"]),
               prompts.short("doc_qa", row["question"]), tuple(row["answers"]), row["answers"][0])


def info_qa(row: dict, place: rows.Place) -> Iterator[Item]:
    """questionId, question, image_local_name, answers."""
    yield item(str(row["questionId"]), place.media.image(f"images/{row['image_local_name']}"),
               prompts.short("info_qa", row["question"]), tuple(row["answers"]), row["answers"][0])


def _messages(style: str):
    """Returns the reader of image, message_list [{question, answers, question_id}]."""
    def make(row: dict, place: rows.Place) -> Iterator[Item]:
        for number, one in enumerate(answering.pairs(row["message_list"])):
            accepted = one.get("answers") or [one["answer"]]
            name = one.get("question_id")
            yield item(f"{place.name}_{number}" if name is None else str(name),
                       place.media.image(row["image"]), prompts.short(style, one["question"]),
                       tuple(map(str, accepted)), _most_common(list(map(str, accepted))))
    return make


def _vqa2_sample(folder: pathlib.Path) -> Iterator[Item | ValueError]:
    """Yields the questions of the published sample: the first after a shuffle with a fixed seed."""
    found = list(rows.each(_messages("vqa2"), "validation/*.parquet")(folder))
    if len(found) > VQA_SAMPLE:
        np.random.RandomState(VQA_SEED).shuffle(found)  # type: ignore[arg-type]
    yield from found[:VQA_SAMPLE]


def real_world_qa(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, question, answer: multiple choice keeps the instruction in the question, the rest loses it."""
    image, answer = place.media.image(row["image"]), row["answer"].strip()
    if _SHORT in row["question"]:
        question = row["question"].split("\n")[0]
        yield item(place.name, image, prompts.short("eval_short_answer", question), (answer,), answer)
        return
    question, options = prompts.split(row["question"])
    right = prompts.LETTERS.index(answer.upper())
    if right >= len(options):
        raise ValueError(f"the answer must be the letter of an option; got {answer!r}")
    yield item(place.name, image, row["question"], choices.Target(question, tuple(options), right), answer)


def mmmu(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, question, options (a list written in Python), answer, question_type, image_1: only the first image
    is shown, and none if the options are images."""
    image = place.media.image(row["image_1"])
    if row["question_type"] != "multiple-choice":
        accepted = _listed(row["answer"])
        yield item(row["id"], image, prompts.short("vqa2", row["question"]), tuple(accepted), accepted[0])
        return
    options = _listed(row["options"])
    is_images = sum(bool(_OPTION_IMAGE.match(one)) for one in options) > 1
    yield asked_as_choice(row["id"], None if is_images else image, row["question"], options,
                          prompts.LETTERS.index(row["answer"]))


def _listed(text: str | list) -> list[str]:
    """Returns the texts of a list written in Python, or the text alone."""
    if isinstance(text, list):
        return list(map(str, text))
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return [text]
    return list(map(str, found)) if isinstance(found, list) else [text]


def math_vista(row: dict, place: rows.Place) -> Iterator[Item]:
    """pid, question, decoded_image, choices, answer, precision, question_type, answer_type."""
    question = row["question"].split("Question:")[-1].split("Hint:")[0].strip()
    options = tuple(row["choices"] or ())
    target = math_vista_rules.Question(answer=row["answer"], choices=options, answer_type=row["answer_type"],
                                       precision=int(row["precision"] or 0))
    if row["question_type"] == "multi_choice":
        asked, reference = prompts.formatted(question, options), options[options.index(row["answer"])]
    else:
        asked, reference = prompts.short("eval_short_answer", question), row["answer"]
    yield item(str(row["pid"]), place.media.image(row["decoded_image"]), asked, target, reference)


def okvqa(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, image_id, qas [{question_id, question, answers [{raw_answer}]}]."""
    for one in answering.pairs(row["qas"]):
        accepted = [answer["raw_answer"] for answer in answering.pairs(one["answers"])]
        yield item(str(one["question_id"]), place.media.image(row["image"]),
                   prompts.short("okvqa", one["question"]), tuple(accepted), _most_common(accepted))


def a_okvqa_choice(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, message_list [{question_id, question, choices, answer_idx}]."""
    for one in answering.pairs(row["message_list"]):
        yield asked_as_choice(str(one["question_id"]), place.media.image(row["image"]), one["question"],
                              one["choices"], int(one["answer_idx"]))


def a_okvqa_direct(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, difficult_direct_answer, message_list [{question_id, question, direct_answers}]: difficult
    questions are left out."""
    for one in answering.pairs(row["message_list"]):
        if not one.get("difficult_direct_answer", row.get("difficult_direct_answer")):
            accepted = list(one["direct_answers"])
            yield item(str(one["question_id"]), place.media.image(row["image"]),
                       prompts.short("a_okvqa_da", one["question"]), tuple(accepted), _most_common(accepted))


def science_qa(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, question, choices, answer (index), hint: rows without an image are left out."""
    if row.get("image"):
        question = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        yield asked_as_choice(place.name, place.media.image(row["image"]), question, row["choices"],
                              int(row["answer"]))


def gqa(row: dict, place: rows.Place) -> Iterator[Item]:
    """id, imageId, question, answer: testdev_balanced_questions.json, images/ID.jpg."""
    yield item(str(row["id"]), place.media.find(f"images/{row['imageId']}.jpg"),
               prompts.short("eval_short_answer", row["question"]), (row["answer"],), row["answer"])


def count_bench(row: dict, place: rows.Place) -> Iterator[Item]:
    """image, question, number (or count)."""
    count = int(row["number"] if "number" in row else row["count"])
    yield item(place.name, place.media.image(row["image"]), row["question"], count,
               counted(count, "objects"))


def pixmo_count(row: dict, place: rows.Place) -> Iterator[Item]:
    """image_url or image_sha256, label, count."""
    label, count = row["label"].lower(), int(row["count"])
    name = media_names.image(row)
    yield item(place.name, place.media.find(name, pathlib.PurePath(name).name),
               f"How many {label} are there in the image?", count, counted(count, label))


def counted(count: int, label: str) -> str:
    """Returns an answer with this many points, as a model that counts by pointing gives it."""
    places = [(index % 30 + 1, index // 30 + 1) for index in range(count)]
    return points_text(places, label)


def points_text(places: Sequence[tuple[float, float]], label: str, size: tuple[float, float] = (100, 100),
                ) -> str:
    """Returns the answer that points at these places and counts them."""
    return points.format_point_count([(1, places)], label, scale=size)


def _score(*percent: float | None) -> dict:
    return {"score": percent}


def _accuracy(*percent: float | None) -> dict:
    return {"accuracy_reference": percent}


_VQA = metrics.short_answer(short_answers.vqa)

IMAGE = (
    Benchmark(name="ai2d", title="AI2D", folder="ai2d", is_high_res=True, max_new_tokens=32,
              origin="no rows are published: build image, question_id, question, answer_texts, "
              "correct_answer, abc_label, option_is_abc and has_transparent_box of the test set from the "
              "diagrams of https://allenai.org/data/diagrams",
              files=("test*.parquet | test*.jsonl",), rows=rows.each(ai2d, "test*.parquet", "test*.jsonl"),
              metric=metrics.choice("ai2d"), published=_accuracy(95.6, 95.8, None)),
    Benchmark(name="chart_qa", title="ChartQA", folder="chart_qa", is_high_res=True,
              origin=f"{HUB}HuggingFaceM4/ChartQA, test", files=("data/test-*.parquet",),
              rows=rows.each(chart_qa, "data/test-*.parquet"),
              metric=metrics.short_answer(short_answers.relaxed, True), published=_score(86.1, 86.0, None)),
    Benchmark(name="doc_qa", title="DocVQA", folder="doc_qa", is_high_res=True,
              origin="https://rrc.cvc.uab.es/?ch=17, task 1, validation (the test set has no answers); needs "
              "an account",
              files=("val_v1.0_withQT.json",), rows=rows.each(doc_qa, "val_v1.0_withQT.json"),
              metric=metrics.short_answer(short_answers.anls), published=_score(87.8, 93.2, None)),
    Benchmark(name="info_qa", title="InfoQA", folder="info_qa", is_high_res=True,
              origin="https://rrc.cvc.uab.es/?ch=17, task 3, validation (the test set has no answers); needs "
              "an account",
              files=("infographicsVQA_val_v1.0_withQT.json",),
              rows=rows.each(info_qa, "infographicsVQA_val_v1.0_withQT.json"),
              metric=metrics.short_answer(short_answers.anls), published=_score(78.6, 80.1, None)),
    Benchmark(name="text_vqa", title="TextVQA", folder="text_vqa", is_high_res=True,
              origin=f"{HUB}allenai/molmo2-text-vqa, validation, and the images of https://textvqa.org",
              files=("validation/*.parquet",), rows=rows.each(_messages("text_vqa"), "validation/*.parquet"),
              metric=_VQA, published=_score(85.0, 85.7, None)),
    Benchmark(name="vqa2", title="VQA v2", folder="vqa2", is_high_res=True,
              origin=f"{HUB}allenai/molmo2-vqa2-2014, validation, and val2014 of https://cocodataset.org",
              files=("validation/*.parquet",), rows=_vqa2_sample, metric=_VQA,
              published=_score(86.6, 87.0, None)),
    Benchmark(name="real_world_qa", title="RealWorldQA", folder="real_world_qa", is_high_res=True,
              origin=f"{HUB}xai-org/RealworldQA, test", files=("data/test-*.parquet",),
              rows=rows.each(real_world_qa, "data/test-*.parquet"), metric=metrics.REAL_WORLD_QA,
              published=_accuracy(75.4, 77.6, None)),
    Benchmark(name="mmmu", title="MMMU", folder="mmmu", is_high_res=True, max_new_tokens=64,
              origin=f"{HUB}MMMU/MMMU, validation, all thirty subjects",
              files=("*/validation-*.parquet",), rows=rows.each(mmmu, "*/validation-*.parquet"),
              metric=metrics.MMMU, published=_accuracy(50.9, 53.0, None)),
    Benchmark(name="math_vista", title="MathVista", folder="math_vista", is_high_res=True, max_new_tokens=32,
              origin=f"{HUB}AI4Math/MathVista, testmini", files=("data/testmini-*.parquet",),
              rows=rows.each(math_vista, "data/testmini-*.parquet"), metric=metrics.MATH_VISTA,
              published=_accuracy(56.7, 58.9, None)),
    Benchmark(name="count_bench", title="CountBenchQA", folder="count_bench", is_high_res=True,
              max_new_tokens=192,
              origin=f"{HUB}vikhyatk/CountBenchQA, test", files=("data/test-*.parquet",),
              rows=rows.each(count_bench, "data/test-*.parquet"), metric=metrics.COUNT_BY_POINTS,
              published={"correct": (93.9, 93.7, None)}),
    Benchmark(name="pixmo_count", title="PixMo-Count", folder="pixmo_count", is_high_res=True,
              max_new_tokens=192,
              origin=f"{HUB}allenai/pixmo-count, validation, and its images as media/SHA256.jpg, the "
              "SHA-256 of the address",
              files=("data/validation-*.parquet",), rows=rows.each(pixmo_count, "data/validation-*.parquet"),
              metric=metrics.COUNT_BY_POINTS, published={"correct": (88.1, 88.5, None)}),
)
MORE_IMAGE = (
    Benchmark(name="okvqa", title="OK-VQA", folder="okvqa", is_high_res=True,
              origin=f"{HUB}allenai/molmo2-okvqa, val, and val2014 of https://cocodataset.org",
              files=("val/*.parquet",), rows=rows.each(okvqa, "val/*.parquet"), metric=_VQA),
    Benchmark(name="a_okvqa_mc", title="A-OKVQA, multiple choice", folder="a_okvqa", is_high_res=True,
              origin=f"{HUB}allenai/molmo2-a-ok-vqa, val, and val2017 of https://cocodataset.org",
              files=("val/*.parquet",), rows=rows.each(a_okvqa_choice, "val/*.parquet"),
              metric=metrics.choice("a_okvqa")),
    Benchmark(name="a_okvqa_da", title="A-OKVQA, direct answers", folder="a_okvqa", is_high_res=True,
              origin=f"{HUB}allenai/molmo2-a-ok-vqa, val, and val2017 of https://cocodataset.org",
              files=("val/*.parquet",), rows=rows.each(a_okvqa_direct, "val/*.parquet"),
              metric=metrics.short_answer(short_answers.a_okvqa)),
    Benchmark(name="science_qa", title="ScienceQA with images", folder="science_qa", is_high_res=True,
              origin=f"{HUB}derek-thomas/ScienceQA, test", files=("data/test-*.parquet",),
              rows=rows.each(science_qa, "data/test-*.parquet"), metric=metrics.choice("science_qa")),
    Benchmark(name="tally_qa", title="TallyQA", folder="tally_qa", is_high_res=True,
              origin=f"{HUB}allenai/molmo2-tally-qa, test, and the images of COCO 2014 and Visual Genome",
              files=("test/*.parquet",), rows=rows.each(_messages("tally_qa"), "test/*.parquet"),
              metric=metrics.short_answer(short_answers.exact)),
    Benchmark(name="gqa", title="GQA", folder="gqa", is_high_res=True,
              origin="https://cs.stanford.edu/people/dorarad/gqa, testdev_balanced",
              files=("testdev_balanced_questions.json",),
              rows=rows.each(gqa, "testdev_balanced_questions.json"),
              metric=metrics.short_answer(short_answers.exact)),
)
