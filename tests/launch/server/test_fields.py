"""Bodies of requests: those that clients send, what is refused, and what is ignored and said to be."""

import hypothesis
import pytest
from hypothesis import strategies

from launch.server import errors
from launch.server import fields

MODEL = "molmo2"
PNG = "data:image/png;base64,AAAA"


def read(content="What?", **more):
    return fields.read({"model": MODEL, "messages": [{"role": "user", "content": content}]} | more, MODEL)


def refused(content="What?", **more):
    with pytest.raises(errors.Refused) as caught:
        read(content, **more)
    return caught.value


def picture(url=PNG, **inside):
    return {"type": "image_url", "image_url": {"url": url} | inside}


def words(text):
    return {"type": "text", "text": text}


def test_the_defaults_are_greedy_and_two_thousand_tokens():
    wanted = read()
    assert wanted.sampling is None and wanted.max_new_tokens == 2048 and not wanted.is_stream
    assert wanted.turns == ("What?",) and wanted.parts == wanted.stop == wanted.ignored == ()


def test_max_completion_tokens_wins_and_large_numbers_are_no_mistake():
    assert read(max_tokens=5, max_completion_tokens=7).max_new_tokens == 7
    assert read(max_tokens=16384).max_new_tokens == 16384


def test_sampling_options_are_those_of_the_request():
    how = read(temperature=0.5, top_p=0.9, top_k=40, seed=-1).sampling
    assert (how.temperature, how.top_p, how.top_k, how.seed) == (0.5, 0.9, 40, 2**31 - 1)
    assert read(temperature=1, top_k=-1).sampling.top_k == 0 and read(seed=7).has_seed


def test_the_body_of_lmms_eval_with_frames_as_pictures():
    """Its chat form: a video is decoded by the client, and each frame is a picture without a time."""
    wanted = read([*[picture() for _ in range(3)], words("What happens?")], max_tokens=1024, temperature=0)
    assert len(wanted.parts) == 3 and wanted.turns == ("What happens?",)
    assert [part.seconds for part in wanted.parts] == [None] * 3 and wanted.ignored == ()


def test_the_body_of_lmms_eval_that_passes_a_video_url():
    wanted = read([{"type": "video_url", "video_url": {"url": "file:///a.mp4"}}, words("What?")],
                  media_io_kwargs={"video": {"num_frames": 10}}, max_tokens=16, temperature=0,
                  chat_template_kwargs={"enable_thinking": False})
    [part] = wanted.parts
    assert (part.kind, part.url, part.options) == ("video", "file:///a.mp4", {"num_frames": 10})
    assert wanted.ignored == ("chat_template_kwargs",)


def test_the_body_of_lmms_eval_async_with_times_in_text():
    """A time before each frame; an odd number of frames repeats the last time."""
    content = [words("Look. "), *[one for time in ("0.0", "1.0", "1.0") for one in (
        words(f"<{time} seconds>"), picture())], words("What?")]
    wanted = read(content)
    assert wanted.turns == ("Look. What?",) and [part.seconds for part in wanted.parts] == [0.0, 1.0, 1.0]


def test_one_time_before_one_picture_is_text_and_so_is_one_that_precedes_none():
    wanted = read([words("<1.5 seconds>"), picture(), words("<2 seconds>"), words("What?")])
    assert wanted.turns == ("<1.5 seconds><2 seconds>What?",) and wanted.parts[0].seconds is None
    apart = [words("<1 seconds>"), picture(), words("and"), words("<2 seconds>"), picture()]
    assert [part.seconds for part in read(apart).parts] == [None, None]


def test_the_body_of_vlmevalkit_with_pictures():
    wanted = read([words("What?"), picture(detail="low")], max_tokens=2048, temperature=0)
    assert wanted.ignored == () and wanted.parts[0].options == {}


