"""Where the rows of each task of the recipe are published, for messages about missing data folders.

HUB is the Hugging Face hub's data sets. Sets in WITHOUT_ROWS publish no rows of their own: build rows with
the columns of their schema.

Source: paper, appendix on data; reference, olmo/data/*_datasets.py and launch_scripts/sft.py.
"""

HUB = "huggingface.co/datasets/"

_TRACKED = {  # source: name on the hub; sources of boxes share one set, their name is its configuration
    "mevis": "molmo2-mevis", "ref_yt_vos": "molmo2-ref-yt-vos", "lv_vis": "molmo2-lv-vis",
    "vicas": "molmo2-vicas", "revos": "molmo2-revos", "burst": "molmo2-burst",
    "ref_davis17": "molmo2-ref-davis17", "yt_vis": "molmo2-yt-vis", "moca": "molmo2-moca",
    "molmo2_video_track": "molmo2-track-instruction"}
_BOXES = "webuav got10k vasttrack trackingnet lvosv1 lvosv2 lasot uwcot webuot latot tnl2k tnllt".split()

WITHOUT_ROWS: dict[str, str] = {
    "ai2d": "no rows are published: build image, question, answer_texts, correct_answer, abc_label and "
            "option_is_abc from the diagrams of https://allenai.org/data/diagrams",
    "kinetics_qa": "no rows are published: join the video lists of Kinetics 600 and 700 with the 710 labels "
                   "into video_id, label (https://github.com/cvdfoundation/kinetics-dataset)",
}

