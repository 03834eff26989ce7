"""A judge of captions behind an OpenAI-compatible endpoint, whose answers are recorded.

A judgement is asked for once: what the record holds is not asked again. The record has the format of
scoring.statements.recorded, so that it can be given to others with the answers.

Source of the steps: paper, section 4 (Molmo2-CapEval); the wording is our own.
"""

import functools
import http.client
import json
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from data_pipelines.scoring import statements
from data_pipelines.suites import predictions

KEY = "OPENAI_API_KEY"
PUBLISHED = "gpt-4.1-2025-04-14"     # the judge of published figures
ATTEMPTS, FIRST_WAIT, LONGEST = 6, 1.0, 600.0   # waits between attempts double; seconds

_FACTS = """List everything that the following description of a video says, as statements that can be
understood on their own: no pronouns, no references to other statements, nothing added.

Description:
{caption}"""
_SPLIT = """Split the following statements into atomic ones, each with one single fact. Write one line per
atomic statement, as

statement | category

where the category is one of: {categories}. Write nothing else.

Statements:
{facts}"""
_CHECK = """Here is a description of a video.

Description:
{caption}

For each of the numbered statements below, say whether the description states it. Write one line per
statement, in their order: its number, a dot, and either "Stated" or "Not Stated". Write nothing else.

Statements:
{listed}"""
_CHOOSE = """Here is a description of a video.

Description:
{caption}

Answer the following question about the video by the description alone. Write nothing but the line of the
right option.

Question:
{question}"""

Ask = Callable[[str], str]   # prompt -> the judge's answer


class JudgeError(ValueError):
    """The judge cannot be reached or does not answer; what it has judged is recorded."""


def endpoint(url: str, model: str = PUBLISHED, record: str | os.PathLike | None = None) -> statements.Judge:
    """Returns the judge `model` at an endpoint, with the judgements of `record`, to which new ones are added.

    Raises:
      ValueError: the record cannot be read.
    """
    return recording(functools.partial(complete, url, model), record)


def recording(ask: Ask, record: str | os.PathLike | None) -> statements.Judge:
    """Returns the judge that `ask` is, with a record."""
    path = pathlib.Path(record) if record else None
    known = statements.read_record(path) if path and path.exists() else statements.Record({}, {}, {})
    splits, checks, choices = known

    def keep(value: dict) -> None:
        if path:
            predictions.append_lines(path, json.dumps(value, ensure_ascii=False) + "\n")

    def split(caption: str) -> list[statements.Statement]:
        if caption not in splits:
            facts = ask(_FACTS.format(caption=caption))
            splits[caption] = ask(_SPLIT.format(categories=", ".join(statements.CATEGORIES), facts=facts))
            keep({"caption": caption, "split": splits[caption]})
        return statements.read_statements(splits[caption])

    def check(listed: Sequence[str], caption: str) -> statements.Verdicts:
        key = tuple(listed), caption
        if key not in checks:
            numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(listed, 1))
            checks[key] = ask(_CHECK.format(caption=caption, listed=numbered))
            keep({"statements": list(listed), "caption": caption, "check": checks[key]})
        return statements.read_verdicts(checks[key], len(listed))

    def choose(question: str, caption: str) -> str:
        if (question, caption) not in choices:
            choices[question, caption] = ask(_CHOOSE.format(caption=caption, question=question))
            keep({"question": question, "caption": caption, "choose": choices[question, caption]})
        return choices[question, caption]

    return statements.Judge(split=split, check=check, choose=choose)


def complete(url: str, model: str, prompt: str) -> str:
    """Returns the answer of a model to one message, at temperature 0.

    Raises:
      JudgeError: there is none after ATTEMPTS attempts, or the endpoint refuses the request.
    """
    body = json.dumps({"model": model, "temperature": 0,
                       "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    why = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=LONGEST) as answer:
                return json.loads(answer.read())["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            why = f"status {error.code}: {error.read(200).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
    raise JudgeError(f"the judge at {url} must answer; got {why}. Run the command again to go on")
