"""lmms-eval itself asks the server: its own scores of a small task are ours of the same answers.

lmms-eval asks for other versions of packages than ours, so it has an environment of its own. LMMS_EVAL is the
start of its command line, such as "/tmp/env/bin/python -m lmms_eval"; docs/serving.md says what it needs.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_pipelines import sources
from data_pipelines.scoring import suite
from data_pipelines.world import config as worlds
from data_pipelines.world import write
from launch.support import questions
from molmo2_jax import types
from tests.launch.server import conftest as serving

COMMAND = os.environ.get("LMMS_EVAL") or shutil.which("lmms-eval")
FRAMES = 8   # that lmms-eval asks for; the clips have fewer
KINDS = {   # of our scores: what lmms-eval takes out of an answer, in its own words
    "count": r"(\d+)\.?$",
    "choice": r"^([A-Z])\b",
}
TASK = """
task: drawn_{kind}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function drawn.videos
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 64, temperature: 0, do_sample: false}}
filter_list:
  - name: {kind}
    filter: [{{function: regex, regex_pattern: '{pattern}'}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def asked(server):
    """The questions about drawn clips by kind: (prompt, right answer, annotation, media, clip)."""
    world = dataclasses.replace(
        worlds.quickstart_world(), image_share=0.0, image_set_share=0.0, branches=(6, 6),
        annotations=(("count", 1.0), ("choice", 1.0)))
    write.write(server.folder / "drawn", world, 0, 8, "validation", has_masks=False, progress=False)
    found: dict[str, list] = {kind: [] for kind in KINDS}
    for example in sources.read_folder(str(server.folder / "drawn/validation"))[0]:
        media = types.Media(sizes=((1, 1),), seconds=np.zeros(1))
        for question in questions.ask(example, media):
            [kind], about = suite.kinds(question.about, media), question.about
            right = str(about.count) if kind == "count" else "ABCDEF"[about.answer]
            found[kind].append((question.turns[0], right, about, media, example.video))
    assert all(len(of_kind) >= 5 for of_kind in found.values())
    return found


@pytest.mark.slow(60)
@pytest.mark.skipif(not COMMAND, reason="LMMS_EVAL, the command of an environment with lmms-eval, is not set")
def test_the_scores_of_lmms_eval_are_ours_of_the_same_answers(server, asked, tmp_path):
    (tmp_path / "drawn.py").write_text("def videos(row):\n    return [row['video']]\n")
    for kind, pattern in KINDS.items():
        rows = [{"question": prompt, "answer": right, "video": clip}
                for prompt, right, _, _, clip in asked[kind]]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{kind}.parquet")
        (tmp_path / f"drawn_{kind}.yaml").write_text(
            TASK.format(kind=kind, pattern=pattern, file=tmp_path / f"{kind}.parquet"))
    before = server.metric("molmo2_answered_total")
    done = subprocess.run(
        [*shlex.split(COMMAND), "--model=openai", f"--tasks={','.join(f'drawn_{kind}' for kind in KINDS)}",
         f"--include_path={tmp_path}", f"--output_path={tmp_path / 'out'}", "--log_samples", "--batch_size=1",
         "--verbosity=DEBUG",   # otherwise it ends with 0 after an error
         f"--model_args=model_version=molmo2,base_url={server.url},api_key={serving.KEY},num_concurrent=4,"
         f"max_frames_num={FRAMES},pass_video_url=True"],
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())["results"]
    assert server.metric("molmo2_answered_total") - before == sum(map(len, asked.values()))
    for kind, of_kind in asked.items():
        [samples] = (tmp_path / "out").rglob(f"*samples_drawn_{kind}.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers = [server.text([serving.video(f"file://{clip}"), serving.text(prompt)], max_tokens=64,
                               media_io_kwargs={"video": {"num_frames": FRAMES}})
                   for prompt, _, _, _, clip in of_kind]   # the samples have only what the filter took out
        assert [row["filtered_resps"] for row in rows] == [
            re.findall(KINDS[kind], answer)[0] for answer in answers]
        ours = suite.score([suite.Answered(annotation=about, answer=answer, media=media)
                            for (_, _, about, media, _), answer in zip(of_kind, answers, strict=True)])
        score = results[f"drawn_{kind}"][f"exact_match,{kind}"]
        assert score == pytest.approx(ours[f"{kind}_accuracy"]) and 0 < score < 1
