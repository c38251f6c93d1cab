"""How people ask: question templates, those that training sees and those kept for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from fastvlm.synth.colours import NAMED
from fastvlm.synth.kinds import KINDS
from fastvlm.synth.sample import Split
from fastvlm.synth.shapes import SHAPES

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
MASS = frozenset(kind.name for kind in KINDS if kind.name == kind.plural and kind.name != "fish")
"""Words that take no article: "Are there any scissors?"."""


@dataclass(frozen=True)
class Wordings:
    """Templates of one family of questions; `{things}`, `{thing}` and `{a_thing}` are filled in."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    train_endings: tuple[str, ...] = ()
    heldout_endings: tuple[str, ...] = ()


COUNTING = Wordings(
    train=(
        "How many {things} are there?",
        "How many {things} are in the picture?",
        "How many {things} are in this picture?",
        "How many {things} are in the image?",
        "How many {things} are there in the image?",
        "How many {things} are there in this picture?",
        "How many {things} do you see?",
        "How many {things} can you see?",
        "How many {things} can you see in this image?",
        "How many {things} are shown?",
        "How many {things} are visible?",
        "How many {things} does the picture show?",
        "How many {things} does this image contain?",
        "How many {things}?",
        "How many {things} can you count?",
        "How many {things} have been drawn?",
        "How many {things} appear here?",
        "Count the {things}.",
        "Count the {things} in the picture.",
        "Count the {things} in this image.",
        "Count all the {things}.",
        "Count how many {things} there are.",
        "Please count the {things}.",
        "Can you count the {things}?",
        "Could you tell me how many {things} there are?",
        "What number of {things} do you see?",
        "What is the number of {things}?",
        "What is the number of {things} in the image?",
        "What's the number of {things} in this picture?",
        "What is the total number of {things}?",
        "{things}: how many?",
        "Tell me how many {things} are in this picture.",
        "Tell me the number of {things}.",
        "Give the number of {things}.",
        "Number of {things}?",
        "number of {things} in the picture",
        "Look at the picture. How many {things} are there?",
        "In this image, how many {things} are there?",
        "In the picture, how many {things} can you find?",
        "I see some {things}. How many exactly?",
        "Find all {things} and count them.",
        "The picture may have {things} in it. How many?",
        "How many {things} in total?",
        "There are how many {things}?",
        "Say how many {things} you see.",
    ),
    heldout=(
        "How many {things} are present in the photo?",
        "What is the count of {things}?",
        "Work out how many {things} the picture holds.",
        "I would like to know how many {things} you find here.",
        "Please say the number of {things} shown in this image.",
        "If you count the {things}, what do you get?",
        "What quantity of {things} is in this picture?",
        "How many {things} did somebody put on this page?",
    ),
    train_endings=(
        "Output only the number.",
        "Answer with a number.",
        "Answer with one number.",
        "Just the number.",
        "Answer with one word.",
        "Reply with a number only.",
        "Output just a number.",
        "Answer using digits.",
    ),
    heldout_endings=("Give only a number.", "Respond with digits only."),
)

READING = Wordings(
    train=(
        "What does the handwriting say?",
        "What does it say?",
        "What does this say?",
        "What does the text say?",
        "What does the note say?",
        "What does the picture say?",
        "What does the image say?",
        "What is written here?",
        "What is written?",
        "What is written in the image?",
        "What is written in this image?",
        "What is written in the picture?",
        "What is written in this picture?",
        "What is written on the paper?",
        "What's written here?",
        "What has been written here?",
        "What is the text?",
        "What is the handwritten text?",
        "What text is in the image?",
        "What text is in this picture?",
        "What text do you see?",
        "What word is written here?",
        "What word is this?",
        "What is the word?",
        "Which word is written in the picture?",
        "What words are written here?",
        "Read the text.",
        "Read the handwriting.",
        "Read the text in the image.",
        "Read the text in this picture.",
        "Read this.",
        "Read this handwriting.",
        "Read this out for me.",
        "Please read the handwriting.",
        "Can you read this?",
        "Can you read the handwriting?",
        "Can you read what is written here?",
        "Transcribe the text.",
        "Transcribe the handwriting.",
        "Transcribe this image.",
        "Transcribe the handwritten text.",
        "Write down what it says.",
        "Type out the text in the image.",
        "Tell me what is written here.",
        "Tell me what the handwriting says.",
        "Extract the text.",
        "Extract the text from the image.",
        "handwriting to text",
        "OCR",
        "text in the image?",
    ),
    heldout=(
        "Which text can be read in this picture?",
        "What did somebody write down here?",
        "Please transcribe what you see written.",
        "Could you read the writing to me?",
        "What do the letters spell?",
        "Tell me the words in this photo.",
        "Give the exact text of the handwriting.",
        "What message was written by hand?",
    ),
    train_endings=(
        "Output only the text in the image.",
        "Output only the text.",
        "Only the text.",
        "Answer with the text only.",
        "Reply with just the text.",
    ),
    heldout_endings=("Return the text and nothing else.",),
)

