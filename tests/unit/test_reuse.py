"""What is kept from question to question: the answers stay what they were, and less is computed."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm import predict
from fastvlm.config import LanguageConfig
from fastvlm.errors import ContextError, InputError
from fastvlm.generate import PREFILL_CHUNK, make_cache
from fastvlm.model.cache import KVCache
from fastvlm.options import GenerationOptions, ImageOptions, ReuseOptions
from fastvlm.prompt import DEFAULT_SYSTEM, system, tokenize, user
from fastvlm.reuse import FeatureCache, PrefixCache, Reuse, identify

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = GOLDENS / "images"
PHOTO, SQUARE, WIDE, TURNED = (IMAGES / name for name in ("photo.jpg", "square.png", "wide.png", "exif6.jpg"))
SHORT = GenerationOptions(max_new_tokens=12)
NOTHING = ReuseOptions(feature_cache=0, prefix_cache=0)
CONFIG = LanguageConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=8, vocab_size=50, tied=True)
POSITION_BYTES = 2 * 2 * 4 * 4  # keys and values, layers, width of the head, float32


@pytest.fixture(scope="module")
def predictor():
    return predict.load(GOLDENS / "apple_tiny", device="cpu", dtype="float32")


@pytest.fixture
def work(predictor):
    """Counts what is computed: pictures encoded, and positions read before each answer's first token."""
    predictor.reuse = Reuse()
    done = {"pictures": 0, "read": 0}

    def encode(_, arguments):
        done["pictures"] += len(arguments[0])

    def read(_, arguments):
        done["read"] += arguments[0].shape[1] if arguments[0].shape[1] > 1 else 0

    hooks = [
        predictor.model.vision.register_forward_pre_hook(encode),
        predictor.model.language.register_forward_pre_hook(read),
    ]
    yield done
    for hook in hooks:
        hook.remove()


def ask(predictor, question, images=(), *, system_prompt=None, **rules):
    return predictor.ask(
        question, images, system_prompt=system_prompt, options=SHORT, image_options=ImageOptions(**rules)
    )


def ask_anew(predictor, *args, **options):
    kept, predictor.reuse = predictor.reuse, Reuse(NOTHING)
    answer = ask(predictor, *args, **options)
    predictor.reuse = kept
    return answer


# What was asked before, what is asked now, pictures that must be encoded for it, whether pictures are read again.
@pytest.mark.parametrize(
    ("before", "now", "num_pictures", "is_read_again"),
    [
        (("What is this?", [PHOTO], {}), ("How many cats are there?", [PHOTO], {}), 0, False),
        (("What is this?", [PHOTO], {}), ("What is this?", [PHOTO], {}), 0, False),
        (("What is this?", [PHOTO], {}), ("What is this?", [SQUARE], {}), 1, True),
        (("What is this?", [PHOTO], {}), ("What is this?", [PHOTO], {"system_prompt": "Be brief."}), 0, True),
        (("Compare", [PHOTO, SQUARE], {}), ("Compare", [SQUARE, PHOTO], {}), 0, True),
        (("Compare", [PHOTO], {}), ("Compare", [PHOTO, SQUARE], {}), 1, False),
        (("Compare", [PHOTO, SQUARE], {}), ("Compare", [PHOTO, PHOTO], {}), 0, False),
        (("What is this?", [PHOTO], {}), ("What is this?", [PHOTO], {"image_size": 128}), 1, True),
        (("What is this?", [WIDE], {}), ("What is this?", [WIDE], {"fit": "crop"}), 1, True),
        (("What is this?", [WIDE], {"fit": "stretch"}), ("What is this?", [WIDE], {}), 1, True),
        (("What is this?", [TURNED], {}), ("What is this?", [TURNED], {"exif": "ignore"}), 1, True),
        (("What is this?", [IMAGES / "alpha.png"], {}), ("And?", [IMAGES / "alpha.png"], {"alpha": "white"}), 1, True),
    ],
)
def test_an_answer_is_what_it_is_without_reuse(predictor, work, before, now, num_pictures, is_read_again):
    expected = ask_anew(predictor, now[0], now[1], **now[2])
    ask(predictor, before[0], before[1], **before[2])
    work.update(pictures=0, read=0)

    answer = ask(predictor, now[0], now[1], **now[2])

    assert answer.token_ids == expected.token_ids
    assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)
    assert (answer.prompt_tokens, answer.image_tokens) == (expected.prompt_tokens, expected.image_tokens)
    assert work["pictures"] == num_pictures
    num_known = answer.prompt_tokens - max(1, work["read"])  # a single position is not counted
    messages = [system(now[2].get("system_prompt", DEFAULT_SYSTEM)), user(now[0], len(now[1]))]
    num_each = answer.image_tokens // len(now[1])
    start = tokenize(messages, predictor.tokenizer, num_each).token_ids.index(predictor.tokenizer.image_id)
    assert 0 < num_known <= start if is_read_again else num_known >= start + num_each


