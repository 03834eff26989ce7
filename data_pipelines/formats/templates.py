"""Question templates by kind of answer. The first of each family is the plain one, used outside training.

{label} the objects asked about; {medium} image, images or video; {selection} which of several images;
{fps} points per second; {question} the question of the annotation; {object} the object to describe; {time},
{start}, {end} as "2.0 seconds" or "00:00:02.0", except that {start} of a track is a points tag.
"""

POINT = (
    "Point to the {label}.",
    "Where is the {label}?",
    "Point at every {label} in the {medium}.",
    "Show me the {label}.",
    "Locate each {label} and point to it.",
    "Find the {label} in this {medium}.",
    "Can you point out any {label}?",
    "Mark all {label} that you see.",
    "{label}: point",
    "Pinpoint {label}. If there is nothing to point to, answer \"There are none.\"",
    "I am looking for the {label}; where does it appear in the {medium}?",
    "points for {label} please",
)

POINT_COUNT = (
    "How many {label} are there in the {medium}?",
    "Count the {label} by pointing.",
    "Point to every {label}, then say how many there are.",
    "How many {label} can you see? Point while you count.",
    "Find and count all {label}.",
    "What is the number of {label} in this {medium}? Show each one.",
    "Count each {label} in the {medium}.",
    "{label}: point and count",
    "Tell me how many {label} appear, marking each. Say \"There are none.\" if it is absent.",
    "number of {label}, with points",
)

COUNT_POINT = (
    "Say how many {label} there are, then point to them.",
    "First count, then point: {label}.",
    "Give the number of {label} in the {medium} followed by their locations.",
    "State the count of {label} before you point at each.",
    "{label}: count and point",
)

COUNT = (
    "Give only the number of {label}.",
    "Count the {label} without pointing.",
    "Answer with one number: how many {label} does the {medium} show?",
    "{label}: count only",
    "Just the total of {label} in this {medium}, please.",
)

MULTI_POINT = (
    "In {selection}, point to the {label}.",
    "Where in {selection} is the {label}?",
    "Point at every {label} in {selection}.",
    "Locate the {label}. Look at {selection}.",
    "{selection}: point to each {label}",
)

MULTI_POINT_COUNT = (
    "How many {label} are there in {selection}? Point to them.",
    "Point to and count the {label} in {selection}.",
    "Count each {label} of {selection} by pointing.",
    "{selection}: point and count {label}",
)

MULTI_COUNT_POINT = (
    "Say how many {label} there are in {selection}, then point to them.",
    "First count, then point, in {selection}: {label}.",
    "{selection}: count and point {label}",
)

MULTI_COUNT = (
    "Give only the number of {label} in {selection}.",
    "Count the {label} of {selection} without pointing.",
    "{selection}: count {label}",
)

TRACK = (  # without a rate: 2 points per second
    "Track the {label}.",
    "Follow the {label} through the video.",
    "Where does the {label} go? Track it.",
    "Give the tracks of every {label}.",
    "{label}: track",
)

TRACK_FPS = (
    "Track the {label} at {fps} FPS.",
    "Follow the {label} through the video with {fps} points per second.",
    "Give the tracks of every {label}, {fps} FPS.",
    "Return track coordinates for the {label}, sampled {fps} times per second.",
    "{label}: track, {fps} fps",
)

TRACK_START_END = (
    "When and where is each {label} first and last seen?",
    "Point to the {label} at its first and at its last appearance.",
    "Give the start and end points of the {label}.",
    "{label}: first and last point",
)

TRACK_SINGLE = (
    "Track the object at {start} from there on at {fps} FPS.",
    "Starting from {start}, follow this object at {fps} points per second.",
    "{start} Where does it go next? {fps} FPS.",
    "Continue this track at {fps} fps: {start}",
)

LONG_CAPTION = (
    "Describe this {medium}.",
    "Describe the {medium} in detail.",
    "What can you see in this {medium}? Tell me everything.",
    "Write a detailed caption of the {medium}.",
    "Give me a thorough description of what is shown.",
    "Explain what this {medium} shows, leaving nothing out.",
)

SHORT_CAPTION = (
    "Describe this {medium} in short.",
    "Give a brief caption of the {medium}.",
    "What does the {medium} show, in a sentence?",
    "Summarize this {medium}.",
)

SHORT_ANSWER = (
    "{question}",
    "{question} Answer briefly.",
    "{question} Give a short answer.",
    "{question} Reply with a word or a short phrase.",
    "Look at the video and answer: {question}",
    "Keep the answer short. {question}",
    "Here is a question about the video. {question}",
    "Question: {question} Short answer:",
    "Q: {question} A:",
    "According to the video, {question}",
    "{question} A few words are enough.",
    "Please answer this about the clip: {question}",
)

MOTION_CAPTION = (
    "Describe the motion in this {medium}.",
    "How do things move here? Describe it.",
    "What moves in the {medium}, and how?",
    "Write a caption about the movements that you see.",
    "Tell me about every action and movement in this {medium}.",
)

OBJECT_CAPTION = (
    "Describe the {object} in this {medium}.",
    "What does the {object} look like and do?",
    "Write a caption about the {object} alone.",
    "Tell me all about the {object} in the {medium}.",
    "Follow the {object} and describe it.",
)

TRANSCRIPT = (
    "Transcribe what is said in this {medium}.",
    "What do people say in the {medium}?",
    "Write down the speech.",
    "Give me a transcript.",
)

FRAME_CAPTION = (
    "Describe the frame at {time}.",
    "What can be seen at {time}?",
    "Caption the moment at {time} of this {medium}.",
    "At {time}, what does the {medium} show?",
    "Give a description of what is on screen at {time}.",
)

CLIP_CAPTION = (
    "Describe the {medium} from {start} to {end}.",
    "What happens between {start} and {end}?",
    "Caption the part from {start} until {end}.",
    "Tell me what the {medium} shows from {start} to {end}.",
    "Write a description of the clip that starts at {start} and ends at {end}.",
)

CLIP_TRANSCRIPT = (
    "Transcribe what is said from {start} to {end}.",
    "What do people say between {start} and {end}?",
    "Give me the transcript of the part from {start} to {end}.",
)

# Families by name. Keep their order: launch/quickstart/corpus.py trains a small tokenizer on them.
FAMILIES: dict[str, tuple[str, ...]] = {
    "POINT": POINT, "POINT_COUNT": POINT_COUNT, "COUNT_POINT": COUNT_POINT, "COUNT": COUNT,
    "MULTI_POINT": MULTI_POINT, "MULTI_POINT_COUNT": MULTI_POINT_COUNT,
    "MULTI_COUNT_POINT": MULTI_COUNT_POINT, "MULTI_COUNT": MULTI_COUNT, "TRACK": TRACK,
    "TRACK_FPS": TRACK_FPS, "TRACK_START_END": TRACK_START_END, "TRACK_SINGLE": TRACK_SINGLE,
    "LONG_CAPTION": LONG_CAPTION, "SHORT_CAPTION": SHORT_CAPTION,
}
# Families that only published data sets use; no drawn world does.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "SHORT_ANSWER": SHORT_ANSWER, "MOTION_CAPTION": MOTION_CAPTION, "OBJECT_CAPTION": OBJECT_CAPTION,
    "TRANSCRIPT": TRANSCRIPT, "FRAME_CAPTION": FRAME_CAPTION, "CLIP_CAPTION": CLIP_CAPTION,
    "CLIP_TRANSCRIPT": CLIP_TRANSCRIPT,
}
