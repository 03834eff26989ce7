"""The commands on a tiny random model: from a Hugging Face folder to answers, scores and another folder."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from data_pipelines import formats
from data_pipelines import masks
from data_pipelines import sources
from launch import convert
from launch import evaluate
from launch import generate
from launch.support import cli
from launch.support import questions
from launch.support import trained
from molmo2_jax import config as config_lib
from molmo2_jax import evaluate as evaluate_lib
from molmo2_jax import generate as generate_lib
from molmo2_jax import sharding
from molmo2_jax import state
from molmo2_jax import types
from molmo2_jax.hf import checkpoint as hf_checkpoint
from molmo2_jax.inputs import tokenizer as tokenizers
from molmo2_jax.model import molmo2
from tests.launch import commands

flags_as_before, start = commands.flags_as_before, commands.start

NANO = config_lib.nano()
MODEL = dataclasses.replace(
    NANO, vision=dataclasses.replace(NANO.vision, num_layers=1, width=32, mlp_width=64),
    connector=dataclasses.replace(NANO.connector, taps=(0,), num_heads=2, mlp_width=64),
    text=dataclasses.replace(NANO.text, num_layers=1, width=32, head_dim=8, mlp_width=64))
INPUTS = config_lib.InputConfig(max_crops=1, high_res_crops=1, max_frames=4, overlap_margins=(1, 1))
SIZE = (64, 48)
MEDIA = types.Media(sizes=(SIZE,))
ANNOTATIONS = [
    {"type": "points", "label": "red circle", "points": [{"x": 10.0, "y": 20.0}]},
    {"type": "choice", "question": "Which colour?", "options": ["red", "blue"], "answer": 1},
    {"type": "qa", "question": "Is there a circle?", "answer": "Yes."},
    {"type": "caption", "text": "A red circle."},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model in the Hugging Face format; its parameters are drawn without compiling anything."""
    model = molmo2.Molmo2(MODEL)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), state.smallest_batch(model)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32),
                          shapes["params"])
    tokenizer = tokenizers.train_small(["Point to the red circle."], MODEL.text.vocab_size)
    folder = tmp_path_factory.mktemp("model") / "hf"
    return hf_checkpoint.export_checkpoint(params, MODEL, INPUTS, tokenizer, folder)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", SIZE, (200, 30, 30)).save(folder / "a.png")
    disk = np.hypot(*(np.mgrid[:SIZE[1], :SIZE[0]] - np.array([[[20]], [[10]]]))) < 5
    record = {"images": ["a.png"], "annotations": ANNOTATIONS, "size": [SIZE],
              "masks": [{"id": 1} | masks.encode(disk)]}
    (folder / "annotations.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_generate_prints_an_answer_as_json_and_draws_it(model_folder, data_folder, tmp_path, capsys):
    image, picture = data_folder / "a.png", tmp_path / "points.png"
    assert start(generate.main, f"--model={model_folder}", f"--image={image}", "--json",
                 "--prompt=Point to the red circle.", "--max_new_tokens=4",
                 f"--render={picture}") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(answer["text"], str) and 1 <= answer["new_tokens"] <= 4
    assert answer["points"] == [] and set(answer["seconds"]) == {"read", "answer"}
    assert Image.open(picture).width >= SIZE[0]


@pytest.mark.slow(7)
def test_generate_answers_several_questions_and_streams_what_it_prints(model_folder, data_folder, capsys):
    arguments = [f"--model={model_folder}", f"--image={data_folder / 'a.png'}", "--max_new_tokens=9",
                 "--prompt=Point to the red circle.", "--prompt=Where?", "--temperature=2", "--top_k=50",
                 "--top_p=0.9", "--seed=3"]
    assert start(generate.main, *arguments) == 0
    plain = capsys.readouterr().out
    assert start(generate.main, *arguments, "--stream") == 0
    assert capsys.readouterr().out == plain
    first, second = plain.split("> Where?\n")
    assert first.startswith("> Point to the red circle.\n") and second
    stop = second[2:4]
    assert start(generate.main, *arguments, f"--stop={stop}") == 0
    assert capsys.readouterr().out.split("> Where?\n")[1] == second[:second.index(stop)] + "\n"


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=Where?"], "must be given (--help explains them); got no --model"),
    (["--model=MODEL", "--prompt=Where?", "--video=a.mp4", "--image=a.png"], "got both"),
    (["--model=/nowhere", "--prompt=Where?"], "got /nowhere"),
    (["--model=/nowhere", "--prompt=Where?", "--prompt= "], "got an empty one"),
    (["--model=MODEL", "--prompt=Where?", "--image=/nowhere.png"], "/nowhere.png"),
    (["--model=MODEL", "--prompt=Where?", "--video=/nowhere.mp4"], "/nowhere.mp4"),
    (["--model=/nowhere", "--prompt=Where?", "--image=/nowhere.png"], "/nowhere.png"),  # checked first
    (["--model=/nowhere", "--prompt=Where?", "--image=IMAGE", "--render=a.bmp"], "must end in one of .png"),
    (["--model=/nowhere", "--prompt=Where?", "--render=a.png"], "--render needs a --video or"),
    (["--model=/nowhere", "--prompt=Where?", "--image=IMAGE", "--render=IMAGE/a.png"], "a.png"),
    (["--model=MODEL", "--prompt=Where?", "--temperature=-1"], "temperature"),
    (["--model=MODEL", "--prompt=Where?", "--top_p=2"], "top_p must be in (0, 1]"),
    (["--model=MODEL", "--prompt=Where?", "--stop="], "stop must be"),
    (["--model=MODEL", "--prompt=Where?", "--stream", "--json"], "whole answers, give one of them; got both"),
])
def test_generate_answers_mistakes_with_one_sentence(arguments, words, model_folder, data_folder, capsys):
    arguments = [one.replace("MODEL", str(model_folder)).replace("IMAGE", str(data_folder / "a.png"))
                 for one in arguments]
    assert start(generate.main, *arguments) == cli.USER_ERROR
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and words in message


