"""Scores of suites: means equal those of the scoring functions; intervals draw clusters; the table."""

import pathlib

import numpy as np
import pytest

from data_pipelines import suites
from data_pipelines.scoring import choice_rules
from data_pipelines.scoring import counting
from data_pipelines.scoring import hits
from data_pipelines.scoring import regions
from data_pipelines.scoring import statements
from data_pipelines.suites import benchmark as benchmarks
from data_pipelines.suites import metrics
from data_pipelines.suites import results
from data_pipelines.suites import tables
from molmo2_jax import types

OPTIONS = ("cat", "dog", "cow", "hen")


def item(number, target):
    return benchmarks.Item(id=str(number), cluster=str(number), prompt="Q?", target=target,
                           example=types.Example(annotations=()))


def whole(metric, targets, answers):
    """Returns the scores of the means of one answer at a time."""
    rows = [metric.each(item(number, target), answer)
            for number, (target, answer) in enumerate(zip(targets, answers, strict=True))]
    return metric.derive(hits.means(rows))


def contains(found, wanted):
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_means_of_one_answer_at_a_time_are_the_scores_of_the_whole_list():
    targets, answers = [("Q?", OPTIONS, n % 4) for n in range(6)], ["A", "B", "no", "D", "cat", "(B)"]
    for rule in ("video_mme", "next_qa"):
        contains(whole(metrics.choice(rule), targets, answers), choice_rules.score(rule, targets, answers))
    counts, said = [1, 7, 7, 21], ["1", "a total of 7", "6", "There are none."]
    contains(whole(metrics.COUNT, [("animal", one) for one in counts], said), counting.score(counts, said))
    tags = [f'<points coords="1 {" ".join(f"{n} 100 100" for n in range(count))}">x</points>'
            for count in (1, 2, 2, 5)]
    contains(whole(metrics.COUNT_BY_POINTS, [1, 2, 3, 5], tags), counting.score_by_points([1, 2, 3, 5], tags))
    masks = [regions.MaskTarget(mask=np.ones((4, 4), bool), width=4, height=4, category=category)
             for category in ("spatial", "spatial", "spatial", "counting")]
    given = ["", tags[0], "", tags[0]]
    found = whole(metrics.POINT_BENCH, [lambda one=one: one for one in masks], given)
    contains(found, regions.score_masks(masks, given))
    assert found["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    judge = statements.Judge(split=lambda text: [statements.Statement(text, "Object")],
                             check=lambda listed, text: [one in text for one in listed])
    facts = [statements.Target(caption="x y", statements=(
        statements.Statement(one, "Action"), statements.Statement("z", None))) for one in "xyy"]
    captions = ["x", "y z", "q"]
    contains(whole(metrics.captions(judge), facts, captions), statements.score(facts, captions, judge))


def rows_of(values):
    return {str(number): {"accuracy": value, "accuracy_reference": value} for number, value in
            enumerate(map(float, values))}


METRIC = metrics.choice("tomato")


def test_an_interval_is_that_of_the_normal_distribution_for_independent_answers():
    values = np.random.default_rng(0).uniform(size=400) < 0.3
    rows = rows_of(values)
    low, high = results.bootstrap(METRIC, rows, {name: name for name in rows})["accuracy"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)
    again = results.bootstrap(METRIC, rows, {name: name for name in rows})["accuracy"]
    assert again == (low, high)


def test_questions_about_one_video_are_drawn_together():
    values = np.repeat(np.random.default_rng(1).uniform(size=40) < 0.5, 10)
    rows = rows_of(values)
    alone = results.bootstrap(METRIC, rows, {name: name for name in rows})["accuracy"]
    together = results.bootstrap(METRIC, rows, {name: str(int(name) // 10) for name in rows})["accuracy"]
    # ten equal answers per video count as one
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.15)
    assert results.bootstrap(METRIC, rows, dict.fromkeys(rows, "one video")) == {}


def test_scores_that_are_no_means_are_derived_in_every_draw():
    rows = {str(number): {f"accuracy_{'ab'[number % 2]}": float(number % 3 == 0), "valid": 1.0}
            for number in range(60)}
    low, high = results.bootstrap(metrics.POINT_BENCH, rows, {name: name for name in rows})["accuracy"]
    assert low < results.headline(metrics.POINT_BENCH, rows) < high
    assert results.value_of(metrics.POINT_BENCH, rows["0"]) == 1


def test_an_answer_that_a_rule_leaves_out_is_missing_from_its_mean_alone():
    rows = rows_of([1, 0, 1, 0])
    del rows["1"]["accuracy_reference"]
    found = results.bootstrap(METRIC, rows, {name: name for name in rows})
    assert found["accuracy_reference"][1] == 1 and found["accuracy"][0] == 0


def test_a_difference_is_paired():
    rng = np.random.default_rng(2)
    first = rng.uniform(size=300) < 0.5
    second = first | (rng.uniform(size=300) < 0.1)   # never worse
    clusters = {str(number): str(number) for number in range(300)}
    difference, interval = results.difference(METRIC, rows_of(first), rows_of(second), clusters)
    assert difference == pytest.approx(second.mean() - first.mean())
    assert interval[0] > 0 and interval[1] - interval[0] < 0.06   # unpaired it would be about 0.16
    nothing, around = results.difference(METRIC, rows_of(first), rows_of(first), clusters)
    assert nothing == 0 and around == (0, 0)
    with pytest.raises(ValueError, match="must have questions in common"):
        results.difference(METRIC, rows_of(first), {}, clusters)


def made(name, score):
    return results.Result(name=name, questions=4, examples=4, score=score, published_score=score,
                          interval=(0.1, 0.9), parsed=1.0, tokens=3, seconds=2)


def test_the_table_has_published_figures_beside_and_an_average_only_of_whole_suites():
    whole_suite = [made(one.name, 0.5) for one in suites.SUITES["multi_image"]]
    text = tables.markdown(whole_suite, {"model": "m"})
    ours, theirs = "4 of 4 | 50.0 | 10.0 – 90.0 | 50.0 | 100.0 | 3 | 0 | 2", "60.5 | 63.7 | –"
    assert f"| MuirBench | accuracy | {ours} | {theirs} |" in text
    assert "| average of multi_image (3) |  |  | 50.0 |  | 50.0 |  |  |  |  | 57.8 | 56.4 | 53.5 |" in text
    empty = [*whole_suite[:2], results.Result(name="blink", reason="blink (BLINK) needs files")]
    text = tables.markdown(empty, {})
    assert "| average of multi_image (3) |  |  | – |  | – |" in text
    assert "Without a score:\n\n- BLINK: blink (BLINK) needs files" in text
    content = tables.as_json(empty, {"model": "m"})
    assert content["averages"] == {"multi_image": None}
    assert content["benchmarks"]["muir_bench"]["published"]["accuracy_reference"]["Molmo2-8B"] == 63.7
    assert len({len(line.split("|")) for line in text.splitlines() if line.startswith("|")}) == 1
    pointed = results.Result(name="video_point", score=0.5, published_score=0.5, scores={
        "f1": 0.5, "f1_reference": 0.5, "recall_reference": 0.25})
    assert "| Molmo2-VP | recall_reference | 25.0 | 42.7 | 39.3 | 35.8 |" in tables.markdown([pointed], {})
    assert "blink" not in tables.text(empty).lower().split("\n")[0]


def test_the_page_of_documentation_lists_every_benchmark_as_the_table_does():
    page = (pathlib.Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert tables.sources() in page
