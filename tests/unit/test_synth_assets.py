"""The kinds of things, the lock file, and reading and making the folder of fonts, emoji and words."""

import hashlib
import io
import json
import os
import pickle
import re
import stat
import sys
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fastvlm import cli
from fastvlm.errors import DownloadError, InputError
from fastvlm.synth.assets import default_folder, is_heldout_word, lock_digest, read_assets, read_lock
from fastvlm.synth.kinds import KINDS
from fastvlm.train import assets as making
from fastvlm.train.assets import fetch_assets, pin, update_lock

LICENCES = {"OFL-1.1", "Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0"}
PIXELS = b"\x10\x20\x30\xff" * 64


def write_folder(folder: Path, kinds: list[str]) -> Path:
    """A folder as the command would write it, with one font of three bytes and one 8 x 8 sprite a kind."""
    (folder / "fonts").mkdir(parents=True)
    (folder / "fonts" / "a.woff2").write_bytes(b"abc")
    (folder / "words.txt").write_text("cat\ndog\n")
    np.savez_compressed(folder / "emoji.npz", pixels=np.frombuffer(PIXELS * len(kinds), np.uint8))
    sprites = [{"kind": kind, "design": "noto", "height": 8, "width": 8} for kind in kinds]
    font = {"family": "A", "file": "a.woff2", "is_heldout": True, "is_caps_only": False}
    manifest = {"digest": lock_digest(), "fonts": [font], "sprites": sprites}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_npm(folder: Path, script: str) -> None:
    """A program called npm that does what `script` says, in the folder where it is run."""
    folder.mkdir(exist_ok=True)
    path = folder / "npm"
    path.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def folder(real_assets) -> Path:
    """The real assets."""
    return real_assets


def test_kinds_have_distinct_everyday_words_and_distinct_emoji() -> None:
    words = [word for kind in KINDS for word in {kind.name, kind.plural}]
    emoji = [text for kind in KINDS for text in (kind.codepoint, *kind.also)]

    assert len(set(words)) == len(words)
    assert len(set(emoji)) == len(emoji)
    assert all(re.fullmatch("[a-z]+( [a-z]+)?", word) for word in words)


def test_there_are_enough_kinds_and_enough_that_one_counts() -> None:
    assert len(KINDS) >= 90
    assert sum(kind.is_countable for kind in KINDS) >= 45


def test_no_emoji_has_a_skin_tone_or_is_a_flag_or_a_sequence() -> None:
    for kind in KINDS:
        for text in (kind.codepoint, *kind.also):
            bare = text.replace("\N{VARIATION SELECTOR-16}", "")
            assert len(bare) == 1, kind.name
            assert unicodedata.category(bare) == "So", kind.name


def test_every_pinned_package_has_a_digest_an_author_and_an_allowed_licence() -> None:
    for row in read_lock()["packages"]:
        assert re.fullmatch("[0-9a-f]{64}", row["sha256"]), row["name"]
        assert row["author"], row["name"]
        if row["role"] != "renderer":
            assert row["license"] in LICENCES, row["name"]


def test_at_least_sixty_fonts_are_pinned_and_eight_are_held_out() -> None:
    fonts = [row for row in read_lock()["packages"] if row["role"] == "font"]

    assert len(fonts) >= 60
    assert sum(row.get("heldout", False) for row in fonts) == 8
    assert not any(row.get("heldout") and row.get("caps_only") for row in fonts)


def test_the_notice_credits_every_package_of_which_something_is_kept() -> None:
    notice = (Path(__file__).parents[2] / "NOTICE").read_text("utf-8")

    for row in read_lock()["packages"]:
        if row["role"] != "renderer":
            assert row.get("family", row["name"]) in notice, row["name"]


