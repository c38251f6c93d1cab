"""Zips made to harm, and honest ones."""

import json
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from fastvlm.checkpoint.archive import UnpackLimits, check_folder, unpack
from fastvlm.errors import CheckpointError

APPLE_TINY = Path(__file__).parents[1] / "goldens" / "apple_tiny"


def safetensors(header: dict[str, object] | None = None, num_bytes: int = 8) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} if header is None else header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def write_zip(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def honest(*extra: tuple[str | zipfile.ZipInfo, bytes]) -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    return [("top/config.json", b"{}"), ("top/model.safetensors", safetensors()), *extra]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())


def assert_refused(tmp_path: Path, archive: Path, message: str, limits: UnpackLimits | None = None) -> None:
    before = names_in(tmp_path)

    with pytest.raises(CheckpointError, match=message) as caught:
        unpack(archive, tmp_path / "inner" / "model", limits=limits)

    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(archive)) or ".partial" in str(caught.value)
    assert names_in(tmp_path) == before, "something was left behind, or written outside"
    assert list((tmp_path / "inner").iterdir()) == []


@pytest.fixture(autouse=True)
def _inner(tmp_path):
    (tmp_path / "inner").mkdir()


def test_a_checkpoint_in_one_folder_is_unpacked_without_that_folder(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for path in APPLE_TINY.iterdir():
            opened.write(path, f"llava-tiny/{path.name}")

    unpack(archive, tmp_path / "inner" / "model")

    assert names_in(tmp_path / "inner" / "model") == names_in(APPLE_TINY)
    for path in APPLE_TINY.iterdir():
        assert (tmp_path / "inner" / "model" / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_without_a_folder_around_it_is_unpacked_as_it_is(tmp_path):
    archive = write_zip(tmp_path / "a.zip", [("config.json", b"{}"), ("sub/model.safetensors", safetensors())])

    unpack(archive, tmp_path / "inner" / "model")

    assert names_in(tmp_path / "inner" / "model") == ["config.json", "sub/model.safetensors"]


def test_only_data_and_licences_are_kept(tmp_path):
    kept = ["merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE", "LICENSE_MODEL", "ACKNOWLEDGEMENTS"]
    package = ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"]
    dropped = ["modeling.py", "pytorch_model.bin", "training_args.bin", "LICENSE.py", ".DS_Store", "run.sh", "a.pth"]
    archive = write_zip(
        tmp_path / "a.zip",
        honest(
            *((f"top/{name}", b"x") for name in kept + dropped),
            *((f"top/fastvithd.mlpackage/{name}", b"x") for name in [*package, "evil.py"]),
            ("__MACOSX/top/._config.json", b"x"),
            ("top/._model.safetensors", b"x"),
        ),
    )

    unpack(archive, tmp_path / "inner" / "model")

    expected = ["config.json", "model.safetensors", *kept, *(f"fastvithd.mlpackage/{name}" for name in package)]
    assert names_in(tmp_path / "inner" / "model") == sorted(expected)


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.json",
        "top/../../escaped.json",
        "/etc/escaped.json",
        "C:/escaped.json",
        "C:escaped.json",
        "top\\..\\..\\escaped.json",
        "top//escaped.json",
        "./escaped.json",
        "top/escaped.json\x00.safetensors",
        "top/esc\naped.json",
        "top/NUL.json",
        "top/com1",
        "top/escaped.json.",
        "top/escaped.json ",
        "top/" + "x" * 300 + ".json",
        "top/" + "d/" * 600 + "deep.json",
    ],
)
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path, name):
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # past the mending that ZipInfo does
    archive = write_zip(tmp_path / "a.zip", honest((info, b"harm")))

    assert_refused(tmp_path, archive, "not a plain relative name")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO], ids=["symlink", "device", "pipe"])
def test_a_link_or_a_device_is_refused(tmp_path, kind):
    info = zipfile.ZipInfo("top/model.txt")
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    archive = write_zip(tmp_path / "a.zip", honest((info, b"/etc/passwd")))

    assert_refused(tmp_path, archive, "link or a device")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["top/config.json", "top/CONFIG.JSON", "top/config.json/"])
def test_two_entries_of_one_name_are_refused(tmp_path, name):
    archive = write_zip(tmp_path / "a.zip", honest((name, b"")))

    assert_refused(tmp_path, archive, "two entries are named")


def test_an_entry_inside_a_file_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest(("top/config.json/x.json", b"{}")))

    assert_refused(tmp_path, archive, "lies inside a file")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("model.safetensors", safetensors())
        opened.writestr("bomb.json", bytes(8 << 20))
    assert archive.stat().st_size < (8 << 20) / 900

    assert_refused(tmp_path, archive, "'bomb.json' unpacks from .* to 8388608 bytes")


