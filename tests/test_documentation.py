"""Files, folders, functions and links that the documentation names exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md",
                      *sorted((ROOT / "docs").glob("*.md"))]}
# Where shortened paths may start: `inputs/video.py` is molmo2_jax/inputs/video.py.
STARTS = ("", "molmo2_jax", "data_pipelines", "launch", "gin_configs", "benchmarks")
CODE = re.compile(r"[\w./-]*\w\.(?:py|gin|sh|md|toml|png)|[\w./-]*\w/")
# First parts of paths that runs and users make, and a name to avoid: a checkout has none of them.
ABSENT = ("runs", "data", "my_data", "checkpoints", "tensorboard", "evidence", "profile", "hosts",
          "pretrained", "media", "tokenizer", "programs", "remote_code", "predictions", "table.md",
          "config.gin", "utils.py")
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")
SYMBOLS = ("README.md", "docs/model.md", "docs/scores.md")   # pages whose tables name functions next to files


def quoted(text):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def paths(text):
    """Returns the paths of code, settings and folders in backquotes, without placeholders and runs."""
    return [one for one in quoted(text) if CODE.fullmatch(one) and one.split("/")[0] not in ("", "~", *ABSENT)
            and (not PLACEHOLDER.search(one) or find(one))]


def find(path, neighbours=()):
    """Returns what a path names: from the root, from STARTS, or in a folder that its neighbours are in."""
    folders = [*STARTS, *(str(pathlib.Path(start, pathlib.Path(other).parent))
                          for start in (*STARTS, "tests") for other in neighbours)]
    folders += [str(pathlib.Path(start, other)) for start in STARTS for other in neighbours
                if other.endswith("/")]
    found = [ROOT / folder / path for folder in folders]
    return [one for one in found if (one.is_dir() if path.endswith("/") else one.is_file())]


def missing(text):
    """Returns the paths of a page that do not exist. A bare file name belongs to a path of its paragraph."""
    lost = []
    for paragraph in re.split(r"\n\s*\n", text):
        named = paths(paragraph)
        lost += [one for one in named if not find(one, [other for other in named if "/" in other])]
    return lost


def undefined(text):
    """Returns the names in the last cells of tables that no file of the same cell defines."""
    lost = []
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        cell = row.rstrip("|").split("|")[-1]
        files = [file for one in paths(cell) if one.endswith(".py") for file in find(one, paths(cell))]
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        lost += [name for name in quoted(cell) if re.fullmatch(r"[A-Za-z_]\w+", name) and files
                 and not re.search(rf"^\s*(?:(?:def|class) {name}\b|{name}\b.*=)", source, re.MULTILINE)]
    return lost


def anchors(text):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page):
    assert not missing(PAGES[page])


@pytest.mark.parametrize(
    "name", ["sample_seconds", "from_batch", "_weight", "choose_tiling", "export_checkpoint"])
def test_frames_mask_weights_tiles_and_export_are_found_from_two_pages(name):
    assert all(f"`{name}`" in PAGES[page] for page in ("README.md", "docs/model.md"))


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    assert not broken_links(page, PAGES[page])


@pytest.mark.parametrize("page", SYMBOLS)
def test_functions_named_next_to_a_file_are_defined_in_it(page):
    assert not undefined(PAGES[page])


def test_what_does_not_exist_is_found():
    assert missing("See `inputs/packing.py`, `launch/tpu/` and `loss.py`.") == ["inputs/packing.py"]
    assert missing("In `molmo2_jax/attention/`: `tpu.py`.\n\nIn `hf/`: `tpu.py`.") == ["tpu.py"]
    assert undefined("| mask | `attention/tree_mask.py`, `from_batch`, `from_row` |") == ["from_row"]
    assert broken_links("docs/data.md", "[a](media.md#video) [b](media.md#film) [c](absent.md)") == [
        "media.md#film", "absent.md"]
    assert len({path for text in PAGES.values() for path in paths(text)}) > 100
    assert anchors("# A `b`, c\n## On a TPU\n") == {"a-b-c", "on-a-tpu"}