PUBLISHED: dict[str, str] = {
    **dict.fromkeys(("pixmo_cap", "pixmo_cap_with_transcripts"), f"{HUB}allenai/pixmo-cap"),
    **dict.fromkeys(("pixmo_points", "pixmo_points_high_frequency"), f"{HUB}allenai/pixmo-points"),
    "pixmo_ask_model_anything": f"{HUB}allenai/pixmo-ask-model-anything",
    "pixmo_cap_qa": f"{HUB}allenai/pixmo-cap-qa",
    "pixmo_count": f"{HUB}allenai/pixmo-count",
    "pixmo_multi_points": f"{HUB}allenai/molmo2-pixmo-multi-points",
    "molmo2_multi_image_qa": f"{HUB}allenai/Molmo2-MultiImageQA",
    "molmo2_human_qa": f"{HUB}allenai/Molmo2-AskModelAnything, split HumanQA",
    "molmo2_cap": f"{HUB}allenai/Molmo2-Cap",
    "molmo2_cap_qa": f"{HUB}allenai/Molmo2-VideoCapQA, split CapQA",
    "molmo2_subtitle_qa": f"{HUB}allenai/Molmo2-VideoSubtitleQA, split SubtitleQA",
    **{f"molmo2_video_point_{counts}": f"{HUB}allenai/Molmo2-VideoPoint, all eight configurations"
       for counts in ("0_5", "6_25", "26_60", "oversampled", "whole")},
    "molmo_point_gui": f"{HUB}allenai/MolmoPoint-GUISyn, configurations desktop, web and mobile",
    "molmo_point_track_any": f"{HUB}allenai/MolmoPoint-TrackAny",
    "molmo_point_track_syn": f"{HUB}allenai/MolmoPoint-TrackSyn",
    "academic_video_point": f"{HUB}allenai/molmo2-academic-video-points",
    "cosyn_point": f"{HUB}allenai/CoSyn-point",
    **{f"cosyn_{kind}": f"{HUB}allenai/CoSyn-400K, configuration {kind}" for kind in (
        "chart", "chemical", "circuit", "diagram", "document", "graphic", "math", "music", "table")},
    **{f"cosyn_multidoc_{kind}": f"{HUB}allenai/Molmo2-SynMultiImageQA, configuration {kind}" for kind in (
        "chart", "chemical", "diagram", "doc", "music", "table")},
    **dict.fromkeys(("tulu", "tulu_short"), f"{HUB}allenai/molmo2-tulu4-classified"),
    "hardcodes": f"{HUB}allenai/molmo2-hardcodes",
    "chart_qa": f"{HUB}HuggingFaceM4/ChartQA",
    "a_okvqa": f"{HUB}allenai/molmo2-a-ok-vqa",
    "science_qa": f"{HUB}derek-thomas/ScienceQA",
    "vqa2": f"{HUB}allenai/molmo2-vqa2-2014",
    **{name: f"{HUB}allenai/molmo2-{name.replace('_', '-')}" for name in (
        "text_vqa", "okvqa", "doc_qa", "info_qa", "st_qa", "tally_qa", "plot_qa", "figure_qa", "dv_qa",
        "tabwmp_da")},
    "nlvr2": f"{HUB}allenai/molmo2-mantis-instruct-nlvr2",
    "llava_665k_multi": f"{HUB}allenai/molmo2-mantis-instruct-llava_665k_multi",
    "spot_the_diff": f"{HUB}allenai/molmo2-mantis-instruct-spot-the-diff",
    "tgif": f"{HUB}allenai/Molmo2-TGIF",
    "tvqa_with_sub": f"{HUB}allenai/Molmo2-TVQA",
    "paxion": f"{HUB}allenai/Molmo2-Paxion",
    "moments_in_time_qa": "http://moments.csail.mit.edu",
    **dict.fromkeys(("llava_video_academic", "llava_video_academic_mc"),
                    f"{HUB}lmms-lab/LLaVA-Video-178K, academic subsets"),
    "perception_test": "https://github.com/google-deepmind/perception_test, all_train.json",
    "cinepile": f"{HUB}allenai/Molmo2-cinepile",
    "qv_highlights": "https://github.com/jayleicn/moment_detr, highlight_train_release.jsonl",
    "activity_net": "http://activity-net.org, activity_net.v1-3.min.json",
    "activity_net_qa": "https://github.com/MILVLG/activitynet-qa, train_q.json and train_a.json",
    "video_localized_narratives": "https://google.github.io/video-localized-narratives, videoqa.zip",
    "video_localized_narratives_caption": f"{HUB}allenai/Molmo2-VideoLocalizedNarrativesCaptionHf",
    "next_qa": "https://github.com/doc-doc/NExT-QA, train.csv",
    "news_video_qa": f"{HUB}allenai/Molmo2-NewsVideoQA",
    "how2qa": "https://github.com/ych133/How2R-and-How2QA, how2QA_train_release.csv",
    "traffic_qa": "https://sutdcv.github.io/SUTD-TrafficQA, R2_train.jsonl",
    "social_iq2": f"{HUB}PediaMedAI/Social-IQ-Video",
    "sports_qa": f"{HUB}HopLeeTop/Sports-QA, meta-data/train.json",
    "clevrer": "http://clevrer.csail.mit.edu, train.json",
    "funqa": f"{HUB}fesvhtr/FunQA, FunQA_train.json and Funqa_mcqa_v1.json",
    "star": "https://bobbywu.com/STAR, STAR_train.json",
    "intent_qa": "https://github.com/JoseponLee/IntentQA, train.csv",
    "road_text_vqa": "https://github.com/georg3tom/RoadtextVQA, train.json",
    "countix": f"{HUB}allenai/Molmo2-Countix",
    "camerabench": f"{HUB}allenai/Molmo2-CameraBenchTrain",
    "motionbench": f"{HUB}zai-org/MotionBench, MotionBenchCaption-train/train.jsonl",
    "charades_sta": "https://prior.allenai.org/projects/charades, charades_sta_train.txt",
    "coin": "https://github.com/coin-dataset/annotations, COIN.json",
    "youcook2": "http://youcook2.eecs.umich.edu, youcookii_annotations_trainval.json",
    "ego4d": "https://storage.googleapis.com/molmo-datasets/ego4d_cached_train_metadata.parquet",
    "epic_kitchens": "https://github.com/epic-kitchens/epic-kitchens-100-annotations, EPIC_100_train.csv",
}


def of(task: str) -> str:
    """Returns where the rows of a task come from, as part of a sentence; "" for tasks outside the recipe."""
    if task in WITHOUT_ROWS:
        return WITHOUT_ROWS[task]
    if task in PUBLISHED:
        return f"rows are published at {PUBLISHED[task]}"
    for source, name in _TRACKED.items():
        if task.startswith(f"{source}_") and task[len(source) + 1:] != "boxes_tail":
            return f"rows are published at {HUB}allenai/{name}"
    for source in (*_BOXES, "burst"):
        if task.startswith(f"{source}_boxes"):
            return (f"rows are published at {HUB}allenai/molmo2-single-object-track, "
                    f"configuration {source}")
    return ""
