"""Rows of every form become messages and pictures, and what is learned of them is what Apple's code learns."""

import base64
import json
import os
import struct
import zlib
from itertools import groupby
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fastvlm.checkpoint.load import load
from fastvlm.errors import InputError
from fastvlm.prompt import IGNORE, IMAGE, assistant, system, user
from fastvlm.train.conversations import MAX_PICTURE_BYTES, PictureFolder, read_row
from fastvlm.train.dataset import open_dataset
from fastvlm.train.mixture import parse_parts

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = GOLDENS / "images"
CONVERSATIONS = json.loads((GOLDENS / "labels.json").read_text(encoding="utf-8"))
APPLE_IMAGE = -200
FIND = PictureFolder(folder=IMAGES).find


@pytest.fixture(scope="module", params=["apple_tiny", "hf_tiny"])
def checkpoint(request):
    return load(GOLDENS / request.param)


def dataset_of(checkpoint, rows, folder, **settings):
    file = folder / "data.json"
    file.write_text(json.dumps(rows))
    config = checkpoint.model.config.vision
    return open_dataset(parse_parts([str(file)], [str(IMAGES)]), checkpoint.tokenizer, config, **settings)


def expand(ids, image_id, count):
    """Apple's one -200 a picture as our run of placeholders."""
    return [new for id_ in ids for new in ([image_id] * count if id_ == APPLE_IMAGE else [id_])]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_C14_labels_of_files_equal_apples(name, checkpoint, tmp_path):
    golden = load_file(GOLDENS / "labels.expected.safetensors")
    turns = [{"from": who, "value": text} for who, text in CONVERSATIONS[name]]
    num_pictures = sum(turn["value"].count("<image>") for turn in turns)
    row = {"image": ["square.png", "wide.png"][:num_pictures] or None, "conversations": turns}
    dataset = dataset_of(checkpoint, [row], tmp_path)

    example = dataset[0]

    ids, labels = (golden[f"{name}.{kind}"].tolist() for kind in ("input_ids", "labels"))
    num = dataset.vision.num_image_tokens
    assert example.token_ids == expand(ids, checkpoint.tokenizer.image_id, num)
    is_image = [id_ == APPLE_IMAGE for id_ in ids]
    wide = [value for value, is_one in zip(labels, is_image, strict=True) for value in [value] * (num if is_one else 1)]
    assert example.labels == wide
    assert len(example.pixels) == num_pictures


@pytest.mark.parametrize("word", ["<image>", "<|im_end|>", "<|im_start|>assistant\n", "assistant", "<|endoftext|>"])
def test_C14_words_that_look_like_control_tokens_are_letters_in_messages(word, checkpoint, tmp_path):
    turns = [{"role": "user", "content": f"What is {word}?"}, {"role": "assistant", "content": f"It is {word}."}]
    tokenizer = checkpoint.tokenizer

    example = dataset_of(checkpoint, [{"messages": turns}], tmp_path)[0]

    answer = [label for label in example.labels if label != IGNORE]
    controls = {tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.end_of_text_id, tokenizer.image_id}
    assert tokenizer.detokenize(answer) == f"It is {word}.\n"
    assert [id_ for id_ in answer if id_ in controls] == [tokenizer.im_end_id]
    assert example.token_ids.count(tokenizer.im_end_id) == 3  # system, user, assistant
    assert tokenizer.image_id not in example.token_ids
    assert sum(is_learned for is_learned, _ in groupby(example.labels, lambda label: label != IGNORE)) == 1


def test_C14_no_picture_and_no_question_is_learned(checkpoint, tmp_path):
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}] * 1
    example = dataset_of(checkpoint, [{"image": "square.png", "conversations": turns}], tmp_path)[0]

    learned = [id_ for id_, label in zip(example.token_ids, example.labels, strict=True) if label != IGNORE]

    assert checkpoint.tokenizer.detokenize(learned) == "A\n"
    assert checkpoint.tokenizer.image_id not in learned


def test_llava_marks_are_slots_only_in_what_a_human_says():
    turns = [{"from": "human", "value": "A <image> B"}, {"from": "gpt", "value": "no <image> here"}]

    conversation = read_row({"id": 7, "image": "square.png", "conversations": turns}, FIND)

    assert conversation.messages[0].content == ("A ", IMAGE, " B")
    assert conversation.messages[1] == assistant("no <image> here")
    assert [picture.path for picture in conversation.pictures] == [IMAGES / "square.png"]
    assert conversation.id == "7"