EMOJI = Wordings(
    train=(
        "Which emoji is this?",
        "What emoji is this?",
        "What emoji is it?",
        "What emoji is shown?",
        "Which emoji is shown?",
        "Which emoji is in the picture?",
        "Which emoji is in this image?",
        "What emoji is in the image?",
        "What emoji is in this picture?",
        "What emoji do you see?",
        "Which emoji do you see?",
        "Which emoji can you see here?",
        "Which emoji does the picture show?",
        "What does the emoji show?",
        "What does this emoji show?",
        "What does this emoji mean?",
        "What is this emoji?",
        "What is the emoji?",
        "What is this emoji called?",
        "What is the name of this emoji?",
        "What's this emoji?",
        "What is this?",
        "What's this?",
        "What is it?",
        "What thing is this?",
        "What object is this?",
        "What is shown here?",
        "What is the object in the image?",
        "What is the main object in the picture?",
        "Name the emoji.",
        "Name this emoji.",
        "Name the emoji in the picture.",
        "Name the object.",
        "Identify the emoji.",
        "Identify this emoji.",
        "Tell me which emoji this is.",
        "Tell me what this emoji is.",
        "Recognize the emoji.",
        "Look at this emoji. What is it?",
        "Can you tell which emoji this is?",
        "Do you know this emoji?",
        "Say what the emoji is.",
        "emoji name?",
        "which emoji",
    ),
    heldout=(
        "Which emoji has been drawn in this picture?",
        "Please name the emoji you are looking at.",
        "What would you call this emoji?",
        "Which emoji am I looking at?",
        "Give the name of the emoji shown here.",
        "What kind of thing does this emoji picture?",
        "Can you say what emoji the photo has?",
        "The emoji here is a what?",
    ),
    train_endings=("Answer with one word.", "Output only the name.", "Just the name.", "Answer in one or two words."),
    heldout_endings=("Use a single word.",),
)

DESCRIPTION = Wordings(
    train=(
        "Describe the image.",
        "Describe the image in English.",
        "Describe this image.",
        "Describe the picture.",
        "Describe this picture.",
        "Describe the image briefly.",
        "Describe this picture in one sentence.",
        "Describe what you see.",
        "Describe the image in a few words.",
        "Describe the scene.",
        "Describe this photo.",
        "Give a short description.",
        "Give a short description of the image.",
        "Give a brief description of the picture.",
        "Write a caption for this image.",
        "Write a short caption.",
        "Caption this image.",
        "Caption the picture.",
        "What is in this picture?",
        "What is in the picture?",
        "What is in this image?",
        "What is in the image?",
        "What's in this picture?",
        "What's in the image?",
        "What do you see?",
        "What do you see in this image?",
        "What do you see in the picture?",
        "What can you see?",
        "What can you see in this picture?",
        "What does the picture show?",
        "What does this image show?",
        "What does the image contain?",
        "What things are in the picture?",
        "What objects are in the image?",
        "Tell me what is in the picture.",
        "Tell me what you see.",
        "Tell me about this image.",
        "Please describe the image.",
        "Please describe this picture.",
        "Can you describe the image?",
        "Can you describe this picture?",
        "Say what is in the image.",
        "Summarize the image.",
        "Explain what is in the picture.",
        "describe",
    ),
    heldout=(
        "Describe the contents of the photo.",
        "What would you say is shown in this picture?",
        "Could you give me a description of this image?",
        "In one sentence, what is in the image?",
        "Please tell me what this picture contains.",
        "List what you see in this image.",
        "Put the picture into words.",
        "What is this a picture of?",
    ),
    train_endings=(
        "Output should be brief, about 15 words or less.",
        "Be brief.",
        "Keep it short.",
        "One sentence.",
        "Answer in one sentence.",
        "Use few words.",
    ),
    heldout_endings=("Keep your answer under 20 words.",),
)