def test_the_answers_that_are_compared_depend_on_what_changes(predictor):
    answers = {
        tuple(ask_anew(predictor, question, images, **rules).token_ids)
        for question, images, rules in [
            ("What is this?", [PHOTO], {}),
            ("How many cats are there?", [PHOTO], {}),
            ("What is this?", [SQUARE], {}),
            ("What is this?", [PHOTO], {"system_prompt": "Be brief."}),
            ("What is this?", [PHOTO], {"image_size": 128}),
            ("Compare", [PHOTO, SQUARE], {}),
            ("Compare", [SQUARE, PHOTO], {}),
        ]
    }

    assert len(answers) == 7


def test_a_picture_that_comes_several_times_is_encoded_once(predictor, work):
    predictor.reuse = Reuse(NOTHING)
    sources = [PHOTO, str(PHOTO), PHOTO.read_bytes(), io.BytesIO(PHOTO.read_bytes()), PHOTO.open("rb"), PHOTO]
    sources[3].seek(100)  # wherever it stands

    ask(predictor, "Compare", sources)
    sources[4].close()

    assert work["pictures"] == 1


def test_pictures_that_came_open_are_known_by_their_pixels(predictor, work):
    red, green = (Image.new("RGB", (64, 32), colour) for colour in ("red", "green"))
    same = Image.new("RGB", (64, 32), "red")
    turned = Image.new("RGB", (32, 64), "red")
    paletted = red.convert("P")

    ask(predictor, "Compare", [red, same, green, turned, paletted])

    assert work["pictures"] == 3


