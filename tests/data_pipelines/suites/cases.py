"""What is asked and how answers count, worked out by hand from the files of files.py and still_files.py.

CASES[benchmark]: the ids of all questions; prompt, frames (times, or number of images) and right answer of
the first; and answers to it with their score by the clean and by the published rule (None: left out of the
mean).
"""

from typing import NamedTuple

from tests.data_pipelines.suites import files
from tests.data_pipelines.suites import still_files

# 10 seconds at 2 frames per second, the last frame included; and a clip of 4 seconds.
WHOLE, CLIP = [n / 2 for n in range(21)], [n / 2 for n in range(9)]
DENSE = [n / 6 for n in range(60)]   # of a film at 6 frames per second whose tracks are asked for
LETTER = "Please respond with only the letter of the correct answer."
DIRECT = "Answer with the option's letter from the given choices directly."
RETURN = "Only return the correct answer option."


class Case(NamedTuple):
    ids: tuple[str, ...]
    prompt: str
    frames: list[float] | int
    right: str
    answers: dict[str, tuple[float, float | None]]


def tag(*points):
    """Returns a tag with (x, y) in thousandths."""
    fields = " ".join(f"{n} {x:03d} {y:03d}" for n, (x, y) in enumerate(points, 1))
    return f'<points coords="1 {fields}">it</points>'