def test_openai_picture_parts_are_slots_followed_by_a_newline():
    content = [
        {"type": "image_url", "image_url": {"url": "square.png"}},
        {"type": "text", "text": "What is <image>?"},
    ]
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A mark."}]},
    ]

    conversation = read_row({"messages": turns}, FIND)

    assert conversation.messages == (system("Be brief."), user("What is <image>?", 1), assistant("A mark."))
    assert len(conversation.pictures) == 1


@pytest.mark.parametrize("key", ["image_url", "image", "path", "url"])
def test_openai_picture_parts_may_name_their_picture_in_each_way_in_use(key):
    part = {"type": "image_url" if key == "image_url" else "image", key: "square.png"}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]

    assert read_row({"messages": turns}, FIND).pictures[0].path == IMAGES / "square.png"


@pytest.mark.parametrize("key", ["image", "images"])
def test_picture_parts_without_a_picture_take_those_of_the_row_in_order(key):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": "A"},
    ]

    conversation = read_row({"messages": turns, key: ["wide.png", "tall.png"]}, FIND)

    assert [picture.path.name for picture in conversation.pictures] == ["wide.png", "tall.png"]
    assert conversation.messages[0].content == (IMAGE, "\n", "and", IMAGE, "\n")


def test_a_data_uri_is_a_picture():
    content = (IMAGES / "square.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()

    picture = FIND(uri)

    assert picture.read_bytes() == content
    assert picture.read().size == FIND("square.png").read().size


def test_pictures_and_texts_put_the_pictures_first():
    turns = [{"user": "Which <image>?", "assistant": "The first."}, {"user": "Sure?", "assistant": "Yes."}]

    conversation = read_row({"images": ["wide.png", "tall.png"], "texts": turns}, FIND)

    assert conversation.messages[0] == user("Which <image>?", 2)
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("key", ["caption", "text"])
def test_captions_are_answers_to_a_prompt(key):
    row = {"file_name": "square.png", key: "A square."}

    conversation = read_row(row, FIND, caption_prompt="Say what you see.")

    assert conversation.messages == (user("Say what you see.", 1), assistant("A square."))


def test_a_question_may_come_last_and_is_not_learned(checkpoint, tmp_path):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}, {"from": "human", "value": "And?"}]

    example = dataset_of(checkpoint, [{"conversations": turns}], tmp_path)[0]

    learned = [label for label in example.labels if label != IGNORE]
    assert checkpoint.tokenizer.detokenize(learned) == "A\n"


def test_questions_and_answers_are_turns():
    row = {"image": {"bytes": (IMAGES / "gray.png").read_bytes(), "path": None}, "question": "What?", "answer": "Grey."}

    conversation = read_row(row, FIND)

    assert conversation.messages == (user("What?", 1), assistant("Grey."))
    assert conversation.pictures[0].read().mode == "RGB"


