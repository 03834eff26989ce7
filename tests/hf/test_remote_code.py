"""Remote code is copied with the model: into the work directory, and from there into exported folders."""

import json

import pytest

from molmo2_jax import config as config_lib
from molmo2_jax.hf import checkpoint
from molmo2_jax.hf import remote_code
from tests import packs

AUTO_MAPS = {
    "config.json": {"AutoConfig": "configuration_molmo2.Molmo2Config",
                    "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration"},
    "preprocessor_config.json": {"AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor"},
    "video_preprocessor_config.json": {"AutoVideoProcessor": "video_processing_molmo2.VideoProcessor"},
    "processor_config.json": {"AutoProcessor": "processing_molmo2.Molmo2Processor"},
    "tokenizer_config.json": {"AutoTokenizer": ["somebody/tokenizers--slow.Slow", None]}}
FILES = ("configuration_molmo2.py", "modeling_molmo2.py", "image_processing_molmo2.py",
         "video_processing_molmo2.py", "processing_molmo2.py", "helpers.py")
CONFIG = packs.random_config("qwen3", 0)


def export(folder, **options):
    return checkpoint.export_checkpoint(packs.random_params(CONFIG), CONFIG, config_lib.InputConfig(), None,
                                        folder, **options)


@pytest.fixture
def released(tmp_path):
    """Returns a folder with remote code like the released ones."""
    folder = export(tmp_path / "released")
    for name in FILES:
        (folder / name).write_text(f"# {name}\n")
    for name, auto_map in AUTO_MAPS.items():
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(values | {"auto_map": auto_map}))
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def assert_carries_the_code(folder):
    assert sorted(path.name for path in folder.glob("*.py")) == sorted(FILES)
    for name in FILES:
        assert (folder / name).read_text() == f"# {name}\n"
    assert {name: read(folder, name)["auto_map"] for name in AUTO_MAPS} == AUTO_MAPS


def test_files_and_every_auto_map_are_copied(released, tmp_path):
    folder = export(tmp_path / "out", code_from=released)
    assert_carries_the_code(folder)
    assert read(folder, "config.json")["model_type"] == "molmo2"
    checkpoint.import_checkpoint(folder)


def test_they_are_kept_in_a_work_directory(released, tmp_path):
    kept = tmp_path / "run" / remote_code.NAME
    remote_code.write(remote_code.read(released), kept)
    assert_carries_the_code(export(tmp_path / "out", code_from=kept))


def test_files_without_an_auto_map_are_not_copied(tmp_path):
    source = export(tmp_path / "source")
    (source / "modeling_molmo2.py").write_text("# theirs\n")
    assert not list(export(tmp_path / "out", code_from=source).glob("*.py"))
    remote_code.write(remote_code.read(source), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_an_auto_map_without_its_file_is_refused_before_anything_is_written(released, tmp_path):
    (released / "processing_molmo2.py").unlink()
    with pytest.raises(ValueError, match="auto_map must name files .* lacks processing_molmo2"):
        export(tmp_path / "out", code_from=released)
    assert not (tmp_path / "out").exists()