def test_the_body_of_vlmevalkit_with_a_video_and_options_inside():
    inside = {"url": "file:///a.mp4", "fps": 1, "nframes": 8, "min_pixels": 3136}
    wanted = read([{"type": "video_url", "video_url": inside}, words("What?")], n=1, max_tokens=16384,
                  temperature=0, media_io_kwargs={"video": {"fps": 4, "start": 1}},
                  mm_processor_kwargs={"fps": 8, "end": 2, "max_pixels": 9})
    assert wanted.parts[0].options == {"fps": 1, "num_frames": 8, "start": 1, "end": 2}
    assert wanted.ignored == ("mm_processor_kwargs.max_pixels", "messages.content.video_url.min_pixels")


@pytest.mark.parametrize("part", [
    {"type": "input_image", "image_url": PNG}, {"type": "image_url", "image_url": PNG, "uuid": "a"},
    {"type": "video", "video": PNG}, {"type": "input_video", "input_video": {"url": PNG}},
    {"type": "video", "video": {"url": PNG}}, {"type": "input_video", "video_url": PNG}])
def test_a_url_may_be_a_text_or_an_object(part):
    wanted = read([part, {"type": "input_text", "text": "What?"}])
    assert wanted.parts[0].url == PNG and wanted.parts[0].kind == part["type"].replace("input_", "")[:5]
    assert wanted.ignored == (("messages.content.uuid",) if "uuid" in part else ())


def test_fields_that_nobody_reads_are_named_once_and_safely():
    wanted = read([words("a") | {"colour": 1}, words("b") | {"colour": 2}], fps=2,
                  **{"bad\r\nname: x": 1, "é" * 200: 2})
    assert wanted.ignored == ("fps", "bad__name__x", "_" * 80, "messages.content.colour")
    assert len(read(**{f"field_{n}": n for n in range(1000)}).ignored) == 32
    accepted = dict(user="me", metadata={"a": "b"}, store=True, response_format={"type": "text"}, tools=[],
                    frequency_penalty=0, presence_penalty=0.0, n=1, logprobs=False, tool_choice="none")
    assert read(**accepted).ignored == ()


@pytest.mark.parametrize("more, param", [
    ({"n": 2}, "n"), ({"n": True}, "n"), ({"logprobs": True}, "logprobs"), ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"frequency_penalty": 1},
                                                                        "frequency_penalty"),
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"temperature": 10**400}, "temperature"), ({"temperature": float("nan")}, "temperature"),
    ({"top_k": -2}, "top_k"), ({"seed": 1.5}, "seed"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": True}, "max_completion_tokens"), ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"), ({"stream": "yes"}, "stream"), ({"stream_options": 3}, "stream_options"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "assistant", "content": "a"}]},
                                     "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [picture(None)]}]}, "messages.0.content.0.image_url"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages"),
    ({"media_io_kwargs": {"video": 3}}, "media_io_kwargs.video"), ({"frames_as_video": {"fps": 0}},
                                                                   "frames_as_video.fps"),
])
def test_what_would_change_the_answer_is_refused_by_name(more, param):
    error = refused(**more)
    assert (error.status, error.param, error.body["error"]["type"]) == (400, param, "invalid_request_error")


def test_another_model_is_not_found():
    with pytest.raises(errors.Refused) as caught:
        fields.read({"model": "gpt-4o", "messages": []}, MODEL)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(errors.Refused, match="model must be given"):
        fields.read({"messages": []}, MODEL)


def test_system_messages_come_before_the_first_question():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert read(messages=messages).turns == ("Be brief.\na", "b", "c")
    assert refused(messages=messages[1:] + messages[:1]).param == "messages.3.role"


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text(max_size=5) | strategies.sampled_from(["user", "text", "image_url", "video", PNG]),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(
        strategies.sampled_from(["role", "content", "type", "text", "url", "image_url", "video", "fps", "x"]),
        inner, max_size=4), max_leaves=12)


@hypothesis.given(strategies.dictionaries(strategies.sampled_from(sorted(fields._KNOWN) + ["x"]), JSON,
                                          max_size=4), JSON)
def test_any_json_is_understood_or_refused(body, content):
    for messages in (body.get("messages"), [{"role": "user", "content": content}], content):
        try:
            fields.read(body | {"model": MODEL, "messages": messages}, MODEL)
        except errors.Refused as error:
            assert 400 <= error.status < 500 and len(str(error)) < 500