ASK, SAY = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
LOOK = {"from": "human", "value": "<image> Q"}
TEXT_TURNS = [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "square.png", "conversations": [ASK, SAY]}, "0 <image> marks for 1 pictures"),
        ({"conversations": [LOOK, SAY]}, "1 <image> marks for 0 pictures"),
        ({"image": "square.png", "conversations": [LOOK, SAY, LOOK, SAY]}, "2 <image> marks for 1 pictures"),
        ({"conversations": []}, "expected an object with a list `conversations`"),
        ({"messages": []}, "`messages` must be a list"),
        ({"texts": {}}, "`texts` must be a list"),
        ({}, "it has nothing"),
        ({"caption": "of nothing"}, "or a picture and its `caption`; it has caption"),
        ({"image": "square.png", "caption": 3}, "`caption` must be a text"),
        ({"image": "square.png", "question": "Q"}, "must be texts, got 'Q' and None"),
        ([], "expected an object, got list"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "each turn needs `from`"),
        ({"conversations": [{"from": "human"}]}, "each turn needs `from`"),
        ({"conversations": ["Q"]}, "each turn needs `from`"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "`content` must be"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more picture parts than pictures"),
        ({"images": ["square.png"], "messages": [{"role": "user", "content": "<image>"}]}, "1 of 1 pictures have no"),
        ({"conversations": [SAY, ASK]}, "turns must be user, assistant"),
        ({"conversations": [ASK]}, "with an answer; got user"),
        ({"conversations": [ASK, ASK, SAY]}, "got user, user, assistant"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "turns must be"),
        ({"conversations": [ASK, {"from": "gpt", "value": " "}]}, "turn 2 is an empty answer"),
        ({"conversations": [{"from": "human", "value": ""}, SAY]}, "turn 1 is an empty question"),
        ({"image": 3, "conversations": [LOOK, SAY]}, "a name or a list of names"),
        ({"image": [3], "conversations": [LOOK, SAY]}, "must be a name, bytes or a data: address"),
        ({"image": "nope.png", "conversations": [LOOK, SAY]}, r"there is no picture .*nope\.png"),
        ({"image": "https://x.org/a.png", "conversations": [LOOK, SAY]}, "is an address; download it"),
        ({"video": "a.mp4", "conversations": [ASK, SAY]}, "`video` is not read"),
        ({"image": "square.png", "messages": TEXT_TURNS}, "1 of 1 pictures have no picture part"),
        ({"images": "square.png", "messages": TEXT_TURNS}, "1 of 1 pictures have no picture part"),
        ({"messages": [TEXT_TURNS[0], TEXT_TURNS[1] | {"weight": 0}]}, "a `weight` of 0 is not read"),
        ({"messages": [TEXT_TURNS[0], TEXT_TURNS[1] | {"tool_calls": [{"id": "a"}]}]}, "`tool_calls` is not read"),
        ({"image": "data:image/png,abc", "conversations": [LOOK, SAY]}, "must be base64"),
        ({"image": "data:image/png;base64,a*b", "conversations": [LOOK, SAY]}, "is not base64"),
    ],
)
def test_C6_rows_that_are_not_right_say_why(row, message):
    with pytest.raises(InputError, match=message) as caught:
        read_row(row, FIND)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/passwd", "C:\\a.png", "b\\..\\a.png", "a\0b.png"])
def test_no_name_leads_out_of_the_folder_of_pictures(name):
    with pytest.raises(InputError, match="leads out of --image-folder"):
        FIND(name)


def test_whole_paths_are_read_when_the_user_allows_it_but_dots_are_not(tmp_path):
    find = PictureFolder(folder=tmp_path, allow_absolute=True).find

    assert find(str(IMAGES / "square.png")).read().width > 0
    with pytest.raises(InputError, match="leads out"):
        find(f"{IMAGES}/../images/square.png")


def test_C6_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_PICTURE_BYTES + 1)
    picture = PictureFolder(folder=tmp_path).find("a.png")

    with pytest.raises(InputError, match=r"a\.png has 268,435,457 bytes, more than 268,435,456"):
        picture.read_bytes()


def test_C6_a_picture_of_too_many_pixels_is_not_decoded():
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    body = zlib.compress(bytes(1000))
    bomb += struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))

    with pytest.raises(InputError, match="20000 x 20000 pixels are more than the limit"):
        FIND("data:image/png;base64," + base64.b64encode(bomb).decode()).read()


def test_a_pipe_is_no_picture_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    find = PictureFolder(folder=tmp_path).find

    with pytest.raises(InputError, match="there is no picture"):
        find("pipe.png")


def test_C6_a_sample_that_is_too_long_is_named_and_not_cut(checkpoint, tmp_path):
    turns = [ASK, {"from": "gpt", "value": "long " * 100}]
    dataset = dataset_of(checkpoint, [{"conversations": turns}], tmp_path, max_tokens=64)

    with pytest.raises(InputError, match=r"data\.json row 0: \d+ tokens, .* are more than 64; raise --max-tokens"):
        _ = dataset[0]


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_C6_a_picture_that_is_no_picture_is_named_with_its_row(checkpoint, tmp_path, damage):
    content = (IMAGES / "photo.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2] if damage == "cut" else b"hello")
    row = {"image": str(tmp_path / "a.jpg"), "conversations": [LOOK, SAY]}
    dataset = dataset_of(checkpoint, [row], tmp_path, allow_absolute=True)

    with pytest.raises(InputError, match=r"data\.json row 0: .*a\.jpg: "):
        _ = dataset[0]
