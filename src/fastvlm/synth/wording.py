"""How people ask: question templates, those that training sees and those kept for evaluation."""

import re
from collections.abc import Collection, Iterator, Sequence
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
    """Templates of one family of questions; `{things}`, `{thing}` and `{a_thing}` are filled in.

    `patterns` and `ending_patterns` are further ones for training, written with alternatives as in
    "[Count|Number] the {things}[ here|]".
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    train_endings: tuple[str, ...] = ()
    heldout_endings: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    ending_patterns: tuple[str, ...] = ()


_PICTURE = "[picture|image|photo|photograph|drawing|scene|page|illustration|screenshot|photo|picture|image]"
_IN = f"[in|on|inside|within|in] [the|this|that|the|this] {_PICTURE}"
_HERE = f"[here|{_IN}|{_IN}|]"
_SHOWN = "[shown|visible|present|drawn|depicted|pictured|displayed|to be seen|on display]"
_TELL = "[Tell me|Say|Please say|Please tell me|Give|Give me|State|Report|Work out|Let me know|Write|I want to know|I would like to know|Could you tell me|Can you tell me|Do you know|Find out]"
_YOU_SEE = "[do you see|can you see|can you find|do you find|can you spot|do you spot|do you notice|would you count|are you able to see|can be seen|can be found|could you find]"

COUNTING = Wordings(
    patterns=(
        f"How many {{things}} [are|are there|are {_SHOWN}|exist|appear|{_YOU_SEE}|can one count|did someone draw|did somebody put|were drawn|are there in total|are there altogether] {_HERE}?",
        f"How many {{things}} [does|do] [the|this|that] {_PICTURE} [show|contain|hold|have|include|display|depict]?",
        f"{_TELL} how many {{things}} [there are|are there|are {_SHOWN}|you see|you can see|you find|you count|it has|it shows] {_HERE}.",
        f"{_TELL} [the number|the count|the total|the exact number|the quantity|the amount] of {{things}} {_HERE}.",
        f"What [is|would be] the [number|count|total number|total|quantity|exact number|amount] of {{things}} {_HERE}?",
        f"What [number|quantity|amount|count] of {{things}} [is|is there|are {_SHOWN}|{_YOU_SEE}] {_HERE}?",
        f"[Count|Please count|Now count|Try to count|Can you count|Could you count|Go ahead and count] [the|all the|all|every one of the|up the] {{things}} {_HERE}[| for me| and tell me the number| and give the result].",
        f"[If you count|When you count|Counting|After counting] [the|all the|all] {{things}} {_HERE}, [what do you get|how many are there|what is the result|what number do you get|how many is that]?",
        f"[Looking at|Look at|Consider|Check|From|Given|Based on] [the|this] {_PICTURE}, how many {{things}} [are there|do you see|are {_SHOWN}|can you count]?",
        "{things} [count|number|total|amount]?",
        f"[total|number of|count of|amount of] {{things}} {_HERE}",
        "I [see|count|notice|can see] [several|some|a few|many] {things}. [How many|What is the number|Exactly how many are there]?",
    ),
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
    ending_patterns=(
        "[Give|Give me|Return|Write|Say|Output|Print|State|Use|Show|I want|I need|Please give|Tell me] [only|just|nothing but|] [a|the|one|a single|that|your] [number|count|figure|numeral|integer|total].",
        "[Give|Give me|Return|Write|Say|Output|Print|State|Use] [only|just|nothing but] [digits|numerals|numbers].",
        "[Reply|Respond|Answer|Come back] [with|in|using] [a number|the number|one number|digits|numerals|a figure] [only|alone|and nothing else|, please|, no words|].",
        "[Only|Just] [a|the|one] [number|count|figure] [please|, nothing more|, no words|].",
        "[No words|No text|Nothing else], [only|just] [a|the] [number|digits].",
    ),
    heldout_endings=("Give only a number.", "Respond with digits only."),
)

_WRITING = "[text|writing|handwriting|word|words|note|message|letters|line|phrase|sentence|handwritten text|handwritten note|handwritten word|inscription|caption|content]"

READING = Wordings(
    patterns=(
        f"[What|Which] {_WRITING} [is|is there|is written|is {_SHOWN}|can be read|can you read|do you read|do you see|was written|was written by hand|has been written|is handwritten|can one read] {_HERE}?",
        f"What [did|has|does] [somebody|someone|the writer|the person|a person] [write|write down|write by hand|written|note down|written down] {_HERE}?",
        f"What [is|was|has been] [written|written down|handwritten|noted|noted down|spelled out|printed|jotted down] {_HERE}?",
        f"What [does|do] the {_WRITING} {_HERE} [say|read|spell|spell out|state]?",
        f"[Please|Kindly|Now|Just|Could you|Can you|Would you] [read|transcribe|read out|copy|spell out|type|type out|write out|extract|give] [the|this] [exact |whole |complete |]{_WRITING} {_HERE}[| for me| to me].",
        f"[Read|Transcribe|Read out|Copy|Spell out|Type|Type out|Write out|Extract|Give|Output|Return|Recognize|Recognise|Report] [the|this|all the|all] [exact |whole |]{_WRITING} {_HERE}[| for me| to me].",
        f"{_TELL} [what is written|what it says|what the {_WRITING} says|what you read|what you can read|the {_WRITING}|what was written|the exact {_WRITING}] {_HERE}.",
        f"[Looking at|Look at|Read|From|Check] [the|this] {_PICTURE}, what [does it say|is written|is the {_WRITING}]?",
        "[I cannot|I can't|Help me to|Help me] read this[.|,] what does it say?",
        f"{_WRITING}?",
        "[Perform|Do|Run] [OCR|text recognition|handwriting recognition][| on this image| on the picture].",
    ),
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
    ending_patterns=(
        "[Give|Write|Output|Print|Reply with|Respond with|Answer with|Return|Show|Say] [only|just|nothing but|] [the text|the words|the writing|what is written|what it says|the transcription].",
        "[Give|Write|Output|Print|Reply with|Respond with|Return|Show] [the text|the words|the writing|what is written] [only|alone|and nothing else|and no more|, nothing more|as it is].",
        "[Only|Just] [the text|the words|the writing|what is written] [please|, nothing more|].",
    ),
    heldout_endings=("Return the text and nothing else.",),
)

EMOJI = Wordings(
    patterns=(
        f"[Which|What] [emoji|emoji symbol|symbol|icon|emoticon|emoji|smiley] [is|is this|is it|is that|is {_SHOWN}|has been drawn|was drawn|was used|do you see|can you see|am I looking at|are you looking at|are we looking at|appears] {_HERE}?",
        f"[Which|What] [emoji|thing|object|item|symbol|icon] [does|would] [the|this|that] {_PICTURE} [show|contain|depict|have|display|include]?",
        "[What|How] would you [call|name|describe] [this|the|that] [emoji|thing|object|item|icon|symbol|picture][| in one word| here]?",
        f"[Name|Please name|Identify|Please identify|Recognise|Recognize|Label|Say|Tell me|Give me the name of|Give the name of|State the name of|What is the name of] [the|this|that] [emoji|object|thing|item|icon|symbol] {_HERE}[| you are looking at| you see].",
        "[What kind of|What sort of|Which kind of|What type of] [emoji|thing|object|item|icon] [is this|is it|is shown|do you see|is shown here|does this show|can you see]?",
        "[Can|Could] you [say|tell|tell me|guess|identify|name|recognise|recognize] [what|which] [emoji|thing|object] [this is|it is|is shown|you see|the picture has|the photo has|this picture shows]?",
        "[This|The|That|The one] [emoji|object|thing|picture|one] [is|shows|is called|is a|depicts] [what|which thing]?",
        f"[What|Which] [animal, food or thing|animal or thing|thing or animal|one] [is this|is it|is shown|do you see] {_HERE}?",
        f"{_TELL} [which emoji this is|what emoji this is|what this emoji is|the name of the emoji|what this is|what the emoji shows|which emoji you see] {_HERE}.",
        "[name of|name|which|what is] [the|this] [emoji|object|thing]",
    ),
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
    ending_patterns=(
        "[Use|Give|Give me|Answer with|Answer in|Reply with|Respond with|Reply in|Say it in|Write] [only|just|] [a single|one|a|one single|a one or two word|a short] [word|term|answer].",
        "[Only|Just] [one word|a word|a single word|the answer] [please|].",
        "[One|A single] word [only|is enough|will do|please|].",
    ),
    heldout_endings=("Use a single word.",),
)

DESCRIPTION = Wordings(
    patterns=(
        f"[Describe|Please describe|Briefly describe|Shortly describe|Now describe|Can you describe|Could you describe|Try to describe] [the contents of |the content of |everything in |all of |what you see in |what is in |what is shown in |][the|this|that] {_PICTURE}[| in English| briefly| for me| in one sentence| in a few words| in words| in detail].",
        f"[What|Which things|Which objects|What things|What objects|What items] [is|are|do you see|can you see|is there|are there|are {_SHOWN}|is {_SHOWN}|can be seen|is going on|is to be seen] {_IN}?",
        f"What [does|would you say] [the|this|that] {_PICTURE} [show|shows|contain|contains|depict|depicts|is about|is]?",
        f"What [would you say|do you think] is [shown|depicted|pictured|drawn|visible] {_IN}?",
        f"{_TELL} [what|everything that|all that] [is|you see|you find|can be seen|is shown|is to be seen] {_IN}.",
        f"[List|Name|Enumerate|Mention] [what you see|everything you see|all things|the things|the objects|everything|the contents|what there is] {_IN}.",
        f"[Give|Write|Provide|Make|Could you give me|Give me|Please write|I need] [a|a short|a brief|one short|a one-sentence] [description|caption|summary|title|account] [of|for] [the|this] {_PICTURE}.",
        f"[Put|Express|Summarize|Summarise|Explain|Sum up|Report] [the|this] {_PICTURE} [in words|in one sentence|into words|briefly|in a few words].",
        f"[What is|What's] [this|it|the {_PICTURE}|this {_PICTURE}] [a picture of|an image of|a photo of|showing|about|made of]?",
        "[In|With|Using] [one sentence|a few words|one line|your own words|simple words], [what is in the image|what do you see|describe the picture|what is in this picture|what does the image show]?",
    ),
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
    ending_patterns=(
        "Keep [your answer|it|the answer|the description|this] [under|below|within|shorter than|to at most|to] [10|15|25|30|12|18] words.",
        "[Use|Write|Give] [at most|no more than|fewer than|up to|about] [10|15|20|25|30|12] words.",
        "[Answer|Reply|Respond] [briefly|in one sentence|in a few words|in a sentence|in one line|shortly].",
        "[Make|Keep] it [short|brief|one sentence].",
    ),
    heldout_endings=("Keep your answer under 20 words.",),
)

_TRUE = "[Would you say|Is it true that|Is it right that|Is it correct that|Do you think that|Do you think|Can you confirm that|Would you agree that|Am I right that]"
_YES_OR_NO = "[|||Yes or no: |Please answer: |True or false: |Tell me, |Question: ]"

YES_NO_ONE = Wordings(
    patterns=(
        f"{_YES_OR_NO}[is|was] there [| maybe| perhaps] {{a_thing}} [|to be seen|anywhere|somewhere] {_HERE}?",
        f"{_YES_OR_NO}[do|can|did] you [see|find|spot|notice|detect|make out] {{a_thing}} [|anywhere|somewhere] {_HERE}?",
        f"{_YES_OR_NO}[does|would] [the|this|that] {_PICTURE} [show|contain|have|include|hold|depict|display|feature] {{a_thing}}[| anywhere| somewhere]?",
        f"{_YES_OR_NO}[does this|does it] [show|contain|include|have|depict] {{a_thing}}?",
        f"{_TRUE} there is {{a_thing}} {_HERE}?",
        f"{_YES_OR_NO}[can|could] {{a_thing}} be [seen|found|spotted|made out] {_HERE}?",
        f"{_YES_OR_NO}[has|was] {{a_thing}} [been drawn|drawn|been put|been shown|shown|included] {_HERE}?",
        f"{_YES_OR_NO}is {{a_thing}} [{_SHOWN}|among the things|one of the things|part of it] {_HERE}?",
        f"[Check|See|Look|Find out|Tell me|Say|Decide] [if|whether] there is {{a_thing}} {_HERE}.",
    ),
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
    ending_patterns=(
        "[Answer|Respond|Reply|Say|Tell me|Write] [with|just|only|simply|] yes or no [please|and nothing else|, nothing more|].",
        "[Answer|Respond|Say|Reply with|Answer with|Give only] yes or no [only|alone|please|].",
        "[A|Only a|Just a|A simple|A plain] yes or no [please|will do|is enough|].",
    ),
    heldout_endings=("Reply yes or no only.",),
)

YES_NO_MANY = Wordings(
    patterns=(
        f"{_YES_OR_NO}are there [any|some|any|] {{things}} [|to be seen|anywhere|somewhere] {_HERE}?",
        f"{_YES_OR_NO}[do|can|did] you [see|find|spot|notice|detect] [any|some|any|] {{things}} [|anywhere|somewhere] {_HERE}?",
        f"{_YES_OR_NO}[does|would] [the|this|that] {_PICTURE} [show|contain|have|include|hold|depict|display] [any|some|any|] {{things}}[| anywhere| somewhere]?",
        f"{_YES_OR_NO}[does this|does it] [show|contain|include|have|depict] [any |]{{things}}?",
        f"{_TRUE} there are [some|any|] {{things}} {_HERE}?",
        f"{_YES_OR_NO}[can|could] [any|some] {{things}} be [seen|found|spotted] {_HERE}?",
        f"{_YES_OR_NO}[have|were] [any|some] {{things}} [been drawn|drawn|been put|shown] {_HERE}?",
        f"[Check|See|Find out|Tell me|Say] [if|whether] there are [any|some] {{things}} {_HERE}.",
    ),
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
    ending_patterns=YES_NO_ONE.ending_patterns,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

YES_NO_NUMBER = Wordings(
    patterns=(
        f"{_YES_OR_NO}are there [exactly|precisely|really|indeed|] {{number}} {{things}} {_HERE}?",
        f"{_YES_OR_NO}[do|can|would] you [see|count|find] [exactly|] {{number}} {{things}} {_HERE}?",
        f"{_YES_OR_NO}[does|would] [the|this] {_PICTURE} [show|contain|have|hold|include] [exactly|] {{number}} {{things}}?",
        f"{_TRUE} [there are|you see|the picture has|the image shows] [exactly|] {{number}} {{things}} {_HERE}?",
        "[Is|Would] the [number|count|total] of {things} [equal to |exactly |be |]{number}?",
    ),
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
    ending_patterns=YES_NO_ONE.ending_patterns,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

YES_NO_MORE = Wordings(
    patterns=(
        f"{_YES_OR_NO}are there more {{things}} than {{others}} {_HERE}?",
        f"{_YES_OR_NO}[do|can|would] you [see|count|find|spot] more {{things}} than {{others}} {_HERE}?",
        f"{_TRUE} [there are|you see|the picture has] more {{things}} than {{others}} {_HERE}?",
        f"{_YES_OR_NO}[does|would] [the|this] {_PICTURE} [show|contain|have|hold] more {{things}} than {{others}}?",
        "[Are|Do] {things} [more numerous than|outnumbering|outnumber] {others}?",
    ),
    train=(
        "Are there more {things} than {others}?",
        "Do you see more {things} than {others}?",
        "Does the picture have more {things} than {others}?",
        "Are there more {things} than {others} in the image?",
    ),
    heldout=("Do the {things} outnumber the {others}?", "Is it true that there are more {things} than {others}?"),
    train_endings=YES_NO_ONE.train_endings,
    ending_patterns=YES_NO_ONE.ending_patterns,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

YES_NO_TEXT = Wordings(
    patterns=(
        f"{_YES_OR_NO}is there [any|some] {_WRITING} [|to be read|to be seen] {_HERE}?",
        f"{_YES_OR_NO}[do|can] you [see|find|spot|read] [any|some] {_WRITING} {_HERE}?",
        f"{_YES_OR_NO}[has|was] [anything|something] [been written|written|written by hand|been noted] {_HERE}?",
        f"{_YES_OR_NO}[can|could] [any|some] {_WRITING} be [found|seen|read] {_HERE}?",
        f"{_YES_OR_NO}does [the|this] {_PICTURE} [show|contain|have|include] [any|some|] {_WRITING}?",
    ),
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
    ending_patterns=YES_NO_ONE.ending_patterns,
    heldout_endings=YES_NO_ONE.heldout_endings,
)

_COLOUR = "[color|colour]"

COLOUR = Wordings(
    patterns=(
        f"[What|Which] {_COLOUR} [is|was|has] [the|that|this] {{thing}} [|painted|drawn|shown] {_HERE}?",
        f"[In|With] [what|which] {_COLOUR} [is|was] the {{thing}} [drawn|shown|painted|filled|depicted|made] {_HERE}?",
        f"[What|Which] {_COLOUR} [does|did] [the|this] {{thing}} [have|show] {_HERE}?",
        f"[What|Which] {_COLOUR} [would you say|do you think] the {{thing}} [is|has] {_HERE}?",
        f"[What|Which] {_COLOUR} [was|is] [used for|given to|seen on] the {{thing}} {_HERE}?",
        f"{_TELL} [the|what|which] {_COLOUR} [of the {{thing}}|the {{thing}} is|the {{thing}} has|the {{thing}} is drawn in|the {{thing}} is shown in] {_HERE}.",
        f"How would you [name|describe|call] the {_COLOUR} of the {{thing}}?",
        f"the {{thing}} [is|has] [what|which] {_COLOUR}?",
    ),
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
    ending_patterns=(
        "[Use|Give|Give me|Answer with|Answer in|Reply with|Respond with|Reply in|Say it in|Write] [only|just|] [a single|one|a|one single|a one or two word|a short] [word|term|answer].",
        "[Only|Just] [one word|a word|a single word|the answer] [please|].",
        "[One|A single] word [only|is enough|will do|please|].",
    ),
    heldout_endings=("Use a single word.",),
)

COLOURS = Wordings(
    patterns=(
        f"[What|Which] {_COLOUR} [are|were|have] [the|these|those] {{things}} [|painted|drawn|shown] {_HERE}?",
        f"[In|With] [what|which] {_COLOUR} [are|were] the {{things}} [drawn|shown|painted|filled|depicted] {_HERE}?",
        f"[What|Which] {_COLOUR} [do|did] the {{things}} [have|show] {_HERE}?",
        f"[What|Which] {_COLOUR} [would you say|do you think] the {{things}} [are|have] {_HERE}?",
        f"{_TELL} [the|what|which] {_COLOUR} [of the {{things}}|the {{things}} are|the {{things}} have|the {{things}} are drawn in] {_HERE}.",
    ),
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
    ending_patterns=COLOUR.ending_patterns,
    heldout_endings=COLOUR.heldout_endings,
)

_SPOT = "[part|area|region|corner or side|section|place|spot|side]"

PLACE = Wordings(
    patterns=(
        f"[Where|Whereabouts|Where exactly|Roughly where] [is|was|do you see|can you see|do you find|can one see|do I find|did someone put] the {{thing}} [|located|placed|drawn|shown|positioned] {_HERE}?",
        f"[In|On|At] [which|what] {_SPOT} [of|in] [the|this] {_PICTURE} [is|was|do you find|do you see|can I see|can I find] the {{thing}}[| drawn| located| placed| shown]?",
        f"[At|In|On] [which|what] {_SPOT} [is|was] the {{thing}} [|drawn|located|placed|shown|put]?",
        f"[What|Which] is the [position|location|place|spot|area] of the {{thing}} {_HERE}?",
        f"{_TELL} [where the {{thing}} is|the position of the {{thing}}|the location of the {{thing}}|the place of the {{thing}}|in which part the {{thing}} is|where you see the {{thing}}] {_HERE}.",
        f"[Locate|Find|Point out|Please locate|Please find|Please point out|Point to|Show me] [the {{thing}}|where the {{thing}} is] {_HERE}.",
        f"[Whereabouts|Where] {_IN} is the {{thing}}?",
        "{thing}: [where|which part|what position]?",
    ),
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
    ending_patterns=(
        "[Use|Answer in|Answer with|Reply with|Respond in|Say it in|Give|Write] [no more than|one or|up to|only|just|at most|a maximum of] [two words|a word or two|three words].",
        "[Name|Give|State|Say] [only|just|] the [position|place|location|spot].",
        "[Only|Just] the [position|place|location|spot|region] [please|].",
        "[Keep it short|In a word or two|Briefly|Short answer, please].",
    ),
    heldout_endings=("Use at most two words.",),
)

FAMILIES = (
    COUNTING, READING, EMOJI, DESCRIPTION, YES_NO_ONE, YES_NO_MANY, YES_NO_NUMBER, YES_NO_MORE, YES_NO_TEXT,
    COLOUR, COLOURS, PLACE,
)  # fmt: skip


PATTERN_SHARE = 0.6
"""How often training draws a wording from the patterns instead of the list."""

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


def choose(wordings: Wordings, split: Split, rng: Random) -> str:
    """Draw a template, some with an ending that says how to answer."""
    heads, endings = wordings.train, wordings.train_endings
    if split == "heldout":
        heads, endings = wordings.heldout, wordings.heldout_endings
    if split == "train" and rng.random() < PATTERN_SHARE:
        template = _other(wordings.patterns, wordings.heldout, rng)
    else:
        # The most natural wordings come first in each family: give them more than their share.
        template = heads[int(len(heads) * rng.random() ** 1.3)]
    if endings and rng.random() < 0.2:
        if template[-1] not in ".?":
            template += "."
        if split == "train" and rng.random() < PATTERN_SHARE:
            template += " " + _other(wordings.ending_patterns, wordings.heldout_endings, rng)
        else:
            template += " " + rng.choice(endings)
    return template


def _other(patterns: Sequence[str], kept: Collection[str], rng: Random) -> str:
    """Draw from patterns what is not kept for evaluation."""
    while (found := _expand(rng.choice(patterns), rng)) in kept:
        pass
    return found


def _expand(pattern: str, rng: Random) -> str:
    """Choose among the alternatives, the innermost first, and mend the spaces."""
    while found := _ALTERNATIVES.search(pattern):
        pattern = pattern[: found.start()] + rng.choice(found.group(1).split("|")) + pattern[found.end() :]
    return re.sub(r" +([?.,]|$)", r"\1", " ".join(pattern.split()))


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
