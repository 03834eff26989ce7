"""Every benchmark, from small files in its real schema to scores."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import suites
from data_pipelines.scoring import statements
from data_pipelines.suites import metrics
from data_pipelines.suites import pointing
from data_pipelines.suites import predictions
from data_pipelines.suites import results
from molmo2_jax.inputs import video
from tests.data_pipelines.suites import cases
from tests.data_pipelines.suites import files
from tests.data_pipelines.suites import still_files

MOST_FRAMES, RATE = 384, 2.0


def split(caption):
    return [statements.Statement(text.strip() + ".", "Action") for text in caption.split(".") if text.strip()]


def check(listed, text):
    """Returns that a text states what it has all words of."""
    words = set(text.lower().strip(".").split())
    return [set(one.lower().strip(".").split()) <= words | {"the", "is"} for one in listed]


def choose(question, caption):
    """Returns the line of the option whose text the caption has."""
    return next((line for line in question.split("\n")[1:] if line[3:] in caption), "none of them")


JUDGE = statements.Judge(split=split, check=check, choose=choose)


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    return files.film(tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.fixture(scope="session")
def read(tmp_path_factory, film):
    """Returns a function: name -> (benchmark, its questions, its errors); files are written once."""
    root, done = tmp_path_factory.mktemp("benchmarks"), {}

    def one(name):
        if name not in done:
            benchmark = suites.BENCHMARKS[name]
            if not (root / benchmark.folder).exists():
                cases.write(name, root / benchmark.folder, film)
            if benchmark.needs_judge:
                benchmark = dataclasses.replace(benchmark, metric=metrics.judged(benchmark.metric, JUDGE))
            done[name] = (benchmark, *benchmark.read(root))
        return done[name]
    return one


def shown(item):
    """Returns the times of the frames that a question shows, or how many images can be opened."""
    example = item.example
    if example.video is None:
        from molmo2_jax.inputs import pixels
        return len([pixels.load(one) for one in example.images])
    return video.read(example.video, max_frames=MOST_FRAMES, fps=RATE, clip=example.clip,
                      tracking_fps=example.tracking_fps).seconds.tolist()


def scores(benchmark, item, answer):
    row = benchmark.metric.each(item, answer)
    found = benchmark.metric.derive(row)
    return found[benchmark.metric.headline], found.get(benchmark.metric.published)


def right_answer(item):
    return item.reference or pointing.inside_point(item.target())


def test_every_benchmark_has_a_case():
    assert set(cases.CASES) == set(suites.BENCHMARKS)


@pytest.mark.parametrize("name", cases.CASES)
def test_a_benchmark_is_read_asked_and_scored_as_worked_out_by_hand(name, read):
    case, (benchmark, items, errors) = cases.CASES[name], read(name)
    assert errors == [] and tuple(item.id for item in items) == case.ids
    first = items[0]
    assert first.prompt == case.prompt
    assert first.reference == case.right or not case.right
    assert shown(first) == (case.frames if isinstance(case.frames, int) else pytest.approx(case.frames))
    for answer, expected in case.answers.items():
        assert scores(benchmark, first, answer) == pytest.approx(expected), answer


@pytest.mark.parametrize("name", cases.CASES)
def test_a_perfect_predictor_scores_one_and_an_empty_one_nothing(name, read):
    benchmark, items, _ = read(name)
    for text_of, score, parsed in ((right_answer, 1.0, 1.0), (lambda item: "", 0.0, 0.0)):
        answers = {item.id: predictions.Prediction(benchmark=name, id=item.id, answer=text_of(item))
                   for item in items}
        result, rows = results.result(benchmark, items, answers)
        assert (result.score, result.parsed) == (score, parsed) and len(rows) == len(items)
        assert result.reason == "" and result.left_out == ()


@pytest.mark.parametrize("name", ["molmo2_track", "mevis_valid_u", "ref_yt_vos", "ref_davis17", "reason_vos"])
def test_tracks_are_scored_at_the_frames_of_the_video_with_the_masks_of_the_data_set(name, read):
    benchmark, items, _ = read(name)
    found = benchmark.metric.each(items[0], items[0].reference)
    assert found["HOTA"] == found["f1"] == found["jf"] == 1
    # Half a second late, no frame of the answer is one of the grid; an object that is hidden in one frame of
    # the grid is rightly not named there.
    late = items[0].reference.replace(".0 1 ", ".5 1 ")
    hidden = 0 if name == "molmo2_track" else 1
    assert benchmark.metric.each(items[0], late)["f1"] == pytest.approx(hidden / (19 if hidden else 20))


def test_tracks_of_burst_count_where_they_are_shown_and_their_category_is_exhaustive(read):
    _, items, _ = read("burst_count")
    assert [item.target[1] for item in items] == [1, 3, 1] and items[1].example.clip == (0.0, 63.0)
    assert items[1].prompt == "How many person are there in the video?"


def test_groups_of_tracks_have_scores_of_their_own(read):
    benchmark, items, _ = read("molmo2_track")
    means = [benchmark.metric.each(item, item.reference) for item in items]
    assert "HOTA_animal" in means[0] and "HOTA_misc" in means[1] and "HOTA_misc" not in means[0]


def test_subtitles_are_shown_from_the_start_of_the_excerpt(read):
    assert read("long_video_bench")[1][0].example.subtitles == (
        (0.0, 10.5, "a long one"), (2.0, 4.0, "in between"))
    assert read("video_mme_subtitles")[1][0].example.subtitles == ((1.0, 2.5, "hello"), (4.0, 5.0, "there"))
    assert read("video_mme")[1][0].example.subtitles == ()


def test_the_clip_of_a_caption_is_cut_unless_its_file_is_the_clip(read):
    whole, cut, bounded = (item.example for item in read("cap_eval")[1])
    assert (whole.clip, cut.clip, bounded.clip) == (None, (2.0, 6.0), None)
    assert bounded.video.endswith("e2_bounded_decimal_2_1.5_3.0.mp4")


def test_options_that_are_images_are_asked_about_without_an_image(read):
    _, items, _ = read("mmmu")
    assert [len(item.example.images) for item in items] == [1, 0, 1]


def test_letters_in_a_diagram_are_not_lettered_again(read):
    assert read("ai2d")[1][1].prompt.endswith("\nA\nB\nnone")


def test_both_kinds_of_real_world_questions_are_asked_in_their_own_words(read):
    assert read("real_world_qa")[1][1].prompt == "vqa2: How many cars?"


def test_temp_compass_asks_yes_no_questions_as_short_answers(read):
    benchmark, items, _ = read("temp_compass")
    assert items[2].prompt == "video_short_answer: Is it eating?\nPlease answer yes or no:"
    assert scores(benchmark, items[2], "Yes, it is") == (1, 1)


def test_a_polygon_holds_what_is_inside_its_corners(read):
    benchmark, items, _ = read("osworld_g")
    assert scores(benchmark, items[1], cases.tag((100, 100))) == (1, 1)
    assert scores(benchmark, items[1], cases.tag((450, 700))) == (0, 0)


def test_ai2d_may_be_lines_with_named_pictures(tmp_path):
    still_files.jsonl_of_ai2d(tmp_path / "ai2d")
    [item], errors = suites.BENCHMARKS["ai2d"].read(tmp_path)
    assert shown(item) == 1 and not errors


def test_a_missing_data_set_is_a_sentence_that_says_where_it_comes_from(tmp_path):
    for benchmark in suites.BENCHMARKS.values():
        with pytest.raises(suites.Missing) as caught:
            benchmark.read(tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{benchmark.name} ({benchmark.title}) needs ")
        assert str(tmp_path / benchmark.folder) in message and benchmark.origin in message
        assert "://" in benchmark.origin or "huggingface.co/" in benchmark.origin


def test_rows_that_do_not_fit_are_named_and_the_others_are_read(tmp_path, film):
    files.perception_test(tmp_path / "perception_test", film)
    path = tmp_path / "perception_test/mc_question_val/validation-00000-of-00001.parquet"
    good = {"video_name": "v", "question_id": "1", "question": "Q?", "options": ["a", "b"], "answer_id": "0"}
    files.table(path, [good, good | {"question_id": "2", "answer_id": "7"}, good, good | {
        "question_id": "3", "answer_id": "x"}])
    items, errors = suites.BENCHMARKS["perception_test"].read(tmp_path)
    assert [item.id for item in items] == ["v_1"]
    beyond, twice, no_number = map(str, errors)
    assert "the right answer must be one of 2 options; got number 7" in beyond and "row 1" in beyond
    assert "ids must be unique; got 'v_1' twice" in twice and "row 3" in no_number


def test_a_limit_stops_reading(read, tmp_path, film):
    files.next_qa(tmp_path / "next_qa", film)
    assert len(suites.BENCHMARKS["next_qa"].read(tmp_path, limit=1).items) == 1


def test_suites_are_named_and_a_misspelt_name_is_answered():
    assert [one.name for one in suites.load("caption,video_point")] == ["cap_eval", "video_point"]
    assert suites.load(["short_video", "tomato"]) == suites.SUITES["short_video"]
    assert {len(suites.SUITES[name]) for name in ("short_video", "long_video")} == {6, 7}
    assert (len(suites.SUITES["image"]), len(suites.SUITES["multi_image"])) == (11, 3)
    for name, words in (("burst_vc", "burst_count"), ("mevis_valid", "server"), ("tap_vid", "every frame")):
        with pytest.raises(ValueError, match=f"got '{name}': .*{words}"):
            suites.load(name)
    with pytest.raises(ValueError, match="got 'short_vidio'; did you mean 'short_video'"):
        suites.load("short_vidio")


def test_published_averages_are_those_of_the_published_columns():
    for suite, wanted in suites.AVERAGES.items():
        columns = np.array([[np.nan if value is None else value for value in
                             one.published[one.metric.published]] for one in suites.SUITES[suite]], float)
        known = ~np.isnan(columns).any(axis=0)
        assert known.sum() >= 2
        np.testing.assert_allclose(columns.mean(axis=0)[known], np.array(wanted)[known], atol=0.35)


def malformed(rng):
    pieces = ["<points", ' coords="', "1 1 500 500", "A", "B.", "(C)", "yes", "Caption B", "12", '">', ";",
              "\n", "[1-2]", "Stated", "\ud83d", "There are none.", "total of", "0.5 1 100 200", "<tracks"]
    return "".join(pieces[n] for n in rng.integers(len(pieces), size=rng.integers(0, 12)))


def test_malformed_answers_to_any_benchmark_get_scores_between_0_and_1(read):
    rng = np.random.default_rng(0)
    loaded = [read(name) for name in cases.CASES]
    for number in range(2000):
        benchmark, items, _ = loaded[number % len(loaded)]
        if benchmark.metric is metrics.TRACKS and number > 500:
            continue   # masks of 60 frames
        row = benchmark.metric.each(items[number % len(items)], malformed(rng))
        assert all(0 <= value <= 1 for value in row.values()), benchmark.name