YES_NO_ONE = Wordings(
    train=(
        "Is there {a_thing}?",
        "Is there {a_thing} in the picture?",
        "Is there {a_thing} in this picture?",
        "Is there {a_thing} in the image?",
        "Is there {a_thing} in this image?",
        "Is there {a_thing} here?",
        "Do you see {a_thing}?",
        "Do you see {a_thing} in the image?",
        "Can you see {a_thing}?",
        "Can you see {a_thing} in this picture?",
        "Does the picture show {a_thing}?",
        "Does the image show {a_thing}?",
        "Does this picture have {a_thing} in it?",
        "Does the image contain {a_thing}?",
        "Is {a_thing} in the picture?",
        "Is {a_thing} shown?",
        "Is {a_thing} visible?",
        "Is there at least one {thing}?",
        "Tell me if there is {a_thing}.",
        "Look for {a_thing}. Is there one?",
    ),
    heldout=(
        "Would you say there is {a_thing} in the photo?",
        "Has {a_thing} been drawn here?",
        "Can {a_thing} be found in this image?",
        "Yes or no: does this show {a_thing}?",
    ),
    train_endings=("Answer yes or no.", "Yes or no?", "Answer with one word.", "Just yes or no."),
    heldout_endings=("Reply yes or no only.",),
)

