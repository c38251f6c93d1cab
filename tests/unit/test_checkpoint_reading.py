"""Files that lie are refused in one line, before anything is allocated."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvlm.checkpoint.reading import INDEX, Weights, licence_files, opened, read_header, read_json
from fastvlm.errors import CheckpointError


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


LIES = {
    "a header of 2^63 bytes": ({}, b"", 2**63, "the header should take 9223372036854775808 bytes"),
    "a header longer than the file": ({}, b"", 500, "is the download complete"),
    "tensors on top of each other": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "overlaps"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), None, "leaves a gap"),
    "fewer bytes than promised": ({"a": entry(0, 400)}, bytes(12), None, "is it complete"),
    "more bytes than promised": ({"a": entry(0, 4)}, bytes(12), None, "is it complete"),
    "a shape that its bytes do not fill": ({"a": entry(0, 4, [2**40, 2**40])}, bytes(4), None, "needs"),
    "a negative size": ({"a": entry(0, 4, [-1])}, bytes(4), None, "whole numbers"),
    "a size that is no number": ({"a": entry(0, 4, [True])}, bytes(4), None, "whole numbers"),
    "a dtype that is a list": ({"a": entry(0, 4, [1], ["F32"])}, bytes(4), None, "has dtype"),
    "a strange dtype": ({"a": entry(0, 4, [1], "F8_E4M3")}, bytes(4), None, "F8_E4M3"),
    "no dtype": ({"a": {"shape": [1]}}, bytes(4), None, "no dtype"),
    "a list for a header": ([], b"", None, "expected a JSON object"),
    "nonsense": (b"\xff{", b"", None, "not valid JSON"),
    "deep nesting": (b"[" * 100_000, b"", None, "not valid JSON"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
        None,
        "twice",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    header, data, length, expected = LIES[lie]
    path = raw_file(tmp_path / "model.safetensors", header, data, length)

    with pytest.raises(CheckpointError) as error:
        read_header(path)

    assert expected in one_line(error)
    assert str(path) in str(error.value)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n")

    with pytest.raises(CheckpointError, match="a pointer of Git LFS, not the weights; run `git lfs pull`"):
        read_header(path)


def test_a_file_of_seven_bytes_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1234567")

    with pytest.raises(CheckpointError, match="is the download complete"):
        Weights.open(tmp_path)


def test_tensors_come_back_as_they_were_written(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "count": torch.tensor(12),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")

    weights = Weights.open(tmp_path)

    assert weights.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
    header = json.dumps({"a": entry(0, 4), "b": entry(4, 6, [1], "F16")}).encode()
    header += b" " * ((1 - len(header)) % 4)  # the data begins at an odd byte
    raw_file(tmp_path / "model.safetensors", header, b"\x00\x00\x80\x3f\x00\x3c")

    weights = Weights.open(tmp_path)

    assert weights.read("a").tolist() == [1.0]
    assert weights.read("b").tolist() == [1.0]


def test_changing_a_tensor_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()

    Weights.open(tmp_path).read("a").fill_(5)

    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_memory_given_back_is_read_again_from_the_file(tmp_path):
    values = torch.randn(5, 100_000)
    save_file({"a": values, "b": values + 1}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)

    weights.read("a").sum()
    weights.forget("a")

    assert torch.equal(weights.read("a"), values)
    assert torch.equal(weights.read("b"), values + 1)


def shards(folder, places, **files):
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_shards_are_read_as_one(tmp_path):
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    shards(tmp_path, places, one={"a": torch.ones(1)}, two={"b": torch.zeros(2)})

    assert Weights.open(tmp_path).entries.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "place", ["../one.safetensors", "/etc/passwd", "x/one.safetensors", "..\\one.safetensors", "C:one.safetensors", 3]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(place, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    shards(inside, {"a": place})

    with pytest.raises(CheckpointError, match="expected the plain name") as error:
        Weights.open(inside)

    one_line(error)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": torch.ones(1)})

    with pytest.raises(CheckpointError, match=r"two\.safetensors, which is not there"):
        Weights.open(tmp_path)


def test_an_index_that_looks_in_the_wrong_shard_is_refused(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"}, one={"a": torch.ones(1)})

    with pytest.raises(CheckpointError, match=r"'b' in one\.safetensors, which does not hold it"):
        Weights.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = {"a": torch.ones(1)}
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=tensors, two={"b": torch.ones(1), **tensors})

    with pytest.raises(CheckpointError, match=r"is also in one\.safetensors"):
        Weights.open(tmp_path)


class Trap:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(name, tmp_path):
    folder, sprung = tmp_path / "folder", tmp_path / "sprung"
    folder.mkdir()
    torch.save(Trap(sprung), folder / name)

    with pytest.raises(CheckpointError, match=r"a pickle, which could run code; convert it to \.safetensors"):
        Weights.open(folder)
    with pytest.raises(CheckpointError, match="pickle"), opened(folder / name):
        pass

    assert not sprung.exists()


def test_a_pickle_beside_safetensors_is_ignored(tmp_path):
    folder, sprung = tmp_path / "folder", tmp_path / "sprung"
    folder.mkdir()
    torch.save(Trap(sprung), folder / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")

    assert Weights.open(folder).entries.keys() == {"a"}
    assert not sprung.exists()


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        Weights.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Weights.open(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]", '{"a": 1, "a": 2}', '{"a": NaN'])
def test_json_that_is_no_plain_object_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)

    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        read_json(path)

    one_line(error)


def test_fingerprints_differ_when_one_value_differs(tmp_path):
    prints = []
    for value in (1.0, 1.0, 2.0):
        save_file({"a": torch.tensor([value]), "b": torch.ones(3)}, tmp_path / "model.safetensors")
        prints.append(Weights.open(tmp_path).fingerprint())

    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_licences_and_readmes_are_found_and_code_is_not(tmp_path):
    for name in ("LICENSE", "LICENSE_MODEL", "ACKNOWLEDGEMENTS.md", "README.md", "license.py", "config.json"):
        (tmp_path / name).write_text("x")

    names = [path.name for path in licence_files(tmp_path)]

    assert names == ["ACKNOWLEDGEMENTS.md", "LICENSE", "LICENSE_MODEL", "README.md"]


def test_reading_imports_no_pickle_of_ours():
    source = Path(sys.modules["fastvlm.checkpoint.reading"].__file__).read_text()

    assert "pickle.load" not in source
    assert "torch.load" not in source