def test_one_word_in_ten_is_held_out_and_always_the_same_ones() -> None:
    words = [f"word{number}" for number in range(5000)]

    assert 0.08 < sum(map(is_heldout_word, words)) / len(words) < 0.12
    assert all(map(is_heldout_word, ("water", "star", "able")))
    assert not any(map(is_heldout_word, ("house", "tree", "dog")))


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "assets", [kind.name for kind in KINDS])

    assets = read_assets(folder)

    assert assets.words == ("cat", "dog")
    assert [(font.family, font.data, font.is_heldout) for font in assets.fonts] == [("A", b"abc", True)]
    assert list(assets.emoji) == [kind.name for kind in KINDS]
    assert assets.emoji["dog"][0].tobytes() == PIXELS
    assert assets.emoji["dog"][0].shape == (8, 8, 4)


def test_assets_survive_being_handed_to_another_process(tmp_path: Path) -> None:
    assets = read_assets(write_folder(tmp_path / "assets", [kind.name for kind in KINDS]))

    again = pickle.loads(pickle.dumps(assets))

    assert again.fonts == assets.fonts
    assert np.array_equal(again.emoji["car"][0], assets.emoji["car"][0])


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `fastvlm data assets`"):
        read_assets(tmp_path / "nothing")


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "assets", [kind.name for kind in KINDS])
    (folder / "manifest.json").write_text(json.dumps({"digest": "0" * 64}))

    with pytest.raises(InputError, match="another version: run `fastvlm data assets`"):
        read_assets(folder)


@pytest.mark.parametrize("name", ["emoji.npz", "words.txt", "fonts/a.woff2"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "assets", [kind.name for kind in KINDS])
    (folder / name).unlink()

    with pytest.raises(InputError, match="damaged"):
        read_assets(folder)


def test_a_cut_file_of_sprites_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "assets", [kind.name for kind in KINDS])
    (folder / "emoji.npz").write_bytes((folder / "emoji.npz").read_bytes()[:100])

    with pytest.raises(InputError, match="damaged"):
        read_assets(folder)


def test_a_folder_that_lacks_a_kind_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "assets", [kind.name for kind in KINDS][1:])

    with pytest.raises(InputError, match="do not agree"):
        read_assets(folder)


def test_the_environment_chooses_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTVLM_ASSETS", str(tmp_path))

    assert default_folder() == tmp_path


def test_without_the_environment_the_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVLM_ASSETS", raising=False)

    assert default_folder().parts[-2:] == ("fastvlm", "assets")


def test_a_complete_folder_is_left_alone_without_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "assets", [kind.name for kind in KINDS])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    assert fetch_assets(folder) == folder


def test_missing_npm_is_one_clear_line_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    with pytest.raises(DownloadError, match=r"npm is not installed: install Node\.js"):
        fetch_assets(tmp_path / "assets")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(InputError, match="holds other files"):
        fetch_assets(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "assets").write_text("mine")

    with pytest.raises(InputError, match="holds other files"):
        fetch_assets(tmp_path / "assets")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a script with a first line")
