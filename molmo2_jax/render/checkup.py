"""The examination of data sets as one self-contained HTML page.

The page shows the same values as the JSON file of `launch.check` (docs/data.md), from which it is made.

h x w pixels of a picture.
"""

import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molmo2_jax.render import charts
from molmo2_jax.render import document

_MEASURES = {  # name in the JSON: (title, unit)
    "duration_seconds": ("Duration", "s"), "frame_rate": ("Frame rate", "frames/s"),
    "keyframe_seconds": ("Time between keyframes", "s"), "frames": ("Frames the model sees", ""),
    "tokens": ("Tokens", ""), "visual_tokens": ("Visual tokens", ""), "crops": ("Crops", "")}
_COLUMNS = ("min", "p10", "median", "mean", "p90", "max")
_STAGES = {"line": "line breaks the format", "media": "media cannot be read",
           "annotation": "annotations do not fit", "size": "does not fit a row",
           "not shown": "annotation left out"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A record of the sample: frames uint8[h, w, 3] with its points drawn, and what is asked and answered."""
    key: str
    texts: Sequence[str]
    frames: Sequence[np.ndarray]


def write(path, report: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> None:
    """Writes the page; it needs no other file and no network."""
    pathlib.Path(path).write_text(page(report, pictures), encoding="utf-8",
                                  errors="backslashreplace")  # names of files may be no text


def page(report: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]]) -> str:
    """Returns the HTML of a report, with `pictures` of each source by its name."""
    sources = report["sources"]
    records, examined = (sum(one[name] for one in sources) for name in ("records", "examined"))
    usable = sum(one["usable"] for one in sources)
    facts = {"records": number(records), "examined": number(examined), "usable": number(usable),
             "problems": number(sum(one["records"] for source in sources for one in source["problems"])),
             **{name: str(value) for name, value in report["settings"].items() if value is not None}}
    sections = [document.section("Sources", _overview(sources)),
                document.section("Cost of a batch", _batch(report.get("batch"))),
                *(document.section(source["name"], _source(source, pictures.get(source["name"], ())),
                                   f"source{place}") for place, source in enumerate(sources))]
    sampled = any(one["is_sampled"] for one in sources)
    summary = ("What training would make of these records."
               + (" Some sources were sampled: shares and statistics are of the examined records."
                  if sampled else ""))
    return document.html_of("Data check", summary, facts, sections)


def number(value: float | int | None) -> str:
    """Returns a number as the page shows it: integers whole, others with four digits."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def percent(share: float | None) -> str:
    """Returns a share of 1 as the page shows it."""
    return "–" if share is None else f"{100 * share:.2f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of HTML cells; the first of each row is its title."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(f"<tr><th>{first}</th>" + "".join(f"<td class=number>{cell}</td>" for cell in rest)
                    + "</tr>" for first, *rest in rows)
    return (f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'
            if rows else "")


def _overview(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [(f'<a href="#source{place}">{html.escape(one["name"])}</a>', number(one["records"]),
             number(one["examined"]),
             *(f"{number(one[name])}<small>{percent(one[name + '_share'])}</small>"
               for name in ("usable", "cut", "too_large")),
             number(one["core_seconds_per_record"])) for place, one in enumerate(sources)]
    return _table(("", "records", "examined", "usable", "cut", "too large", "core-seconds per record"), rows)


def _batch(batch: Mapping[str, Any] | None) -> str:
    if not batch:
        return ""
    rows = [("Examples in a row", number(batch["examples_per_row"])),
            (f"Examples in a batch of {number(batch['rows'])} rows", number(batch["examples"])),
            ("Core-seconds per example", number(batch["core_seconds_per_example"])),
            ("Core-seconds per batch", number(batch["core_seconds"])),
            ("Hosts", number(batch["hosts"])),
            *((f"Cores per host for steps of {html.escape(step)} s", number(cores))
              for step, cores in batch["cores_per_host"].items())]
    return _table(("", ""), rows)


def _source(source: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    how = (f"A sample of {number(source['examined'])} of {number(source['records'])} records."
           if source["is_sampled"] else f"All {number(source['records'])} records.")
    how += "".join(f" {title}: {_counts(source[name])}." for name, title in (
        ("media", "Media"), ("left_out", "Left out")) if source[name])
    parts = [f'<p class="legend">{how}</p>', _problems(source["problems"]), _measures(source),
             _kinds(source["annotations"]), _media(source), _cards(pictures)]
    return "".join(parts)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number(count)} {html.escape(_STAGES.get(name, name))}"
                     for name, count in counts.items())


def _block(title: str, body: str) -> str:
    return f"<h3>{html.escape(title)}</h3>{body}" if body else ""


def _problems(problems: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in problems:
        examples = "".join(f"<li><code>{html.escape(text)}</code></li>" for text in one["examples"])
        title = (f"<details><summary>{html.escape(one['rule'])}</summary><ul>{examples}</ul></details>"
                 f"<small>{html.escape(_STAGES.get(one['stage'], one['stage']))}</small>")
        rows.append((title, number(one["records"]), percent(one["share"])))
    return _block("Problems", _table(("", "records", "share"), rows)
                  or '<p class="legend">No problems were found.</p>')


def _measures(source: Mapping[str, Any]) -> str:
    rows, drawn = [], []
    for name, (title, unit) in _MEASURES.items():
        found = source[name]
        if found is None:
            continue
        title = f"{title}, {unit}" if unit else title
        rows.append((html.escape(title), *(number(found[column]) for column in ("count", *_COLUMNS))))
        drawn.append(_histogram(title, found))
    table = _table(("", "records", *_COLUMNS), rows)
    return _block("Sizes", table and f'{table}<div class="bins">{"".join(drawn)}</div>')


def _histogram(title: str, found: Mapping[str, Any]) -> str:
    bins = found["histogram"]
    return (f"<figure><figcaption>{html.escape(title)}</figcaption>"
            f"{charts.histogram_svg(bins['counts'], bins['edges'], title)}</figure>")


def _kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(f"{html.escape(kind)}<small>{html.escape(one['unit'])} in each</small>", number(one["records"]),
             number(one["amount"]["count"]), *(number(one["amount"][column]) for column in _COLUMNS))
            for kind, one in kinds.items()]
    return _block("Annotations", _table(("", "records", "annotations", *_COLUMNS), rows))


def _media(source: Mapping[str, Any]) -> str:
    sizes = _table(("", "media"), [(html.escape(size), number(count))
                                   for size, count in source["resolutions"].items()])
    reading = _table(
        ("", "records", "frames or images", "core-seconds", "per core-second"),
        [(html.escape(medium), number(one["records"]), number(one["pictures"]), number(one["core_seconds"]),
          number(one["pictures_per_core_second"])) for medium, one in source["reading"].items()])
    return _block("Resolutions, pixels", sizes) + _block("Reading media on this machine", reading)


def _cards(pictures: Sequence[Picture]) -> str:
    cards = []
    for one in pictures:
        frames = "".join(document.picture(frame, one.key) for frame in one.frames)
        texts = "".join(f"<li>{html.escape(text)}</li>" for text in one.texts)
        cards.append(f'<article><div class="frames">{frames}</div><p class="soft">{html.escape(one.key)}</p>'
                     f"<ul>{texts}</ul></article>")
    return _block("Some of the records", f'<div class="cards">{"".join(cards)}</div>' if cards else "")
