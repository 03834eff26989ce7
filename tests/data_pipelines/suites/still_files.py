"""Small files of the benchmarks of images, as in files.py: FILES[name](folder, film) writes two questions."""

import hashlib

import numpy as np
from PIL import Image

from tests.data_pipelines.suites import files


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def ai2d(folder, film_path):
    row = {"image": files.embedded(), "image_id": 3, "image_name": "3.png", "question_id": "3.png-0",
           "question": "Which is the moon?", "answer_texts": ["sun", "moon", "star"], "correct_answer": 1,
           "abc_label": False, "option_is_abc": [False] * 3, "has_transparent_box": False}
    files.table(folder / "test-00000-of-00001.parquet", [
        row, row | {"question_id": "3.png-1", "abc_label": True},   # an opaque box
        row | {"question_id": "3.png-1_transparent", "abc_label": True, "has_transparent_box": True,
               "answer_texts": ["a", "b", "none"], "option_is_abc": [True, True, False]}])


def chart_qa(folder, film_path):
    row = {"image": files.embedded(), "query": "What is the value?", "label": ["12"], "human_or_machine": 0}
    files.table(folder / "data/test-00000-of-00001.parquet", [
        row, row | {"query": "Which bar is red?", "label": ["Peru"], "human_or_machine": 1}])


def doc_qa(folder, film_path):
    files.still(folder, "documents/a_1.png")
    row = {"questionId": 49153, "question": "What is the date?", "image": "documents/a_1.png", "docId": 1,
           "answers": ["May 5", "5 May"], "data_split": "val", "question_types": ["form"]}
    files.document(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [
        row, row | {"questionId": 49154, "question": "Who signs?", "answers": ["Ann"]}]})


def info_qa(folder, film_path):
    files.still(folder, "images/10002.jpeg")
    row = {"questionId": 98313, "question": "What share?", "image_local_name": "10002.jpeg",
           "answers": ["30%"], "data_split": "val"}
    files.document(folder / "infographicsVQA_val_v1.0_withQT.json", {"data": [
        row, row | {"questionId": 98314, "question": "Which year?", "answers": ["1998"]}]})


def messages(folder, split, *asked):
    files.still(folder, "images/one.jpg")
    files.table(folder / f"{split}/data-00000-of-00001.parquet", [{
        "image": "some_home/images/one.jpg", "message_list": [
            {"question": question, "answers": answers, "question_id": number}
            for number, (question, answers) in enumerate(asked)]}])


def text_vqa(folder, film_path):
    messages(folder, "validation", ("what is the brand?", ["nokia"] * 8 + ["toshiba"] * 2),
             ("which number?", ["seven"] * 10))


def vqa2(folder, film_path):
    messages(folder, "validation", ("Is it sunny?", ["yes"] * 9 + ["no"]), ("How many?", ["2"] * 10))


def tally_qa(folder, film_path):
    messages(folder, "test", ("How many cats?", ["3"]), ("How many dogs?", ["0"]))


def real_world_qa(folder, film_path):
    files.table(folder / "data/test-00000-of-00001.parquet", [
        {"image": files.embedded(), "answer": "B", "question":
            "Which way?\n\nA. Left\nB. Right\nC. Back\nPlease answer directly with only the letter of the "
            "correct option and nothing else."},
        {"image": files.embedded(), "answer": "2", "question":
            "How many cars?\nPlease answer directly with a single word or number."}])


def mmmu(folder, film_path):
    row = {"id": "validation_Art_1", "question": "Who painted <image 1>?", "options":
           "['Manet', 'Monet', \"D'Arcy\"]", "explanation": "", "answer": "B", "img_type": "['Painting']",
           "question_type": "multiple-choice", "subfield": "x", "topic_difficulty": "Easy",
           "image_1": files.embedded(), "image_2": None}
    files.table(folder / "Art/validation-00000-of-00001.parquet", [
        row, row | {"id": "validation_Art_2", "options": '["<img=\'1.png\'>", "<img=\'2.png\'>"]',
                    "answer": "A"}])
    files.table(folder / "Math/validation-00000-of-00001.parquet", [
        row | {"id": "validation_Math_1", "question": "What is the sum?", "options": "[]", "answer": "12",
               "question_type": "open"}])


