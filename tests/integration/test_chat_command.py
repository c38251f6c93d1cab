"""`fastvlm chat`: lines in, answers out; pictures are encoded once, the conversation is kept."""

import io
import sys

import pytest

import fastvlm
from fastvlm import cli
from fastvlm.chat import Conversation, Surroundings
from fastvlm.errors import ContextError, InputError
from fastvlm.image import read

SHORT = fastvlm.GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def predictor(tiny):
    return fastvlm.load(tiny, device="cpu", dtype="float32")


class Desk:
    """Collects what a conversation says."""

    def __init__(self, predictor, *, is_interactive=True, system=None):
        self.text, self.notes, self.answers = "", [], []
        self.conversation = Conversation(
            predictor,
            Surroundings(
                write=self.write,
                note=self.notes.append,
                read_image=read,
                is_interactive=is_interactive,
                answered=self.answers.append,
            ),
            system=system,
            options=SHORT,
        )

    def write(self, text):
        self.text += text


def test_turns_are_answered_as_a_chat_answers_them(predictor, photo):
    desk = Desk(predictor)

    desk.conversation.run([f"/image {photo}\n", "What is this?\n", "\n", "And now?\n"])

    chat = predictor.chat(options=SHORT)
    expected = [chat.ask("What is this?", [photo]), chat.ask("And now?")]
    assert [answer.token_ids for answer in desk.answers] == [answer.token_ids for answer in expected]
    assert desk.text == "".join(f"{answer.text}\n" for answer in expected)
    assert [answer.image_tokens for answer in desk.answers] == [16, 0]


def test_a_reset_forgets(predictor, photo):
    desk = Desk(predictor)

    desk.conversation.run(["Hello", f"/image {photo}", "/reset", "Hello"])

    assert desk.answers[0].token_ids == desk.answers[1].token_ids
    assert desk.answers[0].prompt_tokens == desk.answers[1].prompt_tokens


def test_a_system_prompt_begins_anew_and_can_be_seen(predictor):
    desk = Desk(predictor)

    desk.conversation.run(["Hello", "/system Be brief.", "/system", "Hello"])

    assert desk.answers[1].token_ids == predictor.ask("Hello", system_prompt="Be brief.", options=SHORT).token_ids
    assert any("Be brief." in note for note in desk.notes)


def test_a_doubled_slash_is_a_question(predictor):
    desk = Desk(predictor)

    desk.conversation.run(["//reset"])

    assert desk.answers[0].token_ids == predictor.ask("/reset", options=SHORT).token_ids


@pytest.mark.parametrize("end", ["/quit", "/exit"])
def test_quitting_ends(predictor, end):
    desk = Desk(predictor)

    desk.conversation.run([end, "Hello"])

    assert desk.answers == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/imge x.png", "did you mean /image?"),
        ("/xyzzy", "see /help"),
        ("/image", "needs a path"),
    ],
)
def test_a_wrong_line_is_said_and_the_conversation_goes_on(predictor, line, words):
    desk = Desk(predictor)

    desk.conversation.run([line, "Hello"])

    assert words in desk.notes[0]
    assert len(desk.answers) == 1


def test_where_nobody_can_mend_it_a_wrong_line_ends_the_conversation(predictor):
    desk = Desk(predictor, is_interactive=False)

    with pytest.raises(InputError):
        desk.conversation.run(["/xyzzy", "Hello"])


def test_a_question_that_does_not_fit_changes_nothing(predictor):
    desk = Desk(predictor)
    desk.conversation.take("Hello")

    with pytest.raises(ContextError):
        desk.conversation.take("word " * 40_000)

    desk.conversation.take("And now?")
    chat = predictor.chat(options=SHORT)
    chat.ask("Hello")
    assert desk.answers[-1].token_ids == chat.ask("And now?").token_ids


def test_help_names_every_command(predictor):
    desk = Desk(predictor)

    desk.conversation.take("/help")

    for word in ("/image", "/reset", "/system", "/help", "/quit"):
        assert word in desk.notes[0]


def test_a_piped_chat_gives_answers_alone(capsys, monkeypatch, predictor, tiny, photo):
    lines = f"/image {photo}\nWhat is this?\nAnd now?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    args = ["--model", str(tiny), "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "5"]

    status = cli.main(["chat", *args])

    out, err = capsys.readouterr()
    chat = predictor.chat(options=SHORT)
    assert status == 0
    assert out == f"{chat.ask('What is this?', [photo]).text}\n{chat.ask('And now?').text}\n"
    assert "TTFT" not in err


def test_a_picture_of_the_command_line_goes_with_the_first_question(capsys, monkeypatch, predictor, tiny, photo):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is this?\n")))
    args = ["--model", str(tiny), "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "5"]

    cli.main(["chat", *args, "--image", str(photo)])

    assert capsys.readouterr().out == f"{predictor.ask('What is this?', [photo], options=SHORT).text}\n"


@pytest.mark.parametrize("lines", [b"/image nowhere.png\n", b"/image -\n", b"/xyzzy\n"])
def test_a_piped_chat_with_a_wrong_line_ends_with_status_two(capsys, monkeypatch, tiny, lines):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))

    status = cli.main(["chat", "--model", str(tiny)])

    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
