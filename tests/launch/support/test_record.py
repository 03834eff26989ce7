import dataclasses

import pytest

from launch.support import record
from molmo2_jax import types


def test_objects_of_one_class_get_a_scope_each():
    branches = (types.Branch(turns=("a",), weight=types.LossWeight(scale=0.5)),
                types.Branch(turns=("b", "c"), weight=types.LossWeight(scale=2.0)))
    lines = record.gin_text(Holder(branches=branches)).splitlines()
    assert ("test_record.Holder.branches = "
            "(@branches_0/types.Branch(), @branches_1/types.Branch())") in lines
    assert "branches_1/types.Branch.turns = ('b', 'c')" in lines
    assert "branches_0_weight/types.LossWeight.scale = 0.5" in lines
    assert "branches_1_weight/types.LossWeight.scale = 2.0" in lines


def test_a_shared_object_is_written_once():
    branch = types.Branch(turns=("a",))
    lines = record.gin_text(Holder(branches=(branch, branch))).splitlines()
    assert "test_record.Holder.branches = (@types.Branch(), @types.Branch())" in lines
    assert lines.count("types.Branch.turns = ('a',)") == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1], {1}, len])
def test_values_without_a_gin_spelling_are_refused(value):
    with pytest.raises(ValueError, match="got "):
        record.gin_text(Holder(branches=(value,)))


def test_saving_the_same_record_again_changes_nothing(tmp_path):
    assert record.save(tmp_path, "a = 1\n") == []
    assert record.save(tmp_path, "a = 1\n") == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.gin"]


def test_a_replaced_record_is_kept_and_its_differences_returned(tmp_path):
    record.save(tmp_path, "a = 1\nb = 2\n")
    assert record.save(tmp_path, "a = 1\nb = 3\n") == ["- b = 2", "+ b = 3"]
    record.save(tmp_path, "a = 4\nb = 3\n")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"config.gin": "a = 4\nb = 3\n", "config.gin.1": "a = 1\nb = 2\n",
                     "config.gin.2": "a = 1\nb = 3\n"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    branches: tuple