YES_NO_MANY = Wordings(
    train=(
        "Are there any {things}?",
        "Are there any {things} in the picture?",
        "Are there any {things} in this image?",
        "Are there {things} in the picture?",
        "Are there {things} here?",
        "Do you see any {things}?",
        "Can you see any {things} in this picture?",
        "Does the picture show any {things}?",
        "Does this image contain {things}?",
        "Does the picture have {things} in it?",
        "any {things}?",
        "Is there any sign of {things}?",
    ),
    heldout=(
        "Would you say there are {things} in the photo?",
        "Can any {things} be found here?",
        "Yes or no: does this show {things}?",
    ),
    train_endings=YES_NO_ONE.train_endings,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

YES_NO_NUMBER = Wordings(
    train=(
        "Are there {number} {things}?",
        "Are there exactly {number} {things}?",
        "Are there {number} {things} in the picture?",
        "Do you see {number} {things}?",
        "Is the number of {things} {number}?",
        "Does the picture show {number} {things}?",
    ),
    heldout=("Is it true that there are {number} {things}?", "Would you count {number} {things} here?"),
    train_endings=YES_NO_ONE.train_endings,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

YES_NO_MORE = Wordings(
    train=(
        "Are there more {things} than {others}?",
        "Do you see more {things} than {others}?",
        "Does the picture have more {things} than {others}?",
        "Are there more {things} than {others} in the image?",
    ),
    heldout=("Do the {things} outnumber the {others}?", "Is it true that there are more {things} than {others}?"),
    train_endings=YES_NO_ONE.train_endings,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

YES_NO_TEXT = Wordings(
    train=(
        "Is there any text?",
        "Is there any text in the image?",
        "Is there text in the picture?",
        "Is there any writing in this picture?",
        "Is there any handwriting?",
        "Does the image contain text?",
        "Do you see any words?",
        "Is something written here?",
    ),
    heldout=("Has anything been written in this picture?", "Can any text be found here?"),
    train_endings=YES_NO_ONE.train_endings,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

COLOUR = Wordings(
    train=(
        "What color is the {thing}?",
        "What colour is the {thing}?",
        "What color is the {thing} in the picture?",
        "What colour is the {thing} in the image?",
        "What is the color of the {thing}?",
        "What is the colour of the {thing}?",
        "What's the color of the {thing}?",
        "What color does the {thing} have?",
        "What colour does the {thing} have?",
        "Which color is the {thing}?",
        "Which colour is the {thing}?",
        "Which color does the {thing} have?",
        "Name the color of the {thing}.",
        "Name the colour of the {thing}.",
        "Tell me the color of the {thing}.",
        "Tell me the colour of the {thing}.",
        "Tell me what color the {thing} is.",
        "color of the {thing}?",
        "colour of the {thing}?",
        "The {thing} is what color?",
        "In this picture, what color is the {thing}?",
        "Look at the {thing}. What color is it?",
        "Look at the {thing}. What colour is it?",
        "What color do you see on the {thing}?",
        "What color was used for the {thing}?",
    ),
    heldout=(
        "In which color is the {thing} drawn?",
        "Please say which colour the {thing} has.",
        "How would you name the color of the {thing}?",
        "Give the colour that the {thing} is shown in.",
        "What color would you say the {thing} is?",
        "Which colour was the {thing} given?",
    ),
    train_endings=("Answer with one word.", "Output only the color.", "Just the colour.", "One word."),
    heldout_endings=("Use a single word.",),
)

COLOURS = Wordings(
    train=(
        "What color are the {things}?",
        "What colour are the {things}?",
        "What is the color of the {things}?",
        "What is the colour of the {things}?",
        "Which color are the {things}?",
        "Which colour do the {things} have?",
        "Tell me the color of the {things}.",
        "Name the colour of the {things}.",
        "What color are the {things} in the picture?",
        "color of the {things}?",
    ),
    heldout=(
        "In which color are the {things} drawn?",
        "Please say which colour the {things} have.",
        "What color would you say the {things} are?",
    ),
    train_endings=COLOUR.train_endings,
    heldout_endings=COLOUR.heldout_endings,
)

PLACE = Wordings(
    train=(
        "Where is the {thing}?",
        "Where is the {thing} in the picture?",
        "Where is the {thing} in this image?",
        "Where in the picture is the {thing}?",
        "Where in the image is the {thing}?",
        "Where do you see the {thing}?",
        "Where can you see the {thing}?",
        "Where does the {thing} appear?",
        "Where is the {thing} placed?",
        "Where is the {thing} located?",
        "Where can I find the {thing}?",
        "Where's the {thing}?",
        "In which part of the picture is the {thing}?",
        "In which part of the image is the {thing}?",
        "In what part of the image is the {thing}?",
        "Which part of the picture is the {thing} in?",
        "In which corner or side is the {thing}?",
        "What is the position of the {thing}?",
        "What is the location of the {thing}?",
        "Find the {thing}. Where is it?",
        "Locate the {thing}.",
        "Locate the {thing} in the image.",
        "Tell me where the {thing} is.",
        "Say where the {thing} is.",
        "position of the {thing}?",
        "Look for the {thing}. Where is it in the picture?",
    ),
    heldout=(
        "Whereabouts in the photo is the {thing}?",
        "In which area of the image do you find the {thing}?",
        "Please point out where the {thing} is.",
        "On what side of this picture is the {thing}?",
        "Can you tell me the place of the {thing}?",
        "At which spot was the {thing} drawn?",
    ),
    train_endings=("Answer in one or two words.", "Be brief.", "Answer with the position only."),
    heldout_endings=("Use at most two words.",),
)

FAMILIES = (
    COUNTING, READING, EMOJI, DESCRIPTION, YES_NO_ONE, YES_NO_MANY, YES_NO_NUMBER, YES_NO_MORE, YES_NO_TEXT,
    COLOUR, COLOURS, PLACE,
)  # fmt: skip


def choose(wordings: Wordings, split: Split, rng: Random) -> str:
    """Draw a template, some with an ending that says how to answer."""
    heads, endings = wordings.train, wordings.train_endings
    if split == "heldout":
        heads, endings = wordings.heldout, wordings.heldout_endings
    # The most natural wordings come first in each family: give them more than their share.
    template = heads[int(len(heads) * rng.random() ** 1.3)]
    if endings and rng.random() < 0.2:
        if template[-1] not in ".?":
            template += "."
        template += " " + rng.choice(endings)
    return template


def fill(template: str, rng: Random, **words: str) -> str:
    """Put the words in, and type it as carelessly as people do."""
    question = template.format(**words)
    roll = rng.random()
    if roll < 0.08:
        question = question.lower()
    elif roll < 0.13:
        question = question.rstrip("?.")
    elif roll < 0.17:
        question = question.lower().rstrip("?.")
    elif roll < 0.6:
        question = question[0].upper() + question[1:]
    return question


def article(noun: str) -> str:
    """The noun with "a" or "an" where it takes one."""
    if noun in MASS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listing(parts: list[str]) -> str:
    """Join as in "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def backdrop(colour: str | None) -> str:
    """How descriptions end: " on a blue background", nothing when it has no one colour."""
    return f" on {article(colour)} background" if colour else ""


def corpus(seed: int, size: int) -> Iterator[str]:
    """Texts for building a tokenizer: training questions and answers, but nothing that is read from pictures."""
    rng = Random(f"corpus {seed}")
    nouns = [(kind.name, kind.plural) for kind in KINDS]
    shapes = [(shape.name, shape.plural) for shape in SHAPES]
    for _ in range(size):
        groups = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            thing, things = rng.choice(nouns)
            if rng.random() < 0.4:
                colour = rng.choice(tuple(NAMED))
                thing, things = (f"{colour} {word}" for word in rng.choice(shapes))
            number = rng.randint(1, 10)
            groups.append(f"{number} {thing if number == 1 else things}")
        yield fill(
            choose(rng.choice(FAMILIES), "train", rng),
            rng,
            thing=thing,
            things=things,
            a_thing=article(thing),
            others=rng.choice(nouns)[1],
            number=str(rng.randint(1, 10)),
        )
        ground = backdrop(rng.choice((*NAMED, None)))
        yield rng.choice(
            (
                str(rng.randint(0, 10)),
                thing,
                "Yes",
                "No",
                rng.choice(tuple(NAMED)),
                rng.choice(PLACES),
                f"{listing(groups)}{ground}.",
                f"{article(thing).capitalize()} emoji{ground}.",
                f"The {rng.choice(('word', 'text'))} in handwriting{ground}.",
            )
        )
