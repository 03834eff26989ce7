"""The rows that a run trains on, with the records behind them and what the limits of a row left out.

T tokens of a row.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import formats
from data_pipelines import pipeline
from data_pipelines import tasks
from data_pipelines.doctor import examination
from data_pipelines.doctor import thumbnails
from data_pipelines.stream import ledger
from data_pipelines.stream import preparation
from data_pipelines.stream import rows as stream_rows
from molmo2_jax import config
from molmo2_jax import types
from molmo2_jax.inputs import media as media_lib
from molmo2_jax.inputs import rows as rows_lib
from molmo2_jax.inputs import tokenizer as tokenizers

INVISIBLE = "nothing of it is visible in the frames shown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """An example of a row.

    tokens: in the row; whole_tokens: if rows had no limit.
    left_out: (text, reason) of annotations, branches and ends of branches that are not in the row.
    """
    key: str
    source: str
    annotations: int
    branches: int
    tokens: int
    whole_tokens: int
    left_out: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows, the examples of each in the order of the row, and records that were skipped on the way."""
    batch: types.Batch
    members: tuple[tuple[Member, ...], ...]
    skipped: tuple[ledger.Note, ...] = ()


class _Skips(ledger.Reporter):
    """Keeps skipped records; those met twice once."""

    def __init__(self):
        super().__init__()
        self.notes: dict[tuple[str, str], ledger.Note] = {}

    def report(self, note: ledger.Note) -> None:
        self.notes.setdefault((note.task, note.key), note)


def first_rows(data: pipeline.DataConfig, model: config.Molmo2Config, inputs: config.InputConfig,
               tokenizer: tokenizers.Tokenizer, number: int) -> Packed:
    """Returns the first `number` rows of the first batch that a run trains on, or all if it has fewer.

    Raises:
      ValueError: see pipeline.make_iterator.
    """
    batches = pipeline.make_dataset(data, model, inputs, tokenizer)
    skips, notes, rows = _Skips(), [], []
    for position in batches.first_positions().values():
        missing = number - len(notes)
        if missing <= 0:
            break
        watched: list[tuple[ledger.Note, ...]] = []
        setting = batches.setting()
        setting = dataclasses.replace(setting, rows=min(setting.rows, missing), watch=watched.append,
                                      reporter=skips)
        with contextlib.closing(stream_rows.Stream(setting, position)) as stream:
            rows.append(next(stream))
        notes += watched[-setting.rows:]  # a restart after the death of a worker repeats rows
    batch = rows_lib.stack(rows)
    members = tuple(tuple(_member(note, int(np.sum(batch.example[row] == place)), batches.preparer)
                          for place, note in enumerate(of_row)) for row, of_row in enumerate(notes))
    return Packed(batch=batch, members=members, skipped=tuple(skips.notes.values()))


def _member(note: ledger.Note, tokens: int, preparer: preparation.Preparer) -> Member:
    """Returns what a row holds of an example; only one that is not whole is read once more."""
    found = Member(key=note.key, source=note.task, annotations=note.annotations, branches=note.branches,
                   tokens=tokens, whole_tokens=tokens)
    if note.branches == note.annotations and not note.is_cut:
        return found
    dataset, index, epoch = preparer.order(note.number)
    settings = examination.Settings(model=preparer.model, inputs=preparer.inputs,
                                    tokenizer=preparer.tokenizer, asking=preparer.asking)
    whole, dropped = _whole(preparer.sources[dataset][index], settings, preparer.members[dataset],
                            preparation.generator(index, epoch))
    return _with_losses(found, whole, dropped, preparer.max_tokens, preparer.tokenizer)


def of_record(example: types.Example, settings: examination.Settings, member: tasks.Member,
              index: int) -> Packed:
    """Returns a record alone in a row, as training sees it the first time: `index` in its data set.

    The row has settings.shape, or exactly the size of the record without one.

    Raises:
      preparation.Refused: (a ValueError) training would leave the record out.
    """
    whole, dropped = _whole(example, settings, member, preparation.generator(index, 0))
    limit, kept = settings.shape, whole
    if limit is not None and len(whole.tokens) > limit.T:
        kept = preparation.prepare(example, settings.model, settings.inputs, settings.tokenizer,
                                   preparation.generator(index, 0), asking=settings.asking,
                                   max_tokens=limit.T, weight=member.weight,
                                   high_res_share=member.high_res_share, point_modes=member.point_modes)
    shape = limit or types.RowShape(T=len(kept.tokens), M=len(kept.patches), R=len(kept.pooled),
                                    W=max(kept.pooled.shape[1], 1))
    try:
        batch = rows_lib.join_for(settings.model, [kept], shape)
    except ValueError as error:
        raise preparation.Refused(ledger.SIZE, error) from error
    found = Member(key=example.key, source=example.source, annotations=len(example.annotations),
                   branches=preparation.num_annotations(kept, example), tokens=len(kept.tokens),
                   whole_tokens=len(whole.tokens))
    found = _with_losses(found, whole, dropped, shape.T, settings.tokenizer)
    return Packed(batch=batch, members=((found,),))


def _whole(example: types.Example, settings: examination.Settings, member: tasks.Member,
           rng: np.random.Generator) -> tuple[types.Sequence, tuple[str, ...]]:
    """Returns the sequence of an example without limit, and its annotations of which nothing is visible.

    Raises:
      preparation.Refused: training would leave the record out.
    """
    with preparation.refusing(ledger.MEDIA):
        crops, media = media_lib.see(example, settings.model, settings.inputs, settings.tokenizer, rng=rng,
                                     high_res=member.high_res_share if settings.asking.train else 0.0)
    whole = preparation.compose(example, crops, media, settings.tokenizer, rng, asking=settings.asking,
                                weight=member.weight, point_modes=member.point_modes)
    invisible = formats.format_example(example, media=media, rng=np.random.default_rng(0),
                                       asking=formats.PLAIN).dropped
    return whole, tuple(thumbnails.describe(example.annotations[place]) for place in invisible)


def _with_losses(found: Member, whole: types.Sequence, invisible: Sequence[str], limit: int,
                 tokenizer: tokenizers.Tokenizer) -> Member:
    """Returns the member with what a row of `limit` tokens does not hold of it."""
    left_out = [(text, INVISIBLE) for text in invisible]
    for branch in range(int(whole.branch.max(initial=-1)) + 1):
        place = np.flatnonzero(whole.branch == branch)
        # A branch of which nothing is kept was dropped, also the part before its first loss token.
        kept = max(0, min(int(place[-1]) + 1, found.tokens) - int(place[0]))
        if kept == len(place):
            continue
        text = tokenizer.spell(whole.tokens[place[kept:]])
        if kept:
            reason = (f"a row ends at token {limit:,}: {len(place) - kept:,} of the {len(place):,} tokens of "
                      f"branch {branch}")
        else:
            reason = f"branch {branch}, whose first learnt token would be at {limit:,} or later"
        left_out.append((text, reason))
    if int(whole.branch.max(initial=-1)) < 0 and found.tokens < len(whole.tokens):
        left_out.append((tokenizer.spell(whole.tokens[found.tokens:]), f"a row ends at token {limit:,}: "
                         f"{len(whole.tokens) - found.tokens:,} of {len(whole.tokens):,} tokens"))
    return dataclasses.replace(found, whole_tokens=len(whole.tokens), left_out=tuple(left_out))
