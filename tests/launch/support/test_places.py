import pytest

from launch import run
from launch.support import places
from launch.support import trained
from molmo2_jax import config

SFT = "gin_configs/runs/sft_8b.gin"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Simulates an installed package; the current folder is an empty one outside the repository."""
    monkeypatch.setattr(places, "IS_INSTALLED", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkout_is_the_base_of_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not places.IS_INSTALLED
    assert places.base() == places.SHIPPED == places.PACKAGES == run.ROOT
    assert (places.base() / SFT).is_file() and (places.base() / "launch/support/places.py").is_file()


def test_the_current_folder_is_the_base_of_an_installation(installed):
    assert places.base() == installed


def test_an_installation_finds_gin_files_and_what_they_include(installed):
    assert run.resolve([SFT]).model == config.molmo2_8b()


def test_own_gin_files_of_an_installation_win_and_include_those_that_ship(installed):
    own = installed / "gin_configs/models/nano.gin"
    own.parent.mkdir(parents=True)
    own.write_text((run.ROOT / "gin_configs/models/nano.gin").read_text()
                   + "config.TextConfig.num_layers = 3\n")
    (installed / "mine.gin").write_text("include 'gin_configs/runs/quickstart.gin'\n")
    assert run.resolve(["mine.gin"]).model.text.num_layers == 3


def test_a_missing_gin_file_of_an_installation_says_where_it_was_looked_for(installed):
    with pytest.raises(ValueError, match="gin files must exist") as caught:
        run.resolve(["gin_configs/nothing.gin"])
    assert str(installed) in str(caught.value) and str(run.ROOT) in str(caught.value)


def test_a_model_that_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.model("assets/nano") == str(run.ROOT / "assets/nano")
    assert trained.load("assets/nano").model.text.num_layers > 0


def test_paths_of_ones_own_are_left_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("runs/mine", "launch", "assets/nothing", "/assets/nano", "gs://bucket/assets/nano", ""):
        assert places.model(path) == path
    (tmp_path / "assets/nano").mkdir(parents=True)
    assert places.model("assets/nano") == "assets/nano"
