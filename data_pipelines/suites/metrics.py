"""The metrics of benchmarks: scoring functions of data_pipelines.scoring, one answer at a time.

A scoring function of a list with one answer returns the scores of that answer; their means are those of the
whole list. What is not a plain mean is taken out of the rows and derived from the means.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.scoring import choice_rules
from data_pipelines.scoring import counting
from data_pipelines.scoring import math_vista
from data_pipelines.scoring import mmmu
from data_pipelines.scoring import points
from data_pipelines.scoring import regions
from data_pipelines.scoring import segments
from data_pipelines.scoring import short_answers
from data_pipelines.scoring import statements
from data_pipelines.scoring import temp_compass
from data_pipelines.scoring import tracks
from data_pipelines.suites import benchmark
from data_pipelines.suites import segmenters

Item = benchmark.Item
Row = benchmark.Row
Metric = benchmark.Metric


def choice(rule: str) -> Metric:
    """Returns the metric of multiple choice with a published rule of choice_rules.RULES."""
    def each(item: Item, answer: str) -> Row:
        return choice_rules.score(rule, [item.target], [answer])
    return Metric(each=each, headline="accuracy", published="accuracy_reference")


def short_answer(judge: Callable[[Sequence[str], str], float], has_parts: bool = False) -> Metric:
    """Returns the metric of short answers judged by a function of short_answers.

    The target is the accepted answers; with has_parts (accepted answers, part of the data), and score_PART is
    the score of each part.
    """
    def each(item: Item, answer: str) -> Row:
        accepted, part = item.target if has_parts else (item.target, "")
        scores = short_answers.score(judge, [accepted], [answer])
        return scores | ({f"score_{part}": scores["score"]} if part else {})
    return Metric(each=each, headline="score", published="score")


def _temp_compass(item: Item, answer: str) -> Row:
    kind, target = item.target
    if kind == "yes_no":
        scores = temp_compass.score_yes_no([target], [answer])
        scores["accuracy_reference"] = scores["accuracy"]
    elif kind == "caption_matching":
        scores = temp_compass.score_matching([target], [answer])
    else:
        scores = choice_rules.score("temp_compass", [target], [answer])
    return scores | {f"accuracy_{kind}": scores["accuracy"]}


def _real_world_qa(item: Item, answer: str) -> Row:
    if isinstance(item.target, choice_rules.clean.Target):
        return choice_rules.score("real_world_qa", [item.target], [answer])
    scores = short_answers.score(short_answers.normalised_match, [item.target], [answer])
    return {"accuracy": scores["score"], "accuracy_reference": scores["score"], "valid": scores["valid"]}


def _mmmu(item: Item, answer: str) -> Row:
    """Returns choice scores and open scores under common names; an open answer is read if it has text."""
    scores = mmmu.score([item.target], [answer])
    if "open_accuracy" in scores:
        has_text = float(bool(answer.strip()))
        right = scores["open_accuracy"] * has_text
        return {"accuracy": right, "accuracy_reference": right, "valid": has_text, "accuracy_open": right}
    return {"accuracy": scores["choice_accuracy"], "accuracy_reference": scores["accuracy_reference"],
            "valid": scores["choice_valid"], "accuracy_choice": scores["choice_accuracy"]}


def math_vista_with(extract: math_vista.Extract = math_vista.as_it_is) -> Metric:
    """Returns the metric of MathVista with a function that extracts the value from an answer."""
    def each(item: Item, answer: str) -> Row:
        return math_vista.score([item.target], [answer], extract)
    return Metric(each=each, headline="accuracy", published="accuracy_reference")


def _mean_of(**patterns: str) -> Callable[[Mapping[str, float]], Row]:
    """Returns a function that adds, for each name, the mean of the scores whose names fit its pattern."""
    def derive(means: Mapping[str, float]) -> Row:
        found = dict(means)
        for name, pattern in patterns.items():
            chosen = [value for one, value in means.items() if re.fullmatch(pattern, one)]
            if chosen:
                found[name] = float(np.mean(chosen))
        return found
    return derive


def _count(item: Item, answer: str) -> Row:
    category, count = item.target
    scores = counting.score([count], [answer])
    return {name: value for name, value in scores.items() if not name.startswith("per_category")} | {
        f"correct_{category.replace(' ', '_').replace('/', '_')}": scores["correct"]}


def _by_points(item: Item, answer: str) -> Row:
    scores = counting.score_by_points([item.target], [answer])
    return {name: value for name, value in scores.items() if name != "per_category_average"}


def _points(item: Item, answer: str) -> Row:
    return points.score([item.target()], [answer])


def _tracks(item: Item, answer: str) -> Row:
    group, target = item.target
    scores = tracks.score([target()], [answer])
    return scores | ({f"HOTA_{group}": scores["HOTA"], f"f1_{group}": scores["f1"],
                      f"jf_{group}": scores["jf"]} if group else {})


def tracks_with(segment: segmenters.Segment) -> Metric:
    """Returns the metric of tracks with J&F of segmented masks too, over all frames, as NAME_segmented.

    Raises (each): ValueError: there are no masks of the answer.
    """
    def each(item: Item, answer: str) -> Row:
        whole = item.target[1](every_frame=True)
        given = segment(item, answer, whole)
        return _tracks(item, answer) | {f"{name}_segmented": value for name, value in
                                        tracks.score_given(whole, given).items()}
    return Metric(each=each, headline=TRACKS.headline, published=TRACKS.published)


def _masks(item: Item, answer: str) -> Row:
    scores = regions.score_masks([item.target()], [answer])
    del scores["accuracy"]
    return scores


def _boxes(item: Item, answer: str) -> Row:
    return regions.score_boxes([item.target], [answer])


def _segments(item: Item, answer: str) -> Row:
    return segments.score([item.target], [answer])


def _without_a_judge(item: Item, answer: str) -> Row:
    raise ValueError("captions need a judge: give --judge_url and --judge_model, or --judgements")


def captions(judge: statements.Judge) -> Metric:
    """Returns the metric of captions by statements, with this judge."""
    def each(item: Item, answer: str) -> Row:
        scores = statements.score([item.target], [answer], judge)
        del scores["f1"]
        return scores
    return Metric(each=each, headline="f1", published="f1", derive=_harmonic)


def caption_choices(judge: statements.Judge) -> Metric:
    """Returns the metric of captions from which this judge answers a question."""
    def each(item: Item, answer: str) -> Row:
        return temp_compass.score_captions([item.target], [answer], judge.choose)
    return Metric(each=each, headline="accuracy", published="accuracy")


def judged(metric: Metric, judge: statements.Judge) -> Metric:
    """Returns CAPTIONS or CAPTION_CHOICES with a judge."""
    return captions(judge) if metric is CAPTIONS else caption_choices(judge)


def _harmonic(means: Mapping[str, float]) -> Row:
    total = means["recall"] + means["precision"]
    return dict(means) | {"f1": 2 * means["recall"] * means["precision"] / total if total else 0.0}


TEMP_COMPASS = Metric(each=_temp_compass, headline="accuracy", published="accuracy_reference")
REAL_WORLD_QA = Metric(each=_real_world_qa, headline="accuracy", published="accuracy_reference")
MMMU = Metric(each=_mmmu, headline="accuracy", published="accuracy_reference")
MATH_VISTA = math_vista_with()
COUNT = Metric(each=_count, headline="correct", published="correct_reference",
               derive=_mean_of(per_category_average=r"correct_from_\d+",
                               per_category_average_reference=r"correct_from_\d+_reference"))
COUNT_BY_POINTS = Metric(each=_by_points, headline="correct", published="correct",
                         derive=_mean_of(per_category_average=r"correct_\d+"))
POINTS = Metric(each=_points, headline="f1", published="f1_reference")
TRACKS = Metric(each=_tracks, headline="HOTA", published="HOTA_reference")
POINT_BENCH = Metric(each=_masks, headline="accuracy", published="accuracy",
                     derive=_mean_of(accuracy=r"accuracy_.+"))
BOXES = Metric(each=_boxes, headline="accuracy", published="accuracy")
SEGMENTS = Metric(each=_segments, headline="f1", published="f1_reference")
CAPTIONS = Metric(each=_without_a_judge, headline="f1", published="f1", derive=_harmonic)
CAPTION_CHOICES = Metric(each=_without_a_judge, headline="accuracy", published="accuracy")
