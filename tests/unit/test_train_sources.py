"""Files and folders of samples are recognised by what is in them, and read in any order."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from fastvlm.errors import InputError
from fastvlm.prompt import IMAGE
from fastvlm.train.conversations import PictureFolder
from fastvlm.train.sources import Reading, open_source

IMAGES = Path(__file__).parents[1] / "goldens" / "images"
READING = Reading(images=PictureFolder(folder=IMAGES))


def row(answer, **others):
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": answer}]
    return {"image": "square.png", "conversations": turns} | others


def answers(source):
    return [source.read(index).messages[-1].text for index in range(len(source))]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.json", "a", "a.txt"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n  "])
def test_a_list_of_json_is_known_by_its_bracket(tmp_path, name, start):
    path = put(tmp_path / name, start + json.dumps([row("one"), row("two")]).encode())

    source = open_source(path, READING)

    assert answers(source) == ["one", "two"]
    assert source.origin(1) == f"{path} row 1"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a", "a.ndjson"])
def test_lines_of_json_are_known_by_their_brace_and_may_be_read_in_any_order(tmp_path, name):
    lines = [json.dumps(row(str(i))) for i in range(5)]
    path = put(tmp_path / name, "\n".join([lines[0], "", *lines[1:]]) + "\r\n")

    source = open_source(path, READING)

    assert [source.read(i).messages[-1].text for i in (4, 0, 2)] == ["4", "0", "2"]
    assert source.origin(1) == f"{path} line 3"
    assert len(source) == 5


def test_C6_a_line_that_is_not_json_or_not_utf8_is_one_bad_sample(tmp_path):
    good = json.dumps(row("x")).encode()
    source = open_source(put(tmp_path / "a.jsonl", b"\n".join([good, b'{"id": ', good, b'{"id": "\xff"}'])), READING)

    for index in (1, 3):
        with pytest.raises(InputError, match="not a line of JSON in UTF-8"):
            source.read(index)
    assert source.read(2).messages[-1].text == "x"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"id": "\xff"}]', "not a JSON or JSONL file: .*0xff"),
        ("a.json", b"[1, 2", "not a JSON or JSONL file"),
        ("a.json", b"[]", "no samples"),
        ("a.json", b"[" * 100_000, "not a JSON or JSONL file"),
        ("a.json", b'"text"', "expected a list of conversations, got str"),
        ("a.csv", b"\xff\xfe", "not UTF-8 text"),
        ("a.csv", b"image,caption\n", "no samples"),
        ("a.zip", b"PK\x03\x04", "is compressed"),
        ("a.tar.gz", b"\x1f\x8b\x08", "is compressed"),
        ("a.doc", b"hello", "not a kind of data that is read"),
        ("a.json", b"", "not a JSON or JSONL file"),
    ],
)
def test_C6_files_that_cannot_be_read_at_all_are_named(tmp_path, name, content, message):
    path = put(tmp_path / name, content)

    with pytest.raises(InputError, match=message) as caught:
        open_source(path, READING)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(InputError, match="is neither a file nor a folder"):
        open_source(tmp_path / "pipe", READING)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file or directory; --data names files"):
        open_source(tmp_path / "a.json", READING)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_table_of_captions(tmp_path, name, mark):
    text = f'image{mark}caption\nsquare.png{mark}"A ""square"",\nof two lines"\nwide.png{mark}Wide\nwide.png\n'
    source = open_source(put(tmp_path / name, text), READING)

    assert source.read(0).messages[-1].text == 'A "square",\nof two lines'
    assert source.read(1).pictures[0].path == IMAGES / "wide.png"
    with pytest.raises(InputError, match="or a picture and its `caption`"):
        source.read(2)


def test_a_row_of_a_table_may_have_no_picture_but_not_too_many_cells(tmp_path):
    text = "image,question,answer\n,Why?,Because\nsquare.png,Why?,Yes, it is\n"
    source = open_source(put(tmp_path / "a.csv", text), READING)

    assert source.read(0).pictures == ()
    with pytest.raises(InputError, match="1 more cells than the head has names; put quotes"):
        source.read(1)


def test_a_caption_in_a_table_needs_its_picture(tmp_path):
    source = open_source(put(tmp_path / "a.csv", "image,caption\n,A square\n"), READING)

    with pytest.raises(InputError, match="a picture and its `caption`"):
        source.read(0)


@pytest.fixture
def folder(tmp_path):
    """Pictures with captions beside them, in two folders."""
    (tmp_path / "pictures" / "inner").mkdir(parents=True)
    for name, caption in [("b.png", "second"), ("a.JPG", "first\n"), ("inner/c.png", "third")]:
        path = tmp_path / "pictures" / name
        shutil.copyfile(IMAGES / "square.png", path)
        path.with_suffix(".txt").write_text(caption)
    return tmp_path / "pictures"


def test_a_folder_of_pictures_with_captions_is_read_in_the_order_of_names(folder):
    source = open_source(folder, READING)

    assert answers(source) == ["first", "second", "third"]
    assert source.read(0).messages[0].content == (IMAGE, "\n", "Describe the image.")
    assert source.read(2).pictures[0].read().mode == "RGB"


def test_C6_a_picture_without_a_caption_is_a_bad_sample(folder):
    (folder / "b.txt").unlink()
    (folder / "inner" / "c.txt").write_bytes(b"\xff")
    source = open_source(folder, READING)

    with pytest.raises(InputError, match=r"no caption beside it; expected b\.txt"):
        source.read(1)
    with pytest.raises(InputError, match=r"c\.txt is not UTF-8"):
        source.read(2)
    assert source.read(0).messages[-1].text == "first"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_a_table_is_read_by_its_table(folder, name):
    content = "file_name,text\nb.png,B\n" if name.endswith("csv") else '{"file_name": "b.png", "text": "B"}'
    put(folder / name, content)

    source = open_source(folder, READING)

    assert answers(source) == ["B"]
    assert source.read(0).pictures[0].path == folder / "b.png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no samples in this folder; expected tars"),
        ({"a.png": ""}, "or pictures with captions"),
        ({"data.json": "[]"}, r"name the file .*data\.json"),
        ({"data.json": "[]", "a.png": ""}, r"name the file .*data\.json"),
        ({"a.tar": "", "metadata.csv": ""}, r"holds a\.tar and metadata\.csv; name the one"),
    ],
)
def test_folders_that_do_not_say_what_they_are(tmp_path, files, message):
    for name, content in files.items():
        put(tmp_path / name, content)

    with pytest.raises(InputError, match=message):
        open_source(tmp_path, READING)


def tar_of(path, members, **changes):
    with tarfile.open(path, "w", **changes) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


SQUARE, WIDE = ((IMAGES / name).read_bytes() for name in ("square.png", "wide.png"))


def look(*answers):
    return json.dumps({"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]})


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_in_any_order(tmp_path, format_):
    long_name = "very/" * 30 + "long"
    members = [
        ("./", b""),
        ("one.png", SQUARE),
        ("one.json", look().encode()),
        ("two.txt", b"A caption.\n"),
        ("two.1.PNG", WIDE),
        ("two.0.png", SQUARE),
        ("._three.png", b"mac"),
        ("__meta__.json", b"{}"),
        (f"{long_name if format_ != tarfile.USTAR_FORMAT else 'very/long'}.png", WIDE),
        (f"{long_name if format_ != tarfile.USTAR_FORMAT else 'very/long'}.txt", b"Wide."),
    ]
    source = open_source(tar_of(tmp_path / "a.tar", members, format=format_), READING)

    assert answers(source) == ["A", "A caption.", "Wide."]
    assert [picture.content for picture in source.read(1).pictures] == [WIDE, SQUARE]
    assert source.read(0).messages[0].content == (IMAGE, "\nQ")
    assert source.origin(1) == f"{tmp_path / 'a.tar'} sample 'two'"


def test_a_folder_of_tars_is_one_source_in_the_order_of_names(tmp_path):
    for name in ("b", "a"):
        tar_of(
            tmp_path / f"{name}.tar", [(f"{i}.{end}", c) for i in "12" for end, c in (("png", SQUARE), ("txt", b"x"))]
        )

    source = open_source(tmp_path, READING)

    assert [Path(source.origin(i).split(" sample ")[0]).name for i in range(4)] == ["a.tar", "a.tar", "b.tar", "b.tar"]
    assert pickle.loads(pickle.dumps(source)).origin(3) == source.origin(3)  # as a worker process gets it


def test_C6_a_sample_of_a_tar_without_text_or_with_a_link_is_bad(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in [
            ("a.png", SQUARE),
            ("b.png", SQUARE),
            ("b.txt", b"x"),
            ("b.json", b"{}"),
            ("d.json", b"{"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        text = tarfile.TarInfo("c.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    source = open_source(path, READING)

    messages = {
        0: "expected one .json or .txt",
        1: "expected one .json or .txt",
        2: "d.json cannot be read",
        3: "no plain",
    }
    for index, message in messages.items():
        with pytest.raises(InputError, match=message):
            source.read(index)


@pytest.mark.parametrize("damage", ["cut", "header", "end"])
def test_C6_a_tar_that_is_cut_off_or_damaged_is_named_whole(tmp_path, damage):
    path = tar_of(tmp_path / "a.tar", [("a.png", SQUARE), ("a.txt", b"x"), ("b.png", WIDE), ("b.txt", b"y")])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: 512 + len(SQUARE) // 2]
    elif damage == "header":
        begin = 512 + -(-len(SQUARE) // 512) * 512 + 1024
        assert content[begin : begin + 5] == b"b.png"
        content[begin + 148 : begin + 156] = b"99999999"
    else:
        content = content[: -(-len(content) // 10240) * 10240 - 10240] + b"garbage" * 100
    path.write_bytes(content)

    with pytest.raises(InputError, match=r"a\.tar: (the tar is cut off or damaged|not a tar, or damaged)"):
        open_source(path, READING)


def test_C5_a_source_that_changed_has_another_fingerprint(tmp_path, folder):
    makers = {
        "json": lambda end: put(tmp_path / "a.json", json.dumps([row("x" + end)])),
        "jsonl": lambda end: put(tmp_path / "a.jsonl", json.dumps(row("x" + end))),
        "csv": lambda end: put(tmp_path / "a.csv", f"image,caption\nsquare.png,{end}x"),
        "tar": lambda end: tar_of(tmp_path / "a.tar", [("a.png", SQUARE), ("a.txt", b"x" + end.encode())]),
        "captions": lambda end: put(folder / "b.txt", f"x{end}").parent,
        "folder": lambda end: shutil.copyfile(IMAGES / f"{end or 'wide'}.png", folder / "z.png").parent,
    }

    for kind, make in makers.items():
        first = open_source(make(""), READING).fingerprint
        again = open_source(make(""), READING).fingerprint
        other = open_source(make("tall"), READING).fingerprint

        assert (first == again, first == other) == (True, False), kind


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_C5_pictures_that_changed_under_their_names_change_the_fingerprint(tmp_path, name):
    path = tmp_path / name
    rows = [row("x") | {"image": f"{i}.png"} for i in range(3)]
    if name == "a.csv":
        put(path, "image,caption\n" + "\n".join(f"{i}.png,x" for i in range(3)))
    else:
        put(path, json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    for i in range(2):  # the third is not there
        shutil.copyfile(IMAGES / "wide.png", tmp_path / f"{i}.png")
    reading = Reading(images=PictureFolder(folder=tmp_path))
    first = open_source(path, reading).fingerprint
    again = open_source(path, reading).fingerprint

    shutil.copyfile(IMAGES / "tall.png", tmp_path / "1.png")
    other = open_source(path, reading).fingerprint
    shutil.copyfile(IMAGES / "tall.png", tmp_path / "2.png")
    appeared = open_source(path, reading).fingerprint

    assert first == again
    assert len({first, other, appeared}) == 3


@pytest.fixture
def table():
    """Two rows in the columns of FineVision: bytes of pictures, and texts."""
    texts = [[{"user": "Q?", "assistant": answer}] for answer in ("one", "two")]
    images = [[{"bytes": SQUARE, "path": None}], [{"bytes": WIDE, "path": "w.png"}, {"bytes": SQUARE, "path": None}]]
    return pytest.importorskip("datasets").Dataset.from_dict({"images": images, "texts": texts})


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_parquet_files_and_saved_datasets(table, tmp_path, kind):
    place = tmp_path / "table"
    if kind == "saved":
        table.save_to_disk(str(place))
    else:
        place.mkdir()
        table.to_parquet(str(place / "a.parquet"))
    path = place / "a.parquet" if kind == "file" else place

    source = open_source(path, READING)

    assert answers(source) == ["one", "two"]
    assert [picture.content for picture in source.read(1).pictures] == [WIDE, SQUARE]
    assert source.read(1).messages[0].content == (IMAGE, "\n", IMAGE, "\n", "Q?")
    assert source.origin(1) == f"{path} row 1"
    assert source.fingerprint == open_source(path, READING).fingerprint


def test_pictures_of_a_datasets_image_column_are_not_decoded_by_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(IMAGES / "square.png")], "caption": ["A square."]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "table"))

    conversation = open_source(tmp_path / "table", READING).read(0)

    assert conversation.pictures[0].content == SQUARE


def test_a_table_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # how Python itself says that something cannot be imported

    with pytest.raises(InputError, match=r"needs Hugging Face datasets \(pip install 'fastvlm\[train\]'\)"):
        open_source(put(tmp_path / "a.parquet", b"PAR1"), READING)


def test_a_table_goes_to_a_worker_process(table, tmp_path):
    table.save_to_disk(str(tmp_path / "table"))
    source = open_source(tmp_path / "table", READING)

    assert answers(pickle.loads(pickle.dumps(source))) == ["one", "two"]


def test_splits_are_named(table, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "all"))

    with pytest.raises(InputError, match=r"holds splits; name one: .*all/train, .*all/test"):
        open_source(tmp_path / "all", READING)
    assert answers(open_source(tmp_path / "all" / "test", READING)) == ["one", "two"]


def test_C6_a_parquet_file_that_is_damaged_is_named(tmp_path):
    pytest.importorskip("datasets")
    path = put(tmp_path / "a.parquet", b"PAR1" + bytes(100))

    with pytest.raises(InputError, match=r"a\.parquet: the parquet files cannot be read") as caught:
        open_source(path, READING)
    assert "\n" not in str(caught.value)