def test_a_bomb_that_hides_its_size_is_stopped(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("model.safetensors", safetensors())
        opened.writestr("bomb.json", bytes(8 << 20))
    content = archive.read_bytes()
    assert content.count(struct.pack("<L", 8 << 20)) == 2  # in the local header, and in the list of contents
    archive.write_bytes(content.replace(struct.pack("<L", 8 << 20), struct.pack("<L", 1000)))

    assert_refused(tmp_path, archive, "CRC")


def test_an_archive_over_the_limit_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest(("top/a.txt", bytes(1000))))

    assert_refused(tmp_path, archive, "expected at most 500", limits=UnpackLimits(max_bytes=500))


def test_ten_thousand_entries_are_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest(*((f"top/{i}.txt", b"") for i in range(5000))))

    assert_refused(tmp_path, archive, "5002 entries, expected at most 4096")


def test_a_million_entries_are_refused_without_reading_them(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest())
    content = archive.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    directory = content[start:end] * 500_000  # 1,000,000 entries, all of them the same two
    with archive.open("wb") as file:
        file.write(content[:start])
        file.write(directory)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), start, 0))
    del directory

    assert_refused(tmp_path, archive, "list of contents has")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path, fraction):
    archive = write_zip(tmp_path / "a.zip", honest())
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * fraction)])

    assert_refused(tmp_path, archive, "not a sound zip")


def test_a_member_whose_content_was_changed_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest(("top/long.txt", b"A" * 1000)))
    archive.write_bytes(archive.read_bytes().replace(b"A" * 1000, b"A" * 999 + b"B"))

    assert_refused(tmp_path, archive, "CRC")


def test_a_member_longer_than_its_content_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest(("top/long.txt", b"A" * 1000)))
    content = archive.read_bytes()
    place = content.rindex(b"PK\x01\x02") + 24  # the unpacked size in the list of contents
    archive.write_bytes(content[:place] + struct.pack("<L", 2000) + content[place + 4 :])

    assert_refused(tmp_path, archive, "1000 bytes, 2000 were promised")


def test_an_encrypted_member_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest())
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)

    assert_refused(tmp_path, archive, "encrypted")


def test_a_member_packed_by_a_rare_method_is_refused(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as opened:
        opened.writestr("model.safetensors", safetensors())

    assert_refused(tmp_path, archive, "neither stored nor deflated")


def test_what_is_not_a_zip_is_refused(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"<!doctype html><p>Sign in to the hotel's network")

    assert_refused(tmp_path, archive, "not a sound zip")


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 5) + b"nope!",
        safetensors(num_bytes=4),
        safetensors(num_bytes=12),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, num_bytes=16),
        safetensors({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
    ],
    ids=["empty", "one byte", "endless header", "not JSON", "short", "long", "shape", "hole", "dtype"],
)
def test_weights_whose_header_does_not_fit_the_file_are_refused(tmp_path, weights):
    archive = write_zip(tmp_path / "a.zip", [("config.json", b"{}"), ("model.safetensors", weights)])

    assert_refused(tmp_path, archive, "not a sound safetensors file")


def test_an_archive_with_pickled_weights_only_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", [("config.json", b"{}"), ("pytorch_model.bin", b"cos\nsystem\n")])

    assert_refused(tmp_path, archive, "pickled weights")


@pytest.mark.parametrize("index", [b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"weight_map": 3}'])
def test_an_index_that_is_not_one_is_refused(tmp_path, index):
    archive = write_zip(tmp_path / "a.zip", honest(("top/model.safetensors.index.json", index)))

    assert_refused(tmp_path, archive, "weight_map")


def test_a_missing_shard_is_named(tmp_path):
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
    archive = write_zip(tmp_path / "a.zip", honest(("top/model.safetensors.index.json", index)))

    assert_refused(tmp_path, archive, r"'model-2\.safetensors', which is not there")


def test_what_a_killed_process_left_is_replaced(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest())
    (tmp_path / "inner" / "model.partial").mkdir()
    (tmp_path / "inner" / "model.partial" / "stale.json").write_text("{}")

    unpack(archive, tmp_path / "inner" / "model")

    assert names_in(tmp_path / "inner") == ["model/config.json", "model/model.safetensors"]


def test_a_disk_without_room_is_told_before_writing(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "a.zip", honest())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))

    with pytest.raises(OSError, match=r"unpacks to \d+ bytes, 5 are free"):
        unpack(archive, tmp_path / "inner" / "model")

    assert list((tmp_path / "inner").iterdir()) == []


def test_a_sound_folder_passes(tmp_path):
    check_folder(APPLE_TINY)


def test_no_flipped_byte_gets_through_unseen(tmp_path):
    archive = write_zip(tmp_path / "a.zip", honest())
    content = archive.read_bytes()
    wanted = {"config.json": b"{}", "model.safetensors": safetensors()}
    damaged = tmp_path / "b.zip"

    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        folder = tmp_path / "inner" / str(place)
        try:
            unpack(damaged, folder)
        except CheckpointError:
            assert not folder.exists()
        else:  # a date, or a flag that does not matter
            for path in folder.rglob("*"):
                assert path.is_dir() or path.read_bytes() == wanted[path.name] or path.name not in wanted