@pytest.fixture(scope="module")
def nan_folder(model_folder, tmp_path_factory):
    """The model with one weight that is NaN."""
    folder = tmp_path_factory.mktemp("nan") / "hf"
    shutil.copytree(model_folder, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.transformer.ln_f.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow(6)
@pytest.mark.parametrize("how", [[], ["--json"], ["--stream"], ["--temperature=1", "--top_k=5", "--seed=2"]])
def test_generate_says_that_logits_are_not_finite_and_which_weights(how, nan_folder, capsys):
    assert start(generate.main, f"--model={nan_folder}", "--prompt=Where?", "--max_new_tokens=3",
                 *how) == cli.USER_ERROR
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert "error: logits must be finite; got NaN or infinity, and so are the weights text/" in told.err


def test_evaluate_says_that_logits_are_not_finite_before_any_score(nan_folder, data_folder, tmp_path, capsys):
    assert start(evaluate.main, f"--model={nan_folder}", f"--data={data_folder}", "--max_new_tokens=4",
                 f"--output={tmp_path / 'scores.json'}") == cli.USER_ERROR
    told = capsys.readouterr()
    assert "_accuracy" not in told.out
    assert "error: logits must be finite" in told.err.splitlines()[-1]


def test_evaluate_prints_and_writes_scores(model_folder, data_folder, tmp_path, capsys):
    output, folder = tmp_path / "scores.json", tmp_path / "data"
    shutil.copytree(data_folder, folder)
    with open(folder / "annotations.jsonl", "a", encoding="utf-8") as lines:
        lines.write("not JSON\n")
    assert start(evaluate.main, f"--model={model_folder}", f"--data={folder}", "--rows=1",
                 "--max_new_tokens=4", f"--output={output}") == 0
    scores = json.loads(output.read_text())[str(folder)]
    assert scores["image_point_examples"] == scores["choice_examples"] == scores["qa_examples"] == 1
    assert scores["records_left_out"] == 1
    told = capsys.readouterr().out
    assert f"{folder}: 3 answers" in told and f"left out: {folder}/annotations.jsonl:2: record: must" in told


def without_masks(folder, target, number):
    """Copies a data folder and appends its record `number` times without masks."""
    shutil.copytree(folder, target)
    record = json.loads((target / "annotations.jsonl").read_text())
    bare = {name: value for name, value in record.items() if name != "masks"}
    lines = [json.dumps(one) + "\n" for one in [record] + [bare] * number]
    (target / "annotations.jsonl").write_text("".join(lines))
    return target


def test_what_a_score_cannot_judge_is_left_out_of_it_before_the_first_answer(
        model_folder, data_folder, tmp_path, capsys, monkeypatch):
    folder, output = without_masks(data_folder, tmp_path / "data", 2), tmp_path / "scores.json"
    answer, told = evaluate_lib._answer, []

    def first(*arguments):
        told.append(capsys.readouterr().out)
        return answer(*arguments)

    monkeypatch.setattr(evaluate_lib, "_answer", first)
    assert start(evaluate.main, f"--model={model_folder}", f"--data={folder}", "--rows=4",
                 "--max_new_tokens=4", f"--output={output}") == 0
    scores = json.loads(output.read_text())[str(folder)]
    assert (scores["image_point_examples"], scores["image_point_left_out"]) == (1, 2)
    assert scores["choice_examples"] == scores["qa_examples"] == 3 and scores["records_left_out"] == 0
    listed = [line for line in told[0].splitlines() if "left out of the score" in line]
    assert len(listed) == 2 and "annotations.jsonl:3: annotations[0] has no image_point score" in listed[1]
    assert "needs a mask of every object; got none of id 1" in listed[1]
    assert "image_point_left_out: 2 annotations" in told[0]


def write_other_folder(folder, annotations=ANNOTATIONS[2:3], content=None):
    folder.mkdir()
    if content is None:
        Image.new("RGB", SIZE).save(folder / "a.png")
    else:
        (folder / "a.png").write_bytes(content)
    (folder / "annotations.jsonl").write_text(json.dumps({"images": ["a.png"], "annotations": annotations}))
    return folder


def test_a_folder_that_fails_is_named_and_the_others_keep_their_scores(
        model_folder, data_folder, tmp_path, capsys):
    broken = write_other_folder(tmp_path / "broken", content=b"no picture")
    bare = write_other_folder(tmp_path / "bare", annotations=ANNOTATIONS[:1])
    output = tmp_path / "scores.json"
    assert start(evaluate.main, f"--model={model_folder}", f"--data={broken}", f"--data={bare}",
                 f"--data={data_folder}", "--max_new_tokens=4", f"--output={output}") == cli.USER_ERROR
    scores = json.loads(output.read_text())
    assert list(scores) == [str(data_folder)] and scores[str(data_folder)]["qa_examples"] == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {broken} has no scores: no example could be answered: annotations")
    assert f"; {bare} has no scores: no example could be answered: none has a question that can be" in last


def test_scores_of_folders_that_are_done_survive_whatever_a_later_one_does(
        model_folder, data_folder, tmp_path, monkeypatch):
    later, output = write_other_folder(tmp_path / "later"), tmp_path / "scores.json"
    real = evaluate_lib.evaluate

    def out_of_memory(*arguments, title, **options):
        if title == str(later):
            assert list(json.loads(output.read_text())) == [str(data_folder)]
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhile allocating")
        return real(*arguments, title=title, **options)

    monkeypatch.setattr(evaluate_lib, "evaluate", out_of_memory)
    ended = start(evaluate.main, f"--model={model_folder}", f"--data={data_folder}", f"--data={later}",
                  "--max_new_tokens=4", f"--output={output}")
    assert ended == f"error: {later} has no scores: RESOURCE_EXHAUSTED: out of memory while allocating"
    assert list(json.loads(output.read_text())) == [str(data_folder)]


def test_answers_with_logits_that_are_not_finite_do_not_pass_for_success(
        model_folder, data_folder, tmp_path, capsys, monkeypatch):
    answer = evaluate_lib._answer

    def one_of_two(answerer, batch, rows, ask):
        made = answer(answerer, batch, rows, ask)
        for found in made.values():
            if batch[0].index == 1:
                found[0] = dataclasses.replace(found[0], answer=dataclasses.replace(
                    found[0].answer, logprob=float("nan")))
        return made

    monkeypatch.setattr(evaluate_lib, "_answer", one_of_two)
    folder, output = without_masks(data_folder, tmp_path / "data", 1), tmp_path / "scores.json"
    assert start(evaluate.main, f"--model={model_folder}", f"--data={folder}", "--rows=1",
                 "--max_new_tokens=4", f"--output={output}") == cli.USER_ERROR
    assert json.loads(output.read_text())[str(folder)]["records_left_out"] == 1
    assert "1 records were skipped because their logits were not finite" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["--model=MODEL"], "--data must name"),
    (["--data=DATA"], "--model must name"),
    (["--data=DATA", "--model=MODEL", "--workdir=MODEL"], "are aliases here"),
    (["--data=/nowhere", "--model=MODEL"], "/nowhere/annotations.jsonl"),
    (["--data=DATA", "--workdir=/nowhere"], "got /nowhere"),
    (["--data=DATA", "--model=/nowhere", "--output=DATA"], "must not be a folder"),
])
def test_evaluate_answers_mistakes_with_one_sentence(arguments, words, model_folder, data_folder, capsys):
    arguments = [one.replace("MODEL", str(model_folder)).replace("DATA", str(data_folder))
                 for one in arguments]
    assert start(evaluate.main, *arguments) == cli.USER_ERROR
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_exporting_what_was_imported_changes_no_weight(model_folder, tmp_path, capsys):
    output = tmp_path / "again"
    assert start(convert.main, "export", f"--model={model_folder}", f"--output={output}") == 0
    assert f"wrote {output}: " in capsys.readouterr().out
    before, after = trained.load(model_folder), trained.load(output)
    assert (before.model, before.inputs) == (after.model, after.inputs)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_remote_code_goes_through_import_and_export(model_folder, tmp_path):
    released, workdir, output = (tmp_path / name for name in ("released", "run", "out"))
    shutil.copytree(model_folder, released)
    (released / "modeling_molmo2.py").write_text("# theirs\n")
    values = json.loads((released / "config.json").read_text())
    values["auto_map"] = {"AutoModelForImageTextToText": "modeling_molmo2.Molmo2"}
    (released / "config.json").write_text(json.dumps(values))
    assert start(convert.main, "import", f"--model={released}", f"--output={workdir}") == 0
    assert start(convert.main, "export", f"--model={workdir}", f"--output={output}") == 0
    assert (output / "modeling_molmo2.py").read_text() == "# theirs\n"
    assert json.loads((output / "config.json").read_text())["auto_map"] == values["auto_map"]
    given = tmp_path / "given"
    assert start(convert.main, "export", f"--model={model_folder}", f"--output={given}",
                 f"--code_from={released}") == 0
    assert (given / "modeling_molmo2.py").exists() and not list(model_folder.glob("*.py"))


