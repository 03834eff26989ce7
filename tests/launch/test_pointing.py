"""A model that points by choosing visual tokens, in the commands: the same from a run and from its export."""

import json
import re
import shutil

import pytest
from PIL import Image

from data_pipelines.world import config as world_config
from data_pipelines.world import write as world_write
from launch import convert
from launch import evaluate
from launch import generate
from launch.evaluation import suite
from molmo2_jax import generate as generate_lib
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import grounded
from tests import test_generate
from tests.data_pipelines.suites import cases
from tests.data_pipelines.suites import test_benchmarks
from tests.launch import commands
from tests.launch.server import conftest as serving
from tests.serving import test_pointing

flags_as_before, start, film = commands.flags_as_before, commands.start, test_benchmarks.film
NEW, QUESTIONS = test_pointing.NEW, test_pointing.QUESTIONS[:2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(Hugging Face folder, work directory) of random weights that point often."""
    folder = tmp_path_factory.mktemp("model")
    hf_checkpoint.export_checkpoint(test_pointing.params_of(), test_pointing.CONFIG, test_generate.INPUTS,
                                    test_generate.tokenizer(), folder / "hf")
    assert start(convert.main, "import", f"--model={folder / 'hf'}", f"--output={folder / 'run'}") == 0
    return folder / "hf", folder / "run"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return test_generate.write_video(tmp_path_factory.mktemp("clip") / "a.mp4")


@pytest.fixture(scope="module")
def wanted(clip):
    return test_pointing.answerer().answer(test_generate.example(video=clip), QUESTIONS)


def numbers(points):
    return [(one["index"], one["id"], one["x"], one["y"]) for one in points]


@pytest.mark.slow(30)
def test_generate_answers_with_points_and_draws_them(made, clip, wanted, tmp_path, capsys):
    assert any("<|vit_loc:" in one.text for one in wanted)   # the choices; random weights write no id behind
    ask = [f"--video={clip}", f"--max_new_tokens={NEW}", *(f"--prompt={one}" for one in QUESTIONS)]
    for model, name in zip(made, ("a.png", "a.gif")):
        picture = tmp_path / name
        assert start(generate.main, f"--model={model}", *ask, "--json", f"--render={picture}") == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(one["text"], numbers(one["points"])) for one in found] == [
            (one.text, [(*point,) for point in one.points]) for one in wanted]
        assert Image.open(picture).size[0] > 50
    assert start(generate.main, f"--model={made[0]}", *ask, "--stream") == 0
    printed = capsys.readouterr().out
    assert all(one.text in printed for one in wanted)


@pytest.mark.slow(30)
def test_evaluate_scores_a_run_and_its_export_alike(made, tmp_path, capsys):
    data = world_write.write(tmp_path, world_config.quickstart_world(), 5, 6, "heldout", progress=False,
                             has_masks=True).parent
    scores = []
    for number, model in enumerate(made):
        output = tmp_path / f"{number}.json"
        assert start(evaluate.main, f"--model={model}", f"--data={data}", f"--output={output}",
                     f"--max_new_tokens={NEW}") == 0
        scores.append(json.loads(output.read_text())[str(data)])
    assert scores[0] == scores[1] and scores[0]["video_point_examples"] > 0
    assert "0 records left out" in capsys.readouterr().out


@pytest.mark.slow(30)
def test_a_suite_scores_choices_as_the_coordinates_they_mean(made, film, tmp_path, monkeypatch):
    names = ("pixmo_points", "video_point")
    for name in names:
        cases.write(name, tmp_path / "files" / name, film)

    def right(text, media, **fields):
        """Reads the answer that points to the cup of pixmo_points, at 0.4 of width and height."""
        if not media.is_video:
            text = grounded.format_points([(1, [(0.4, 0.4)])], "cups", cells=media.cells,
                                          image_of=lambda _: 0)
        return read_answer(text, media, **fields)

    read_answer = generate_lib.read_answer
    monkeypatch.setattr(generate_lib, "read_answer", right)
    output = tmp_path / "scores"
    assert start(evaluate.main, f"--model={made[0]}", f"--benchmarks={tmp_path / 'files'}",
                 f"--suite={','.join(names)}", f"--output={output}", "--rows=2", "--max_new_tokens=8") == 0
    results = json.loads((output / suite.RESULTS).read_text())["benchmarks"]
    assert results["pixmo_points"]["score"] == 1 and results["video_point"]["questions"] == 2
    stored = [json.loads(line)["answer"]
              for line in (output / "predictions/pixmo_points.jsonl").read_text().splitlines()]
    assert len(stored) == 2 and all(re.fullmatch(
        r'<points coords="1 1 (38|39|40|41)\d (38|39|40|41)\d">cups</point>', one) for one in stored), stored


@pytest.mark.slow(30)
def test_export_undoes_import_and_verify_passes(made, tmp_path, capsys):
    again = tmp_path / "again"
    assert start(convert.main, "export", f"--model={made[1]}", f"--output={again}") == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        assert (again / name).read_bytes() == (made[0] / name).read_bytes(), name
    capsys.readouterr()
    assert start(convert.main, "verify", f"--hf={again}", f"--against={made[1]}", "--nologits") == 0
    assert ", 0 FAIL, " in capsys.readouterr().out


@pytest.mark.slow(60)
def test_a_server_answers_about_a_video_with_points(made, clip, wanted, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    shutil.copy(clip, folder / "a.mp4")
    served = serving.start(folder, f"--model={made[1]}", "--buckets=6", "--max_tokens=512")
    try:
        for question, answer in zip(QUESTIONS, wanted):
            content = [serving.video(f"file://{folder / 'a.mp4'}"), serving.text(question)]
            found = served.ask(content, max_tokens=NEW).raise_for_status().json()
            assert found["choices"][0]["message"]["content"] == answer.text
            assert [(one["frame_time"], one["id"], one["x"], one["y"]) for one in found["molmo2"]["points"]
                    ] == [(*point,) for point in answer.points]
        assert served.metric("molmo2_compilations_total") == 0
    finally:
        assert serving.stop(served) == 0
