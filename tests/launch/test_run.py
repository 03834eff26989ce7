import re

import pytest

from launch import run
from launch.support import record
from molmo2_jax import config
from molmo2_jax import optim

NANO = "gin_configs/models/nano.gin"
PRESETS = ("nano", "molmo2_4b", "molmo2_8b", "molmo2_o_7b")


def rejected(*bindings, files=(NANO,)):
    """Returns the message with which resolve rejects the bindings."""
    with pytest.raises(ValueError) as caught:
        run.resolve(files, bindings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", PRESETS)
def test_model_files_equal_the_presets_in_python(name):
    assert run.resolve([f"gin_configs/models/{name}.gin"]).model == getattr(config, name)()


@pytest.mark.parametrize("name", PRESETS)
def test_the_record_resolves_to_an_equal_value(name, tmp_path):
    resolved = run.resolve([f"gin_configs/models/{name}.gin"],
                           ["run.RunConfig.inputs = @config.InputConfig()",
                            "config.InputConfig.max_frames = 16",
                            "config.TextConfig.norm_eps = 1e-5"])
    record.save(tmp_path, record.gin_text(resolved))
    again = run.resolve([tmp_path / record.NAME])
    assert again == resolved
    assert (again.inputs.max_frames, again.model.text.norm_eps) == (16, 1e-5)


def test_objects_of_one_class_are_told_apart_by_scopes(tmp_path):
    resolved = run.resolve([NANO], [
        "run.RunConfig.optim = @optim.OptimConfig()",
        "optim.OptimConfig.vit = @vit/optim.Tower()",
        "optim.OptimConfig.llm = @llm/optim.Tower()",
        "vit/optim.Tower.lr = 0.5", "llm/optim.Tower.lr = 0.25", "optim.Tower.warmup = 7"])
    assert resolved.optim.vit == optim.Tower(lr=0.5, warmup=7)
    assert resolved.optim.llm == optim.Tower(lr=0.25, warmup=7)
    record.save(tmp_path, record.gin_text(resolved))
    assert run.resolve([tmp_path / record.NAME]) == resolved


def test_later_bindings_win_over_files_and_earlier_bindings():
    resolved = run.resolve([NANO], ["config.TextConfig.num_layers = 2",
                                    "config.TextConfig.num_layers = 9"])
    assert resolved.model.text.num_layers == 9


def test_gin_files_may_have_byte_order_marks_also_where_they_are_included(tmp_path):
    inner, outer = tmp_path / "inner.gin", tmp_path / "outer.gin"
    text = (run.ROOT / NANO).read_text(encoding="utf-8") + "config.TextConfig.num_layers = 9  # épais\n"
    inner.write_bytes(text.encode("utf-8-sig"))
    outer.write_bytes(f"include '{inner}'\r\n".encode("utf-8-sig"))
    assert run.resolve([outer]).model.text.num_layers == 9


@pytest.mark.parametrize("encoding, words", [
    ("utf-16", "probably UTF-16"), ("cp1252", "byte 0xe9 at offset")])
def test_gin_files_of_other_encodings_are_refused(tmp_path, encoding, words):
    inner, outer = tmp_path / "inner.gin", tmp_path / "outer.gin"
    inner.write_bytes("# épais\n".encode(encoding))
    outer.write_text(f"include '{inner}'\n")
    for path in (inner, outer):
        message = rejected(files=(path,))
        assert f"{inner}: text must be UTF-8" in message and words in message


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    run_file = tmp_path / "mine.gin"
    run_file.write_text(f"include '{NANO}'\n")
    monkeypatch.chdir(tmp_path)
    assert run.resolve([run_file]).model == config.nano()


def test_an_ablation_needs_an_include_and_a_line(tmp_path):
    ablation = tmp_path / "pool.gin"
    ablation.write_text(f"include '{NANO}'\nconfig.ConnectorConfig.video_window = (4, 4)\n")
    run.resolve([NANO])  # registers the names, as includes do
    assert run.resolve([ablation]).model.connector.video_window == (4, 4)


def test_one_resolve_leaves_nothing_behind_for_the_next():
    run.resolve([NANO], ["config.TextConfig.num_layers = 2"])
    rejected("config.TextConfig.num_layers = 'two'")
    assert run.resolve([NANO]).model == config.nano()


def test_macros_are_replaced_before_types_are_checked():
    assert run.resolve([NANO], ["LAYERS = 5", "config.TextConfig.num_layers = %LAYERS"]
                       ).model.text.num_layers == 5
    assert "config.TextConfig.num_layers must be int; got '5'" in rejected(
        "LAYERS = '5'", "config.TextConfig.num_layers = %LAYERS")


@pytest.mark.parametrize("binding, message", [
    ("config.VisionConfig.width = '64'", "config.VisionConfig.width must be int; got '64'"),
    ("config.VisionConfig.width = 64.0", "config.VisionConfig.width must be int; got 64.0"),
    ("config.VisionConfig.width = True", "config.VisionConfig.width must be int; got True"),
    ("config.VisionConfig.width = None", "config.VisionConfig.width must be int; got None"),
    ("config.TextConfig.tied_head = 1", "config.TextConfig.tied_head must be bool; got 1"),
    ("config.TextConfig.rope_theta = '1e6'", "rope_theta must be float; got '1e6'"),
    ("config.TextConfig.init_std = '0'", "init_std must be float or None; got '0'"),
    ("config.TextConfig.qk_norm = 'qwen'", "qk_norm must be 'qwen3' or 'olmo'; got 'qwen'"),
    ("config.ConnectorConfig.video_window = [3, 3]",
     "video_window must be tuple[int, int]; got [3, 3] (a list; write (3, 3))"),
    ("config.ConnectorConfig.video_window = (3, 3, 3)",
     "video_window must be tuple[int, int]; got (3, 3, 3)"),
    ("config.ConnectorConfig.taps = (1, 'x')", "taps must be tuple[int, ...]; got (1, 'x')"),
    ("config.Molmo2Config.text = @config.VisionConfig()",
     "config.Molmo2Config.text must be TextConfig; got @config.VisionConfig()"),
    ("config.Molmo2Config.text = @config.TextConfig",
     "(the class; write @config.TextConfig() for an object)"),
    ("config.Molmo2Config.text = @config.nano()", "text must be TextConfig; got @config.nano()"),
])
def test_wrong_types_are_named_with_rule_and_value(binding, message):
    assert message in rejected(binding)


def test_all_wrong_types_come_in_one_message():
    message = rejected("config.VisionConfig.width = '64'", "config.TextConfig.tied_head = 1")
    assert "config.VisionConfig.width" in message and "config.TextConfig.tied_head" in message


def test_rules_of_the_dataclasses_are_reported_with_their_class():
    message = rejected("config.TextConfig.num_heads = 3")
    assert message == "num_heads must be a multiple of num_kv_heads; got (3, 2) (in TextConfig)"


@pytest.mark.parametrize("binding, name", [
    ("vido/config.VisionConfig.width = 32", "vido/config.VisionConfig.width"),
    ("config.YarnConfig.factor = 2.0", "config.YarnConfig.factor"),
    ("config.InputConfig.max_frames = 3", "config.InputConfig.max_frames"),
    ("UNUSED = 3", "UNUSED"),
])
def test_bindings_that_nobody_reads_are_rejected(binding, name):
    assert f"nothing read {name} (" in rejected(binding)


def test_a_binding_hidden_by_every_scope_is_rejected():
    message = rejected("config.Molmo2Config.text = @a/config.TextConfig()",
                       "a/config.TextConfig.width = 96")
    assert "nothing read config.TextConfig.width (" in message


@pytest.mark.parametrize("binding, message", [
    ("config.VisionConfig.widht = 3", "doesn't have a parameter named 'widht'"),
    ("config.VisonConfig.width = 3", "molmo2_jax.config has no attribute VisonConfig"),
    ("confg.VisionConfig.width = 3", "'confg' was not provided by an import"),
    ("config.TextConfig.width = %WIDTH", "No bindings specified for 'WIDTH'"),
    ("config.TextConfig.width =", "config.TextConfig.width ="),
    ("config.TextConfig.width", "Couldn't parse statement"),
    ("config.TextConfig.width = (3", "EOF in multi-line statement"),
    ("config.Molmo2Config.text = %gin.REQUIRED", "Molmo2Config.text"),
    ("from molmo2_jax import nowhere", "nowhere"),
])
def test_what_does_not_parse_is_reported_in_one_line(binding, message):
    assert message in rejected(binding)


def test_required_values_that_are_not_set_are_named():
    assert rejected(files=()) == "RunConfig has fields that must be set: 'model'"
    message = rejected("run.RunConfig.model = @config.Molmo2Config()", files=())
    assert message == "Molmo2Config has fields that must be set: 'vision', 'connector', and 'text'"


def test_missing_files_are_named_with_the_file_that_includes_them(tmp_path):
    assert rejected(files=["nowhere.gin"]).endswith("got nowhere.gin")
    outer = tmp_path / "outer.gin"
    outer.write_text("include 'gin_configs/nowhere.gin'\n")
    assert rejected(files=[outer]).endswith(
        f"got gin_configs/nowhere.gin (included by {outer})")


def test_a_file_that_includes_itself_is_refused(tmp_path):
    loop = tmp_path / "loop.gin"
    loop.write_text(f"include '{loop}'\n")
    assert "must not include itself" in rejected(files=[loop])


def test_the_library_is_free_of_gin():
    files = [path for folder in ("molmo2_jax", "data_pipelines")
             for path in (run.ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    assert not [path for path in files
                if re.search(r"^\s*(import|from) gin\b", path.read_text(), flags=re.MULTILINE)]