def test_verify_prints_a_table_and_fails_by_its_exit_status(model_folder, tmp_path, capsys):
    arguments = [f"--against={model_folder}", "--nologits"]
    assert start(convert.main, "verify", f"--hf={model_folder}", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 ok, 0 FAIL, 1 skipped" and all(line[:2] in ("ok", "sk") for line in lines[:-1])
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "generation_config.json").unlink()
    assert start(convert.main, "verify", f"--hf={broken}", *arguments) == 1
    assert "FAIL    files" in capsys.readouterr().out


def test_a_model_is_loaded_onto_the_shards_of_a_mesh(model_folder):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4), jax.devices()[:4])
    whole, parts = trained.load(model_folder), trained.load(model_folder, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(parts.params))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(parts.params))


@pytest.mark.parametrize("arguments, words", [
    ([], "must be given one of the words export, import, assemble, verify; got none"),
    (["exprot"], "got exprot"),
    (["export"], "--model must be given"),
    (["import", "--model=MODEL"], "--output must be given"),
    (["import", "--model=ADAPTER", "--output=new"], "contains a PEFT adapter"),
    (["export", "--model=MODEL", "--output=MODEL"], "new or empty folder"),
    (["import", "--model=MODEL", "--output=MODEL"], "--output must be a new or empty folder"),
    (["verify"], "--hf must be given"),
    (["verify", "--hf=/nowhere"], "--hf must be a folder; got /nowhere"),
    (["assemble", "--text=MODEL", "--output=new"], "--vision must be given"),
    (["assemble", "--text=MODEL", "--vision=MODEL", "--output=new",
      "--gin_file=gin_configs/models/nano.gin"], "model_type of a tower must be one of"),
])
def test_convert_answers_mistakes_with_one_sentence(arguments, words, model_folder, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    arguments = [one.replace("MODEL", str(model_folder)).replace("ADAPTER", str(tmp_path))
                 for one in arguments]
    assert start(convert.main, *arguments) == cli.USER_ERROR
    assert words in capsys.readouterr().err


def answered(media, example, answers):
    """Returns the questions about an example together with these answers."""
    asked = questions.ask(example, media)
    return [evaluate_lib.Answered(example=example, media=media, question=question,
                                  answer=generate_lib.Answer(text=text))
            for question, text in zip(asked, answers, strict=True)]


def test_the_right_answers_get_full_scores_and_wrong_ones_none(data_folder):
    [example] = sources.examples(data_folder)
    branches = formats.to_branches(example, media=MEDIA, rng=np.random.default_rng(0),
                                   asking=formats.PLAIN)
    right = [branch.turns[-1] for branch in branches[:3]]
    scores = questions.score(answered(MEDIA, example, right))
    assert scores["image_point_f1"] == scores["choice_accuracy"] == scores["qa_accuracy"] == 1
    scores = questions.score(answered(MEDIA, example, ["nothing", "nothing", "nothing"]))
    assert scores["image_point_f1"] == scores["choice_accuracy"] == scores["qa_accuracy"] == 0


def test_captions_and_chats_are_not_asked(data_folder):
    [example] = sources.examples(data_folder)
    asked = questions.ask(example, MEDIA)
    assert [question.about.type for question in asked] == ["points", "choice", "qa"]
    [label] = {question.about.label.lower() for question in asked if hasattr(question.about, "label")}
    first = questions.ask(example, MEDIA, is_pretraining=True)[0]  # worded for a model of the first stage
    assert first.turns[0] in (f"pointing: {label}", f"point_count: {label}", f"count 65: {label}")
    assert all(isinstance(question, generate_lib.Question) for question in asked)
    assert not questions.ask(types.Example(annotations=(), images=("a.png",)), MEDIA)