def test_a_file_that_changes_under_its_name_is_another_picture(predictor, work, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(PHOTO.read_bytes())
    ask(predictor, "What is this?", [path])
    path.write_bytes(SQUARE.read_bytes())

    answer = ask(predictor, "What is this?", [path])

    assert work["pictures"] == 2
    assert answer.token_ids == ask_anew(predictor, "What is this?", [SQUARE]).token_ids


def test_a_known_picture_is_refused_for_what_it_is_as_before(predictor):
    predictor.reuse = Reuse()
    ask(predictor, "What is this?", [PHOTO])

    with pytest.raises(InputError, match="more than the limit of 50"):
        ask(predictor, "What is this?", [PHOTO], max_pixels=50)


def test_weights_of_another_format_share_nothing(predictor):
    questions = ["What is this?", "How many cats are there?"]
    other = predict.load(GOLDENS / "apple_tiny", device="cpu", dtype="bfloat16")
    expected = [ask_anew(each, question, [PHOTO]).token_ids for each in (predictor, other) for question in questions]
    predictor.reuse = other.reuse = Reuse()

    answers = [ask(each, question, [PHOTO]).token_ids for each in (predictor, other) for question in questions]

    assert answers == expected


@pytest.mark.parametrize("part", ["projector.fc2", "language.layers.0.mlp.down_proj"])
def test_weights_that_change_in_place_forget_what_they_made(predictor, part):
    predictor.reuse = Reuse()
    before = ask(predictor, "What is this?", [PHOTO])
    weight = predictor.model.get_submodule(part).weight
    with torch.no_grad():
        saved = weight.clone()
        weight[:, -1] += 3.0

    after = ask(predictor, "What is this?", [PHOTO])

    expected = ask_anew(predictor, "What is this?", [PHOTO])
    with torch.no_grad():
        weight.copy_(saved)
    assert after.token_ids == expected.token_ids != before.token_ids


def test_a_conversation_that_begins_as_another_is_not_read_again(predictor, work):
    first = predictor.chat(options=SHORT)
    first.ask("What is this?", [PHOTO])
    first.ask("And now?")
    read = work["read"]

    second = predictor.chat(options=SHORT)
    answers = [second.ask("What is this?", [PHOTO]), second.ask("Why?")]

    predictor.reuse = Reuse(NOTHING)
    third = predictor.chat(options=SHORT)
    expected = [third.ask("What is this?", [PHOTO]), third.ask("Why?")]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert read > 2 * answers[0].image_tokens  # the second conversation read one position of its first turn


def test_what_a_reader_left_early_is_kept_as_far_as_it_was_read(predictor, work):
    pieces = predictor.stream("What is this?", [PHOTO], options=SHORT)
    next(pieces)
    del pieces

    answer = ask(predictor, "What is this?", [PHOTO])

    assert answer.token_ids == ask_anew(predictor, "What is this?", [PHOTO]).token_ids


def test_what_is_known_may_end_inside_a_picture(predictor, work):
    ask(predictor, "What is this?", [PHOTO])
    tokenizer, before = predictor.tokenizer, predictor.reuse
    (picture,) = predictor.look([PHOTO], ImageOptions(), before.fingerprint(predictor.model))
    ids = tokenize([user("What is this?", 1)], tokenizer, 16).token_ids
    positions = identify(ids, tokenizer.image_id, [16], [picture.key])[: ids.index(tokenizer.image_id) + 5]
    cache = make_cache(predictor.model, 1, len(positions))
    before.prefixes.find(before.fingerprint(predictor.model), positions).write(cache)
    predictor.reuse = Reuse()
    predictor.reuse.prefixes.keep(predictor.reuse.fingerprint(predictor.model), positions, cache)
    work["read"] = 0

    answer = ask(predictor, "What is this?", [PHOTO])

    assert work["read"] == answer.prompt_tokens - len(positions)
    assert answer.token_ids == ask_anew(predictor, "What is this?", [PHOTO]).token_ids


def test_a_prompt_longer_than_a_chunk_goes_on_from_what_is_known(predictor, work):
    text = "word " * (PREFILL_CHUNK // 2)
    ask(predictor, text + "one")
    work["read"] = 0

    answer = ask(predictor, text + "two")

    assert answer.prompt_tokens > PREFILL_CHUNK
    assert work["read"] < 100
    assert answer.token_ids == ask_anew(predictor, text + "two").token_ids


def test_beams_find_the_same_with_known_pictures(predictor, work):
    options = GenerationOptions(max_new_tokens=4, num_beams=3)
    expected = predictor.ask("What is this?", [PHOTO], options=options)

    answer = predictor.ask("What is this?", [PHOTO], options=options)

    assert answer.token_ids == expected.token_ids
    assert work["pictures"] == 1


def test_threads_that_ask_together_get_their_own_answers(predictor):
    questions = [(f"What is {i % 3}?", [[PHOTO, SQUARE, WIDE][i % 2]]) for i in range(12)]
    expected = [ask_anew(predictor, *question).token_ids for question in questions]
    predictor.reuse = Reuse()

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda question: ask(predictor, *question).token_ids, questions))

    assert answers == expected


def test_image_embeddings_that_were_not_used_for_longest_go_first():
    cache = FeatureCache(3 * 40)
    for key in (b"a", b"b", b"c"):
        cache.put(key, torch.full((2, 5), float(key[0])))
    assert cache.get(b"a") is not None

    cache.put(b"d", torch.ones(2, 5))
    cache.put(b"large", torch.ones(20, 5))

    assert [key for key in (b"a", b"b", b"c", b"d", b"large") if cache.get(key) is not None] == [b"a", b"c", b"d"]
    assert cache.num_bytes == 120
    cache.clear()
    assert (cache.num_bytes, cache.get(b"a")) == (0, None)


def test_a_row_that_is_kept_does_not_keep_its_batch():
    cache = FeatureCache(1000)
    cache.put(b"a", torch.ones(100, 2, 5)[3])

    kept = cache.get(b"a")

    assert kept is not None
    assert kept.untyped_storage().nbytes() == kept.nbytes == 40


