"""The Predictor: answers, streams, chats, features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm import predict
from fastvlm.errors import ContextError, InputError
from fastvlm.generate import generate
from fastvlm.options import GenerationOptions, ImageOptions
from fastvlm.prompt import Detokenizer, assistant, tokenize, user
from fastvlm.reuse import Reuse

GOLDENS = Path(__file__).parents[1] / "goldens"
PHOTO = GOLDENS / "images" / "photo.jpg"
SQUARE = GOLDENS / "images" / "square.png"
SHORT = GenerationOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def predictor():
    return predict.load(GOLDENS / "apple_tiny", device="cpu", dtype="float32")


def test_an_answer_says_how_it_was_made(predictor):
    answer = predictor.ask("Describe the image in detail.", [PHOTO], options=SHORT)

    assert answer.completion_tokens == len(answer.token_ids) == 12
    assert answer.finish_reason == "length"
    assert answer.image_tokens == 16
    assert answer.prompt_tokens == 44
    assert (answer.device, answer.dtype) == ("cpu", "float32")
    timings = answer.timings_ms
    assert 0 < timings.preprocess + timings.encode + timings.prefill <= timings.ttft + 1 <= timings.total + 1


def test_streamed_pieces_are_the_whole_text(predictor):
    stream = predictor.stream("Describe the image in detail.", [PHOTO], options=SHORT)

    pieces = list(stream)

    assert len(pieces) > 1
    assert stream.answer is not None
    assert (
        "".join(pieces)
        == stream.answer.text
        == predictor.ask("Describe the image in detail.", [PHOTO], options=SHORT).text
    )


@pytest.mark.parametrize("name", ["square.png", "exif6.jpg", "alpha.png", "gray.png", "sixteen.png"])
@pytest.mark.parametrize("rules", [{}, {"exif": "ignore"}, {"alpha": "white"}])
def test_a_picture_is_the_same_as_path_bytes_and_image(predictor, name, rules, tmp_path):
    path = GOLDENS / "images" / name
    if name == "sixteen.png":
        path = tmp_path / name
        Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(path)
    options = ImageOptions(**rules)

    expected = predictor.pixels(path, options)

    with Image.open(path) as opened:
        for source in (str(path), path.read_bytes(), opened):
            torch.testing.assert_close(predictor.pixels(source, options), expected, atol=0, rtol=0)


@pytest.mark.parametrize("images", [str(PHOTO), PHOTO, PHOTO.read_bytes(), None])
def test_what_is_no_list_of_pictures_is_refused(predictor, images):
    with pytest.raises(InputError, match="images must be a list of pictures, got one "):
        predictor.ask("What is this?", images)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.uint8), "expected a path, bytes, a file or a Pillow image, got ndarray"),
        (None, "got NoneType"),
        ("https://example.com/cat.jpg", "fastvlm.fetch.read_url gives the bytes of an address"),
    ],
)
def test_what_is_no_picture_is_named(predictor, image, words):
    with pytest.raises(InputError, match=words):
        predictor.ask("What is this?", [image])


@pytest.mark.parametrize("prompt", [None, 5, b"Hello"])
def test_a_question_that_is_no_text_is_refused(predictor, prompt):
    with pytest.raises(InputError, match=f"holds {type(prompt).__name__}; expected text"):
        predictor.ask(prompt)


def test_an_image_with_too_many_pixels_is_refused_too(predictor):
    with pytest.raises(InputError, match="more than the limit of 50"):
        predictor.pixels(Image.new("RGB", (10, 10)), ImageOptions(max_pixels=50))


def test_an_image_that_was_given_stays_as_it_is(predictor):
    with Image.open(GOLDENS / "images" / "exif6.jpg") as image:
        before = dict(image.getexif())
        predictor.pixels(image, ImageOptions())

        assert dict(image.getexif()) == before


def test_a_later_turn_answers_as_if_the_whole_conversation_was_read(predictor):
    chat = predictor.chat(options=SHORT)
    first = chat.ask("How many cats are there?", [SQUARE])
    second = chat.ask("And dogs?")
    third = chat.ask("Compare it with this one.", [PHOTO])

    counts = predictor.config.vision.num_image_tokens
    pixels = torch.cat([predictor.pixels(path, ImageOptions()) for path in (SQUARE, PHOTO)])
    with torch.inference_mode():
        embeds = predictor.model.encode(pixels)

    def whole(messages, num_images):
        # Answers may hold half characters, so the conversation is put together from ids.
        ids = tokenize(messages[:1], predictor.tokenizer, counts).token_ids
        for answer, message in zip(messages[1::2], messages[2::2], strict=True):
            ids += [*answer, predictor.tokenizer.im_end_id]
            ids += predict.tokenize_follow_up(message, predictor.tokenizer, counts).token_ids
        return generate(predictor.model, predictor.tokenizer, [ids], embeds[:num_images], SHORT)[0].token_ids

    turns = [user("How many cats are there?", 1), first.token_ids, user("And dogs?"), second.token_ids]
    assert second.token_ids == whole(turns[:3], 1)
    assert third.token_ids == whole([*turns, user("Compare it with this one.", 1)], 2)


def test_a_later_turn_encodes_no_picture_again(predictor):
    predictor.reuse = Reuse()
    seen = []
    hook = predictor.model.vision.register_forward_hook(lambda *_: seen.append(1))
    chat = predictor.chat(options=SHORT)

    chat.ask("How many cats are there?", [SQUARE])
    chat.ask("And dogs?")
    hook.remove()

    assert len(seen) == 1


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(predictor):
    chat, untouched = predictor.chat(options=SHORT), predictor.chat(options=SHORT)
    chat.ask("Hello")
    untouched.ask("Hello")

    with pytest.raises(InputError):
        chat.ask("What is this?", [GOLDENS / "cases.json"])
    with pytest.raises(ContextError):
        chat.ask("word " * 40_000)

    assert chat.ask("And now?").token_ids == untouched.ask("And now?").token_ids


def test_a_turn_interrupted_while_it_is_read_leaves_the_conversation_as_it_was(predictor):
    chat, untouched = predictor.chat(options=SHORT), predictor.chat(options=SHORT)
    chat.ask("Hello")
    untouched.ask("Hello")

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = predictor.model.language.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("And now?")
    hook.remove()

    assert chat.ask("And now?").token_ids == untouched.ask("And now?").token_ids


def test_a_reader_that_leaves_early_may_ask_on(predictor):
    chat = predictor.chat(options=SHORT)
    pieces = chat.stream("Hello")
    next(pieces)
    del pieces

    answer = chat.ask("And now?")

    tokenizer = predictor.tokenizer
    first = generate(predictor.model, tokenizer, [tokenize([user("Hello")], tokenizer, 16).token_ids], None, SHORT)[0]
    # The reader took one piece: so many tokens had been written when it left.
    detokenizer = Detokenizer(tokenizer)
    written = next(n for n, id_ in enumerate(first.token_ids, 1) if detokenizer.push(id_))
    ids = [*tokenize([user("Hello")], tokenizer, 16).token_ids, *first.token_ids[:written], tokenizer.im_end_id]
    ids += predict.tokenize_follow_up(user("And now?"), tokenizer, 16).token_ids
    assert answer.token_ids == generate(predictor.model, tokenizer, [ids], None, SHORT)[0].token_ids


def test_beams_answer_one_turn_and_refuse_a_second(predictor):
    chat = predictor.chat(options=GenerationOptions(max_new_tokens=4, num_beams=3))
    chat.ask("Hello", [PHOTO])

    with pytest.raises(InputError, match="second turn"):
        chat.ask("And now?")


def test_encode_image_gives_features_embeddings_and_the_clip_embedding(predictor):
    features = predictor.encode_image(PHOTO)

    assert features.features.shape == (16, 512)
    assert features.image_embeds.shape == (16, 128)
    assert features.clip_embedding is not None
    assert features.clip_embedding.shape == (48,)


def test_a_smaller_picture_makes_fewer_tokens(predictor):
    answer = predictor.ask("What?", [PHOTO], options=SHORT, image_options=ImageOptions(image_size=128))

    assert answer.image_tokens == 4


@pytest.mark.parametrize("size", [100, 0, -64])
def test_a_size_that_is_no_multiple_of_64_is_refused(predictor, size):
    with pytest.raises(InputError, match="image_size must be"):
        predictor.ask("What?", [PHOTO], image_options=ImageOptions(image_size=size))


def test_typed_marks_are_text_and_no_picture_slots(predictor):
    plain = predictor.ask("<image><|im_end|>", options=SHORT)

    assert plain.image_tokens == 0
    messages = [user("<image><|im_end|>")]
    ids = tokenize(messages, predictor.tokenizer, 16).token_ids
    assert predictor.tokenizer.image_id not in ids
    assert ids.count(predictor.tokenizer.im_end_id) == 2  # of the system prompt and of the turn
    assert plain.prompt_tokens == len(ids)


def test_assistant_history_is_rendered_by_the_template(predictor):
    ids = tokenize([user("a"), assistant("b"), user("c")], predictor.tokenizer, 16).token_ids

    assert ids.count(predictor.tokenizer.im_start_id) == 5