VIDEO = {
    "next_qa": Case(
        ("4010069381_3_CW", "4010069381_4_TN"),
        "why did the boy run\nA. to eat\nB. to catch the ball\nC. to hide\nD. to rest\nE. to wave\n" + DIRECT,
        WHOLE, "B", {"B. to catch the ball": (1, 1), "A": (0, 0), "who knows": (0, 0.2)}),
    "perception_test": Case(
        ("video_8241_11", "video_8241_12"),
        "Is the camera moving?\nA. I don't know\nB. No\nC. Yes\n" + DIRECT, WHOLE, "C",
        {"C": (1, 1), "C. Yes": (1, 1), "c": (1, 0), "B": (0, 0)}),
    "mvbench": Case(
        ("action_sequence_0", "episodic_reasoning_0"),
        "What happened after?\nA. Ate it.\nB. Took it.\nC. Threw it.\n" + LETTER, CLIP, "B",
        {"B.": (1, 1), "bee": (0, 1), "A": (0, 0)}),
    "tomato": Case(
        ("count_0", "count_7"), "How often?\n" + RETURN + "\nA. once\nB. twice\nC. never", WHOLE, "B. twice",
        {"twice": (1, 0), "B": (1, 1), "C": (0, 0)}),
    "motion_bench": Case(
        ("0_ka", "2_kb"), "What moves?\nA. a car\nB. a dog\nC. a cat\nD. a bird\n", WHOLE, "B",
        {"B. a dog": (1, 1), "a dog": (1, 0), "D": (0, 0)}),
    "temp_compass": Case(
        ("caption_matching_0_1021488277", "multi-choice_0_1021488277", "yes_no_0_1021488277"),
        "Which caption matches the video better?\nCaption A: A dog runs.\nCaption B: A dog eats.\n"
        "Please directly give the best option:", WHOLE, "Caption B: A dog eats.",
        {"Caption B": (1, 0), "B": (1, 0), "Caption A: A dog runs.": (0, 0)}),
    "temp_compass_captions": Case(
        ("captioning_0_1021488277",),
        "Which information is consistent with the video? Write a caption.\nGenerated Caption:", WHOLE,
        "eating", {"A dog is eating.": (1, 1), "A dog is running.": (0, 0), "A dog.": (0, 0)}),
    "burst_count": Case(
        ("YFCC100M/v_1_bus", "YFCC100M/v_1_person", "YFCC100M/v_2_bus"),
        "How many bus are there in the video?", WHOLE, "1", {"1": (1, 1), "There are none.": (0, 0)}),
    "video_mme": Case(
        ("001-1", "001-2"),
        "Select the best answer to the following multiple-choice question based on the video. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\nHow many?\nA. One.\nB. Two.\nC. Three.\n"
        "D. Four.\nThe best answer is:", WHOLE, "C",
        {"C. Three.": (1, 1), "Best answer: C": (1, 0), "sorry": (0, None)}),
    "video_mme_subtitles": Case(
        ("001-1", "001-2"),
        "Select the best answer to the following multiple-choice question based on the video. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\nHow many?\nA. One.\nB. Two.\nC. Three.\n"
        "D. Four.\nThe best answer is:", WHOLE, "C", {"C": (1, 1), "A": (0, 0)}),
    "long_video_bench": Case(
        ("86CxyhFV9MI_0", "86CxyhFV9MI_1"),
        "What is on the table?\nA. a cup\nB. a pen\nC. a hat\nD. a key\nE. a map\n" + DIRECT, WHOLE, "E",
        {"E": (1, 1), "a map": (1, 0.2), "A": (0, 0)}),
    "mlvu": Case(
        ("1_plotQA_0", "1_plotQA_1"), "What color?\nA. Yellow\nB. Red\n" + DIRECT, WHOLE, "B",
        {"B": (1, 1), "A": (0, 0), "": (0, 0)}),
    "lvbench": Case(
        ("1", "2"), "What year?\nA. 1636\nB. 1366\nC. 1363\nD. 1633\n" + LETTER, WHOLE, "D",
        {"D": (1, 1), "(D)": (1, 0), "A": (0, 0)}),
    "video_eval_pro": Case(
        ("test-00000-of-00001_0_v1.mp4", "test-00000-of-00001_1_v1.mp4"),
        "What is it?\nA. a cup\nB. a pen\n" + LETTER, WHOLE, "B", {"B": (1, 1), "A": (0, 0)}),
    "ego_schema": Case(
        ("7_001934bb", "8_001934bb"),
        "What is the goal?\nA. To eat\nB. To cook\nC. To run\nD. To sit\nE. To read\n" + DIRECT, WHOLE, "B",
        {"B": (1, 1), "The answer is (B).": (1, 1), "hm": (0, 0.2)}),
    "video_count": Case(
        ("abc_dogs_0", "sora2/s_cars_1"), "How many dogs are there?", CLIP, "3",
        {"3": (1, 1), "There are 3 <points coords=\"0.5 1 100 100\">dogs</points>.": (1, 0), "4": (0, 0),
         "three": (0, 0)}),
    "video_point": Case(
        ("abc_red ball_0", "abc_ball_1"), 'How many "red ball" are there in the video?', WHOLE,
        'Counting the <points coords="1.0 1 250 375 2 750 625">red ball</points> shows a total of 2.',
        {'<points coords="1.5 1 250 375">red ball</points>': (2 / 3, 2 / 3),
         '<points coords="1.2 1 250 375">red ball</points>': (0, 0), "There are none.": (0, 0)}),
    "molmo2_track": Case(
        ("a_1", "a_2"), "Track the cats at 1 FPS.", DENSE, "", {"There are none.": (0, 0)}),
    "mevis_valid_u": Case(
        ("track_0",), "Track the dog at 1 FPS.", DENSE, "", {"There are none.": (0, 0)}),
    "ref_yt_vos": Case(
        ("track_0",), "Track the dog at 1 FPS.", DENSE, "", {"There are none.": (0, 0)}),
    "ref_davis17": Case(
        ("track_0",), "Track the dog at 1 FPS.", DENSE, "", {"There are none.": (0, 0)}),
    "reason_vos": Case(
        ("track_0",), "Track the dog at 1 FPS.", DENSE, "", {"There are none.": (0, 0)}),
    "cap_eval": Case(
        ("77_None_None", "e1_2.0_6.0", "e2_1.5_3.0"), "Describe this video.", WHOLE, "A brown dog runs.",
        {"A dog runs.": (2 / 3, 2 / 3), "": (0, 0)}),
    "qv_highlights": Case(
        ("2579_NUsG9BgSes0_210.0_360.0", "2580_NUsG9BgSes0_210.0_360.0"),
        "video_short_answer: Here is a query: A girl talks. Where are all the segments for the query? Report "
        "the segments in seconds.", WHOLE, "Segments: [82-150]",
        {"[82-150]": (1, 1), "[100-150], [0-10]": (2 / 3, 2 / 3), "82": (0, 0)}),
}
IMAGE = {
    "ai2d": Case(
        ("3.png-0", "3.png-1_transparent"), "Which is the moon?\n" + RETURN + "\nA. sun\nB. moon\nC. star", 1,
        "B. moon", {"B": (1, 1), "moon": (1, 0), "A. sun": (0, 0)}),
    "chart_qa": Case(
        ("test-00000-of-00001_0", "test-00000-of-00001_1"), "chart_qa: What is the value?", 1, "12",
        {"12.5": (1, 1), "13": (0, 0), "Answer: 12": (1, 1)}),
    "doc_qa": Case(
        ("49153", "49154"), "doc_qa: What is the date?", 1, "May 5",
        {"5 may": (1, 1), "May 6": (0.8, 0.8), "June": (0, 0)}),
    "info_qa": Case(
        ("98313", "98314"), "info_qa: What share?", 1, "30%",
        {"30%": (1, 1), "40%": (2 / 3, 2 / 3), "": (0, 0)}),
    "text_vqa": Case(
        ("0", "1"), "text_vqa: what is the brand?", 1, "nokia",
        {"Nokia.": (1, 1), "toshiba": (2 / 3, 2 / 3), "sony": (0, 0)}),
    "vqa2": Case(
        ("0", "1"), "vqa2: Is it sunny?", 1, "yes",
        {"Yes": (1, 1), "no": (1 / 3, 1 / 3), "maybe": (0, 0)}),
    "tally_qa": Case(
        ("0", "1"), "tally_qa: How many cats?", 1, "3", {"3": (1, 1), "three": (0, 0)}),
    "real_world_qa": Case(
        ("test-00000-of-00001_0", "test-00000-of-00001_1"),
        "Which way?\n\nA. Left\nB. Right\nC. Back\nPlease answer directly with only the letter of the "
        "correct option and nothing else.", 1, "B", {"B": (1, 1), "Right": (1, 0), "A": (0, 0)}),
    "mmmu": Case(
        ("validation_Art_1", "validation_Art_2", "validation_Math_1"),
        "Who painted <image 1>?\n" + RETURN + "\nA. Manet\nB. Monet\nC. D'Arcy", 1, "B. Monet",
        {"B": (1, 1), "(A) or (B)": (0, 1), "no idea": (0, 1 / 3)}),
    "math_vista": Case(
        ("1", "2"), "vqa2: What is 2 + 3?", 1, "5", {"5.0": (1, 1), "5 m": (0, 0), "6": (0, 0)}),
    "count_bench": Case(
        ("test-00000-of-00001_0", "test-00000-of-00001_1"), "How many cups are there?", 1,
        "Counting the " + '<points coords="1 1 010 010 2 020 010 3 030 010">objects</points>'
        + " shows a total of 3.", {tag((1, 1), (2, 2), (3, 3)): (1, 1), "3": (0, 0), tag((1, 1)): (0, 0)}),
    "pixmo_count": Case(
        ("validation-00000-of-00001_0", "validation-00000-of-00001_1"),
        "How many people are there in the image?", 1,
        'Counting the <points coords="1 1 010 010 2 020 010 3 030 010 4 040 010">people</points> shows '
        "a total of 4.", {tag(*[(n, n) for n in range(4)]): (1, 1), "There are none.": (0, 0)}),
    "okvqa": Case(("5", "6"), "okvqa: What sport?", 1, "surfing", {"Surfing!": (1, 1), "tennis": (0, 0)}),
    "a_okvqa_mc": Case(("q1", "q2"), "What is sold?\n" + RETURN + "\nA. fruit\nB. shoes", 1, "B. shoes",
                       {"B": (1, 1), "shoes": (1, 0), "A": (0, 0)}),
    "a_okvqa_da": Case(("q1",), "a_okvqa_da: What is sold?", 1, "shoes", {"Shoes": (1, 1), "shoe": (0, 0)}),
    "science_qa": Case(
        ("test-00000-of-00001_0", "test-00000-of-00001_1"),
        "Look at the map.\nWhich is east?\n" + RETURN + "\nA. Ohio\nB. Utah", 1, "A. Ohio",
        {"A": (1, 1), "Utah": (0, 1), "B": (0, 0)}),   # letters: "utah" is nearer to "a" than to "b"
    "gqa": Case(("201307251", "201307252"), "vqa2: Is it overcast?", 1, "no", {"No": (1, 1), "yes": (0, 0)}),
    "muir_bench": Case(
        ("1", "2"), "Compare Image 1 and Image 2.\n" + RETURN + "\nA. Image 3\nB. none\nC. both", 3,
        "C. both",
        {"C": (1, 1), "A or C": (0, 1), "hm": (0, 1 / 3)}),
    "mmiu": Case(("all_0", "all_1"), "How far?\n" + RETURN + "\nA. near\nB. far", 2, "B. far",
                 {"B": (1, 1), "A": (0, 0), "neither": (0, 0.5)}),
    "blink": Case(("val_Counting_1", "val_Counting_2"),
                  "How many?\nSelect from the following choices.\n(A) 0\n(B) 3", 1, "B",
                  {"(B)": (1, 1), "B": (1, 1), "(A)": (0, 0)}),
    "point_bench": Case(
        ("affordable_0_a.png", "spatial_1_b.png"), "Point to what cuts.", 1, "",
        {tag((250, 350)): (1, 1), tag((250, 350), (900, 900)): (0, 0), "none": (0, 0)}),
    "pixmo_points": Case(
        ("media/{0}.jpg_cups_0", "media/{1}.jpg_cups_1"), "Point to the cups.", 1,
        '<points coords="1 1 400 400">cups</points>',
        {tag((400, 400)): (1, 1), tag((400, 400), (900, 900)): (2 / 3, 2 / 3), "There are none.": (0, 0)}),
    "screenspot_v2": Case(
        ("test-00000-of-00001_0", "test-00000-of-00001_1"), "Point to the close this window.", 1,
        '<points coords="1 1 375 625">close this window</points>',
        {tag((300, 600)): (1, 1), tag((300, 600), (900, 900)): (1, 1), tag((100, 600)): (0, 0)}),
    "screenspot_pro": Case(
        ("android_0", "android_1"), "Point to the run the app.", 1,
        '<points coords="1 1 300 400">run the app</points>',
        {tag((400, 600)): (1, 1), tag((410, 400)): (0, 0)}),
    "osworld_g": Case(
        ("0F-0", "0F-1"), "Point to the Click the button.", 1,
        '<points coords="1 1 300 400">Click the button</points>',
        {tag((300, 400)): (1, 1), tag((150, 400)): (0, 0)}),
}
IMAGE["pixmo_points"] = IMAGE["pixmo_points"]._replace(ids=tuple(
    f"media/{still_files.sha(f'https://example.org/{name}.jpg')}.jpg_cups_{number}"
    for number, name in enumerate("bc")))
CASES = VIDEO | IMAGE

SHARED = {   # benchmarks that read the files of another
    "temp_compass_captions": files.temp_compass, "video_mme_subtitles": files.video_mme,
    "a_okvqa_mc": still_files.a_okvqa, "a_okvqa_da": still_files.a_okvqa}


def write(name, folder, film):
    """Writes the files of a benchmark."""
    (SHARED.get(name) or getattr(files, name, None) or getattr(still_files, name))(folder, film)