def math_vista(folder, film_path):
    row = {"pid": "1", "question": "Hint: Please answer with an integer.\nQuestion: What is 2 + 3?",
           "image": "images/1.jpg", "decoded_image": files.embedded(), "choices": None, "unit": None,
           "precision": None, "answer": "5", "question_type": "free_form", "answer_type": "integer",
           "query": "q"}
    files.table(folder / "data/testmini-00000-of-00001.parquet", [
        row, row | {"pid": "2", "question": "Which is it?", "choices": ["red", "blue"], "answer": "blue",
                    "question_type": "multi_choice", "answer_type": "text"}])


def count_bench(folder, film_path):
    row = {"image": files.embedded(), "text": "three cups", "question": "How many cups are there?",
           "number": 3}
    files.table(folder / "data/test-00000-of-00001.parquet", [row, row | {"number": 2}])


def pixmo_count(folder, film_path):
    url = "https://example.org/a.jpg"
    files.still(folder, f"media/{sha(url)}.jpg")
    row = {"image_url": url, "label": "People", "count": 4, "points": {"x": [1.0], "y": [2.0]}}
    files.table(folder / "data/validation-00000-of-00001.parquet", [row, row | {"label": "dogs", "count": 2}])


def okvqa(folder, film_path):
    files.still(folder, "val2014/COCO_val2014_1.jpg")
    files.table(folder / "val/data.parquet", [{
        "image": "images/coco/val2014/COCO_val2014_1.jpg", "image_id": 1, "qas": [
        {"question_id": 5, "question": "What sport?", "answers": [{"raw_answer": "surfing"}] * 10},
        {"question_id": 6, "question": "What is it?", "answers": [{"raw_answer": "board"}] * 10}]}])


def a_okvqa(folder, film_path):
    files.still(folder, "val2017/1.jpg")
    files.table(folder / "val/data.parquet", [{"image": "images/val2017/1.jpg", "message_list": [
        {"question_id": "q1", "question": "What is sold?", "choices": ["fruit", "shoes"], "answer_idx": 1,
         "direct_answers": ["shoes"] * 10, "difficult_direct_answer": False},
        {"question_id": "q2", "question": "Who?", "choices": ["a", "b"], "answer_idx": 0,
         "direct_answers": ["a"] * 10, "difficult_direct_answer": True}]}])


def science_qa(folder, film_path):
    row = {"image": files.embedded(), "question": "Which is east?", "choices": ["Ohio", "Utah"], "answer": 0,
           "hint": "Look at the map.", "task": "closed choice", "grade": "grade2"}
    files.table(folder / "data/test-00000-of-00001.parquet", [
        row, row | {"hint": "", "answer": 1}, row | {"image": None}])


def gqa(folder, film_path):
    files.still(folder, "images/n161313.jpg")
    files.document(folder / "testdev_balanced_questions.json", {
        "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "types": {}},
        "201307252": {"imageId": "n161313", "question": "Who wears it?", "answer": "women"}})


def muir_bench(folder, film_path):
    row = {"idx": "1", "task": "Counting", "image_relation": "x", "image_type": "y", "question":
           "Compare <image> and <image>.", "options": ["<image>", "none", "both"], "answer": "C",
           "image_list": [picture_of(n) for n in range(3)], "counterpart_idx": ""}
    files.table(folder / "data/test-00000-of-00001.parquet", [row, row | {"idx": "2", "answer": "A"}])


def picture_of(number):
    return files.embedded(value=50 + 10 * number)