def values_of(positions):
    """Keys and values that tell everything that was read up to them, `(2, L, G, S, E)`."""
    columns = [hash(tuple(positions[: i + 1])) % 1_000_003 for i in range(len(positions))]
    return torch.tensor(columns, dtype=torch.float32)[:, None].expand(2, 2, 1, -1, 4).clone()


def cache_with(positions):
    cache = KVCache(CONFIG, num_rows=2, capacity=16)
    cache.copy_in(1, values_of(positions))
    return cache


POSITIONS = st.lists(st.sampled_from([1, 2, b"picture", b"other"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(POSITIONS, max_size=12), POSITIONS)
def test_the_longest_known_beginning_is_found(known, wanted):
    cache = PrefixCache(1 << 20)
    for positions in known:
        cache.keep(b"scope", positions, cache_with(positions), row=1)

    found = cache.find(b"scope", wanted)

    common = [
        next((i for i, (a, b) in enumerate(zip(one, wanted, strict=False)) if a != b), min(len(one), len(wanted)))
        for one in known
    ]
    assert found.length == max(common, default=0)
    row = KVCache(CONFIG, num_rows=1, capacity=16)
    found.write(row)
    assert row.lengths == [found.length]
    assert torch.equal(row.copy_out(0, 0, found.length), values_of(wanted[: found.length]))
    beginnings = {tuple(positions[:i]) for positions in known for i in range(1, len(positions) + 1)}
    assert cache.num_bytes == len(beginnings) * POSITION_BYTES  # what is common is kept once
    assert cache.find(b"other weights", wanted).length == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(POSITIONS, max_size=20), st.integers(0, 30))
def test_a_small_cache_forgets_and_never_errs(known, room):
    cache = PrefixCache(room * POSITION_BYTES)
    for positions in known:
        cache.keep(bytes([len(positions) % 2]), positions, cache_with(positions), row=1)

        assert cache.num_bytes <= cache.max_bytes
        found = cache.find(bytes([len(positions) % 2]), positions)
        assert found.length == len(positions) or len(positions) > room
        row = KVCache(CONFIG, num_rows=1, capacity=16)
        found.write(row)
        assert torch.equal(row.copy_out(0, 0, found.length), values_of(positions[: found.length]))
    cache.clear()
    assert cache.num_bytes == 0


def test_what_was_used_last_stays():
    cache = PrefixCache(6 * POSITION_BYTES)
    for positions in ([1, 1], [2, 2], [3, 3]):
        cache.keep(b"", positions, cache_with(positions), row=1)
    cache.find(b"", [1, 1])

    cache.keep(b"", [4, 4], cache_with([4, 4]), row=1)

    assert [cache.find(b"", [i, i]).length for i in (1, 2, 3, 4)] == [2, 0, 2, 2]


def test_threads_may_keep_and_find_together():
    cache = PrefixCache(40 * POSITION_BYTES)
    wrong = []

    def work(seed):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(100):
            positions = torch.randint(3, (8,), generator=draw).tolist()
            found = cache.find(b"", positions)
            row = KVCache(CONFIG, num_rows=1, capacity=16)
            found.write(row)
            if not torch.equal(row.copy_out(0, 0, found.length), values_of(positions[: found.length])):
                wrong.append(positions)
            cache.keep(b"", positions, cache_with(positions), row=1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert cache.num_bytes <= cache.max_bytes


def test_a_row_that_is_full_takes_no_more():
    cache = KVCache(CONFIG, num_rows=1, capacity=4)

    with pytest.raises(ContextError, match="holds 4 positions, 5 are needed"):
        cache.copy_in(0, values_of([1, 2, 3, 4, 5]))


def test_placeholders_become_their_pictures():
    assert identify([7, 0, 0, 8, 0, 9], 0, [2, 1], [b"a", b"b"]) == [7, b"a", b"a", 8, b"b", 9]


@pytest.mark.parametrize("values", [{"feature_cache": -1}, {"prefix_cache": 1.5}, {"prefix_cache": True}])
def test_a_bound_that_is_no_size_is_refused(values):
    with pytest.raises(InputError, match="must be between 0 and"):
        ReuseOptions(**values)
