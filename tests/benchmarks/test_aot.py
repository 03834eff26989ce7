"""The tables of compiled programs are as their generators write them from what was compiled."""

import json
import pathlib

import pytest

from benchmarks import aot
from benchmarks import aot_generate

FOLDER = pathlib.Path(aot.__file__).parent


@pytest.mark.parametrize("benchmark, name", [(aot, "aot"), (aot_generate, "aot_generate")])
def test_a_page_is_the_table_of_its_lines(benchmark, name):
    lines = map(json.loads, (FOLDER / f"{name}.jsonl").read_text().splitlines())
    known = {benchmark.arm_of(line): line for line in lines}
    assert benchmark.table(known) == (FOLDER / f"{name}.md").read_text()


def test_every_compiled_step_has_both_bounds_and_the_strict_one_is_stricter():
    for line in map(json.loads, (FOLDER / "aot.jsonl").read_text().splitlines()):
        if "report" in line:
            bound, report, arm = aot.strict(line), line["report"], aot.arm_of(line)
            assert bound.apart >= bound.seconds > report["seconds_bound"], arm
            assert bound.mfu < report["mfu_bound"] and bound.flops > report["hardware_flops"], arm
