"""More ways to ask, as templates.py: those that only published data sets need.

{medium} image, images or video; {question} as it stands in the data; {object} what is described;
{time}, {start}, {end} as "2.0 seconds" or "00:00:02.0".
"""

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