def test_a_package_that_cannot_be_fetched_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_npm(tmp_path / "bin", "sys.exit('npm error code ENOTFOUND')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    with pytest.raises(DownloadError, match=r"`npm pack .*` failed \(npm error code ENOTFOUND\): check the network"):
        fetch_assets(tmp_path / "there" / "assets")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a script with a first line")
def test_an_archive_with_another_digest_is_refused_unread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_npm(tmp_path / "bin", "open('a.tgz', 'wb').write(b'not an archive')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    with pytest.raises(DownloadError, match="it is not what was pinned"):
        fetch_assets(tmp_path / "there" / "assets")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a script with a first line")
def test_a_client_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_npm(tmp_path / "bin", "import time; time.sleep(30)")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(making, "TIMEOUT", 0.2)

    with pytest.raises(DownloadError, match="took more than"):
        pin([{"name": "a", "version": "1", "role": "font"}])


def test_the_command_that_updates_the_lock_leaves_it_alone_when_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = making.LOCK.read_bytes()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    status = cli.main(["data", "assets", "--update-lock", "--folder", str(tmp_path / "assets")])

    assert status == 2
    assert "npm is not installed" in capsys.readouterr().err
    assert making.LOCK.read_bytes() == before
    assert json.loads(before) == read_lock()
    assert not (tmp_path / "assets").exists()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a script with a first line")
def test_the_lock_file_gets_the_digest_of_what_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_npm(tmp_path / "bin", "open('a.tgz', 'wb').write(b'archive')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"packages": [{"name": "@a/b", "version": "1", "role": "font", "sha256": "0" * 64}]}))

    assert update_lock(lock) == lock

    row = json.loads(lock.read_text())["packages"][0]
    assert row["sha256"] == hashlib.sha256(b"archive").hexdigest()
    assert row["bytes"] == 7


def test_only_the_named_plain_members_of_an_archive_are_read(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tgz", {"../evil": b"x", "package/good": b"y", "/package/good": b"z"})

    assert making._read_members(archive, ["good"]) == {"good": b"y"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_a_link_in_place_of_a_member_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("package/good")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)

    with pytest.raises(DownloadError, match="not a plain file"):
        making._read_members(tmp_path / "a.tgz", ["good"])


def test_an_archive_that_lacks_a_member_says_which(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tgz", {"package/good": b"y"})

    with pytest.raises(DownloadError, match=r"a\.tgz lacks better"):
        making._read_members(archive, ["good", "better"])


def test_sprites_are_cropped_to_what_is_visible_and_shrunk() -> None:
    image = Image.new("RGBA", (400, 400))
    image.paste((255, 0, 0, 255), (100, 50, 300, 350))
    stream = io.BytesIO()
    image.save(stream, "PNG")

    sprite = making._sprite(stream.getvalue(), "a box")

    assert sprite.shape == (128, 85, 4)
    assert tuple(sprite[64, 40]) == (255, 0, 0, 255)


def test_a_blank_drawing_is_refused() -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(stream, "PNG")

    with pytest.raises(DownloadError, match="a box is blank"):
        making._sprite(stream.getvalue(), "a box")


def test_offensive_words_and_their_inflections_are_left_out(tmp_path: Path) -> None:
    bands = {f"package/{d}-words-{b}.json": b"[]" for d in making.WORD_DIALECTS for b in making.WORD_BANDS}
    bands["package/english-words-10.json"] = json.dumps(["the", "darned", "b", "don't", "a", "tree"]).encode()
    bands["package/american-words-35.json"] = json.dumps(["zebra", "heckling", "tree"]).encode()
    archives = {
        "words": write_archive(tmp_path / "w.tgz", bands),
        "list": write_archive(tmp_path / "l.tgz", {"package/en.json": b'["darn"]'}),
        "rated": write_archive(tmp_path / "r.tgz", {"package/index.js": b"x = {\n  heckle: 2,\n  tree: 0\n}"}),
    }
    blocklists = [{"name": "list", "file": "en.json"}, {"name": "rated", "file": "index.js"}]

    assert making._words([{"name": "words"}], blocklists, archives) == ["a", "the", "tree", "zebra"]


def test_the_real_folder_is_small_and_read_within_a_second(folder: Path) -> None:
    start = time.process_time()  # others may use the machine at the same time
    read_assets(folder)

    assert time.process_time() - start < 1
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6


def test_every_kind_comes_in_several_designs_of_a_sensible_size(folder: Path) -> None:
    for name, sprites in read_assets(folder).emoji.items():
        assert len(sprites) >= 4, name
        for sprite in sprites:
            assert sprite.dtype == np.uint8, name
            assert 64 <= max(sprite.shape[:2]) <= 128, name
            assert (sprite[..., 3] > 127).mean() > 0.05, name


def test_every_font_draws_every_letter_and_digit_differently(folder: Path) -> None:
    for font in read_assets(folder).fonts:
        face = ImageFont.truetype(io.BytesIO(font.data), 24)
        drawn = set()
        for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
            image = Image.new("L", (96, 96))
            ImageDraw.Draw(image).text((24, 24), character, font=face, fill=255)
            assert image.getbbox() is not None, (font.family, character)
            drawn.add(image.tobytes())
        assert len(drawn) >= 35, font.family


def test_the_real_words_are_plain_everyday_ones(folder: Path) -> None:
    words = read_assets(folder).words

    assert 8000 <= len(words) <= 40000
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]{1,14}", word) for word in words)
    assert {"water", "house", "because", "butterfly"} <= set(words[:20000])