def mmiu(folder, film_path):
    files.still(folder, "2D-spatial/t/a_0.png", "2D-spatial/t/a_1.png")
    row = {"task": "t", "visual_input_component": "x", "source": "s", "options": "A: near\nB: far",
           "question": "How far?", "context": "c", "output": "B", "input_image_path": [
               "./2D-spatial/t/a_0.png", "./2D-spatial/t/a_1.png"]}
    files.table(folder / "all.parquet", [row, row | {"output": "A"}])


def blink(folder, film_path):
    row = {"idx": "val_Counting_1", "question": "How many?", "sub_task": "Counting",
           "image_1": files.embedded(), "image_2": None, "image_3": None, "image_4": None,
           "choices": ["0", "3"], "answer": "(B)",
           "prompt": "How many?\nSelect from the following choices.\n(A) 0\n(B) 3", "explanation": ""}
    files.table(folder / "Counting/val-00000-of-00001.parquet", [
        row, row | {"idx": "val_Counting_2", "image_2": picture_of(1), "answer": "(A)"}])


def point_bench(folder, film_path):
    files.still(folder, "selected_images/affordable/a.png", "selected_images/spatial/b.png")
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 4:12] = 255
    for name in ("affordable/a.png", "spatial/b.png"):
        (folder / "selected_masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / "selected_masks" / name)
    files.document(folder / "data.json", [
        {"image_filename": "a.png", "mask_filename": "a.png", "category": "affordable",
         "user_input": "Point to what cuts.", "count": 1},
        {"image_filename": "b.png", "mask_filename": "b.png", "category": "spatial",
         "user_input": "Point left of the cup."},
        {"image_filename": "c.png", "category": "spatial", "user_input": "no mask"}])


def pixmo_points(folder, film_path):
    urls = ["https://example.org/b.jpg", "https://example.org/c.jpg"]
    files.still(folder, *(f"media/{sha(url)}.jpg" for url in urls))
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:12] = True
    rows = [{"image_url": url, "label": "Cups", "points": [{"x": 40.0, "y": 40.0}],
             "masks": [mask.tolist()], "preview": None} for url in urls]
    files.table(folder / "data/test-00000-of-00001.parquet", rows)


def screenspot_v2(folder, film_path):
    row = {"image": files.embedded(), "file_name": "pc_1.png", "bbox": [0.25, 0.5, 0.5, 0.75],
           "instruction": "close this window", "data_type": "icon", "data_source": "windows"}
    files.table(folder / "data/test-00000-of-00001.parquet", [row, row | {"instruction": "search field."}])


def screenspot_pro(folder, film_path):
    files.still(folder, "images/android_studio/s.png")
    row = {"id": "android_0", "img_filename": "android_studio/s.png", "bbox": [4, 2, 8, 6],
           "instruction": "run the app", "img_size": [20, 10], "ui_type": "icon", "platform": "macos"}
    files.document(folder / "annotations/android_studio_macos.json", [row, row | {"id": "android_1"}])


def osworld_g(folder, film_path):
    files.still(folder, "images/0F.png")
    row = {"id": "0F-0", "image_path": "0F.png", "image_size": [20, 10], "instruction": "Click the button",
           "box_type": "bbox", "box_coordinates": [4, 2, 4, 4], "GUI_types": ["Button"]}
    files.document(folder / "OSWorld-G_refined.json", [
        row, row | {"id": "0F-1", "box_type": "polygon", "box_coordinates": [0, 0, 10, 0, 0, 8]},
        row | {"id": "0F-2", "box_type": "refusal", "box_coordinates": [-1, -1, -1, -1]}])


def jsonl_of_ai2d(folder):
    """Writes AI2D as JSON lines with named files instead."""
    files.still(folder, "images/3.png")
    files.lines(folder / "test.jsonl", [{
        "image": "images/3.png", "question_id": "q", "question": "Which?", "answer_texts": ["a", "b"],
        "correct_answer": 0, "abc_label": False, "option_is_abc": [False, False],
        "has_transparent_box": False}])
