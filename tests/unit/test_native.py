"""Compiled kernels read tokens as the model's own operators do; where they cannot be built, one line says so."""

import copy
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import fastvlm
from fastvlm.config import LanguageConfig
from fastvlm.errors import ContextError, DeviceError
from fastvlm.model.cache import KVCache
from fastvlm.model.compiled import can_multiply_bytes
from fastvlm.model.halves import HalfEmbedding, halve
from fastvlm.model.language import Qwen2
from fastvlm.model.native import MOST_TOKENS, NativeQwen2, TiledLinear, _ManyLinear, can_compile
from fastvlm.model.quantize import ROW, Packing, QuantizedEmbedding, QuantizedLinear, quantise, replace_layers
from fastvlm.native import build
from fastvlm.options import GenerationOptions

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the kernels are built by GCC or Clang")
GOLDENS = Path(__file__).parents[1] / "goldens"
CONFIG = LanguageConfig(dim=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=101, tied=True)
WIDE = [  # heads that lie in vectors of their own
    LanguageConfig(dim=4 * size, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=50, tied=True)
    for size in (32, 64, 128)
]
ODD = LanguageConfig(dim=44, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=50, vocab_size=37, tied=False)


def language_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    language = Qwen2(config)
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
    return language.to(dtype).eval().requires_grad_(False)


def cache_of(config, num_rows, capacity=32, dtype=torch.float32):
    return KVCache(config, num_rows=num_rows, capacity=capacity, dtype=dtype)


def read_in_steps(language, steps, cache):
    """Hidden states of each step, `(embeds, lengths)`; rows of unequal length are padded."""
    found = []
    with torch.inference_mode():
        for embeds, lengths in steps:
            hidden = language(embeds, cache)
            cache.advance(lengths)
            found += [hidden[row, :length].float() for row, length in enumerate(lengths)]
    return torch.cat(found)


def steps_of(config, num_rows, dtype=torch.float32):
    """A prompt of unequal rows, read as a matrix product, then few tokens at once, then one, as rows end."""
    generator = torch.Generator().manual_seed(1)
    lengths = [11 - 4 * row for row in range(num_rows)]
    shapes = [(11, lengths), (3, [3] * num_rows), (1, [1] * num_rows), (2, [2] * num_rows)]
    return [(torch.randn(num_rows, n, config.dim, generator=generator).to(dtype), lengths) for n, lengths in shapes]


@pytest.mark.parametrize("config", [CONFIG, ODD, *WIDE], ids=["even", "odd", "32", "64", "128"])
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_hidden_states_and_cache_are_those_of_the_models_own_operators(kernels, config, num_rows, num_threads):
    language = language_of(config)
    native = NativeQwen2(language, kernels, num_threads)
    cache, other = cache_of(config, num_rows), cache_of(config, num_rows)

    expected = read_in_steps(language, steps_of(config, num_rows), cache)
    got = read_in_steps(native, steps_of(config, num_rows), other)

    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths == other.lengths
    for row, length in enumerate(cache.lengths):
        assert_close(other.keys[:, row, :, :length], cache.keys[:, row, :, :length], rtol=1e-4, atol=1e-4)
        assert_close(other.values[:, row, :, :length], cache.values[:, row, :, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, ODD, *WIDE], ids=["even", "odd", "32", "64", "128"])
@pytest.mark.parametrize("num_threads", [1, 5])
def test_bfloat16_is_nearer_to_float32_than_the_models_own_operators_are(kernels, config, num_threads):
    exact, rounded = language_of(config), language_of(config, torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    native = NativeQwen2(rounded, kernels, num_threads)
    steps = steps_of(config, 1, torch.bfloat16)

    expected = read_in_steps(exact, [(x.float(), n) for x, n in steps], cache_of(config, 1))
    own = read_in_steps(rounded, steps, cache_of(config, 1, dtype=torch.bfloat16))
    got = read_in_steps(native, steps, cache_of(config, 1, dtype=torch.bfloat16))

    few = slice(11, None)  # what the kernels read
    assert (got[few] - expected[few]).norm() < (own[few] - expected[few]).norm()
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 8])
def test_tokens_that_are_read_together_give_what_each_gives_alone(kernels, config, num_tokens):
    native = NativeQwen2(language_of(config, torch.bfloat16), kernels, 2)
    hidden = torch.randn(num_tokens, config.dim, dtype=torch.bfloat16)
    expected = language_of(config, torch.bfloat16).float().head(hidden.float())

    together = native.head(hidden)

    assert torch.equal(together, torch.cat([native.head(one) for one in hidden[:, None]]))
    assert_close(together, expected, rtol=1e-4, atol=1e-4)


def halved(config):
    """A model of floats that bfloat16 holds, and the same with matrices of bfloat16."""
    plain = language_of(config, torch.bfloat16).float()
    other = copy.deepcopy(plain)
    halve(other, lambda _: None)
    return plain, other


@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("most", [0, 2**15])  # the prompt as floats, or by the kernels
def test_matrices_of_bfloat16_give_what_floats_give(kernels, config, num_rows, num_threads, most, monkeypatch):
    monkeypatch.setattr("fastvlm.model.native._MOST_PAIRS", most)
    language, other = halved(config)
    native = NativeQwen2(other, kernels, num_threads)
    hidden = torch.randn(60, config.dim)
    cache, own = cache_of(config, num_rows), cache_of(config, num_rows)

    expected = read_in_steps(language, steps_of(config, num_rows), cache)
    got = read_in_steps(native, steps_of(config, num_rows), own)

    assert not [layer for layer in other.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Embedding)]
    assert own.keys.dtype == torch.float32
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for length in (1, 9, 48, 60):
        assert_close(native.head(hidden[:length]), language.head(hidden[:length]), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_answers_in_floats_with_matrices_of_bfloat16_are_apples(kernels, monkeypatch):
    monkeypatch.setattr("fastvlm.accelerate.library", lambda: kernels)
    golden = load_file(GOLDENS / "apple_tiny.expected.safetensors")
    prompt, greedy, logits = (golden[f"case.textonly.{name}"] for name in ("input_ids", "greedy", "logits"))
    predictor = fastvlm.load(GOLDENS / "apple_tiny", device="cpu", dtype="float32", compile=True)
    language = predictor.model.language
    never = predictor.tokenizer.never_chosen(language.config.vocab_size)
    cache = cache_of(language.config, 1, capacity=64)

    found, chosen = [], []
    for token_ids in (prompt, *greedy[:-1, None]):
        hidden = language(language.embed(token_ids[None].long()), cache)
        cache.advance([len(token_ids)])
        found.append(language.head(hidden)[0])
        chosen.append(int(found[-1][-1].index_fill(0, torch.tensor(never), -torch.inf).argmax()))

    assert isinstance(language.embed_tokens, HalfEmbedding)
    assert_close(found[0][-len(logits) :], logits, rtol=0, atol=2e-3)
    assert chosen == greedy.tolist()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", [Packing(8, ROW), Packing(8, 32), Packing(4, 32), Packing(4, 64)], ids=str)
def test_quantised_matrices_are_read_packed(kernels, packing, scale_dtype):
    config = LanguageConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=1088, vocab_size=101, tied=True)
    language = language_of(config)
    names = [name for name, module in language.named_modules() if isinstance(module, torch.nn.Linear)]
    matrices = {name: language.get_submodule(name).weight for name in [*names, "embed_tokens"]}
    added = {name: language.get_submodule(name).bias for name in names}
    replace_layers(language, dict.fromkeys(matrices, packing))
    for name, matrix in matrices.items():
        layer = language.get_submodule(name)
        assert isinstance(layer, QuantizedLinear | QuantizedEmbedding)
        layer.weight, layer.scales, layer.biases = quantise(matrix, packing, scale_dtype)
        if added.get(name) is not None:
            layer.bias.data.copy_(added[name])
    expected = read_in_steps(language, steps_of(config, 1), cache_of(config, 1))
    logits = language.head(expected[-1:])
    native = NativeQwen2(language, kernels, 2)

    got = read_in_steps(native, steps_of(config, 1), cache_of(config, 1))

    # floats() rounds product and sum to the scales' format; the kernels round only activations, to 16 bits, or to 12
    # where many tokens meet 4 bits
    tolerance = {8: 1e-3, 4: 1e-2}[packing.bits] if scale_dtype == torch.float32 else 3e-2
    assert (got - expected).norm() < tolerance * expected.norm()
    assert_close(native.head(expected[-1:]), logits, rtol=1e-4, atol=3e-3 if scale_dtype == torch.float32 else 0.3)


def quantised_layer(packing, num_inputs, num_outputs, scale_dtype=torch.float32):
    layer = QuantizedLinear(num_inputs, num_outputs, packing, bias=True)
    matrix = torch.randn(num_outputs, num_inputs) / num_inputs**0.5
    layer.weight, layer.scales, layer.biases = quantise(matrix, packing, scale_dtype)
    layer.bias = torch.nn.Parameter(torch.randn(num_outputs), requires_grad=False)
    return layer


def multiply_many(kernels, layer, x, num_threads=2):
    if not can_multiply_bytes(kernels):
        pytest.skip("this processor multiplies no bytes")
    own = NativeQwen2(language_of(CONFIG), kernels, num_threads)._kernels
    return own.multiply_many(own.matrix(layer), x)


SHAPES = [
    (Packing(8, ROW), (1100, 70)),
    (Packing(8, ROW), (44, 5)),
    (Packing(8, 32), (96, 33)),
    (Packing(8, 64), (832, 21)),
    (Packing(8, 128), (1408, 19)),
    (Packing(4, 32), (288, 64)),
    (Packing(4, 64), (64, 1)),
    (Packing(4, 128), (1024, 47)),
    (Packing(4, 64), (1600, 18)),
]


@pytest.mark.parametrize("num_tokens", [1, 6, 13, 50])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("packing", "shape"), SHAPES, ids=str)
def test_many_tokens_are_multiplied_as_bytes(kernels, packing, shape, scale_dtype, num_tokens):
    layer, x = quantised_layer(packing, *shape, scale_dtype), uneven(num_tokens, shape[0])

    found = multiply_many(kernels, layer, x)

    size = 512 if packing.group_size == ROW else packing.group_size
    assert_products(found, layer, x, size, steps=32512 if packing.bits == 8 else 2032)  # of 16 or 12 bits


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("packing", "shape"), SHAPES, ids=str)
def test_few_tokens_are_multiplied_as_bytes(kernels, packing, shape, scale_dtype, num_tokens):
    layer, x = quantised_layer(packing, *shape, scale_dtype), uneven(num_tokens, shape[0])
    if not can_multiply_bytes(kernels):
        pytest.skip("this processor multiplies no bytes")
    own = NativeQwen2(language_of(CONFIG), kernels, 3)._kernels

    found = own.multiply(own.matrix(layer), x)

    assert_products(found, layer, x, 512 if packing.group_size == ROW else 32, steps=32512)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_outputs", [64, 309, 592])
@pytest.mark.parametrize(
    "packing", ["tiles", "rows", "float32", Packing(8, ROW), Packing(8, 32), Packing(4, 32), Packing(4, 48)], ids=str
)
def test_every_row_of_a_matrix_is_multiplied_once(kernels, packing, num_outputs, num_tokens, num_threads):
    """However a thread divides its rows into streams and what is left over."""
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 96)
    if isinstance(packing, Packing):
        layer = quantised_layer(packing, 96, num_outputs)
        weight = layer.floats(torch.float32)
    else:
        layer = torch.nn.Linear(96, num_outputs // 16 * 16 if packing == "tiles" else num_outputs)
        layer.weight = torch.nn.Parameter(
            layer.weight.bfloat16().to(torch.float32 if packing == "float32" else torch.bfloat16)
        )
        weight = layer.weight.float()
        if packing == "tiles":
            layer = TiledLinear(layer)
    own = NativeQwen2(language_of(CONFIG), kernels, num_threads)._kernels

    found = own.multiply(own.matrix(layer), x)

    assert_close(found, x @ weight.T + layer.bias, rtol=1e-3, atol=2e-3)
    assert torch.equal(found[-1:], own.multiply(own.matrix(layer), x[-1:]))


@pytest.mark.parametrize("packing", [Packing(8, ROW), Packing(4, 32)], ids=str)
def test_a_prompt_in_bfloat16_is_multiplied_as_one_in_floats(kernels, packing):
    layer, x = quantised_layer(packing, 96, 33), uneven(50, 96).bfloat16()
    own = NativeQwen2(language_of(CONFIG), kernels, 2)._kernels
    if not own.multiplies_bytes:
        pytest.skip("this processor multiplies no bytes")

    found = _ManyLinear(layer, own)(x)

    expected = own.multiply_many(own.matrix(layer), x.float())
    assert torch.equal(found, expected.bfloat16())


def uneven(num_tokens, size):
    """Activations of which one is large, and a row is small."""
    x = torch.randn(num_tokens, size) * 3 + 1
    x[-1] /= 1000
    x[0, 5] = 1000
    return x


def assert_products(found, layer, x, size, steps):
    """Products as exact as activations are that have `steps` steps on either side of zero, and a scale a block."""
    num_inputs = layer.shape[1]
    weight = (
        layer.scales.double().repeat_interleave(num_inputs // layer.scales.shape[1], 1) * numbers_of(layer).double()
    )
    weight += layer.biases.double().repeat_interleave(num_inputs // layer.biases.shape[1], 1)
    expected = x.double() @ weight.T
    bound = torch.zeros(len(x), dtype=torch.float64)
    for block, part in zip(x.double().split(size, 1), weight.split(size, 1), strict=True):
        bound += (block.abs().amax(1) / steps * part.norm()) ** 2
    error = (found.double() - layer.bias - expected).norm(dim=1)
    assert (error < bound.sqrt() + 1e-6 * expected.norm(dim=1)).all()
    assert (error > 0).all()


def numbers_of(layer):
    if layer.bits == 8:
        return layer.weight
    return torch.stack([layer.weight & 15, layer.weight >> 4], -1).flatten(1)


@pytest.mark.parametrize("packing", [Packing(8, ROW), Packing(8, 32)], ids=str)
def test_a_quantised_head_gives_many_rows_what_it_gives_few(kernels, packing):
    language = language_of(CONFIG)
    matrix = language.embed_tokens.weight
    replace_layers(language, {"embed_tokens": packing})
    table = language.embed_tokens
    table.weight, table.scales, table.biases = quantise(matrix, packing, torch.float32)
    hidden = torch.randn(3 * MOST_TOKENS, CONFIG.dim)
    expected = language.head(hidden)

    native = NativeQwen2(language, kernels, 2)

    assert_close(native.head(hidden), expected, rtol=1e-3, atol=2e-3)
    assert_close(native.head(hidden)[:3], native.head(hidden[:3]), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("packing", [Packing(8, ROW), Packing(4, 32)], ids=str)
def test_the_number_of_threads_changes_no_product(kernels, packing):
    layer, x = quantised_layer(packing, 640, 200), torch.randn(70, 640)

    assert torch.equal(multiply_many(kernels, layer, x, 1), multiply_many(kernels, layer, x, 3))


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("packing", [Packing(8, ROW), Packing(4, 32)], ids=str)
def test_a_number_that_is_none_spoils_its_own_token_only(kernels, packing, damage):
    layer, x = quantised_layer(packing, 64, 40), torch.randn(20, 64)
    x[7, 3] = damage

    found = multiply_many(kernels, layer, x)

    assert found[7].isnan().all()
    assert found.isnan().sum() == 40


@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["tied", "untied"])
def test_logits_are_those_of_the_head(kernels, config):
    language = language_of(config)
    native = NativeQwen2(language, kernels, 2)
    hidden = torch.randn(MOST_TOKENS + 1, config.dim)

    assert_close(native.head(hidden[:-1]), language.head(hidden[:-1]), rtol=1e-4, atol=1e-4)
    assert_close(native.head(hidden), language.head(hidden))  # more than the kernels take


def test_nano_answers_alike(kernels, monkeypatch):
    monkeypatch.setattr("fastvlm.accelerate.library", lambda: kernels)
    options = GenerationOptions(max_new_tokens=12)
    prompts = ["How many penguins are there?", "What is written here?"]
    picture = "examples/images/counting.png"
    plain, compiled = (fastvlm.load("nano", dtype="float32", compile=flag) for flag in (False, True))

    for prompt in prompts:
        expected, got = (model.ask(prompt, [picture], options=options) for model in (plain, compiled))
        assert got.token_ids == expected.token_ids
        assert got.text == expected.text


def test_a_full_cache_is_refused_before_anything_is_written(kernels):
    native = NativeQwen2(language_of(CONFIG), kernels, 1)
    cache = cache_of(CONFIG, 1, capacity=2)

    with pytest.raises(ContextError, match="holds 2 positions, 3 are needed"):
        native(torch.zeros(1, 3, CONFIG.dim), cache)

    assert not cache.keys.any()


def test_a_model_with_kernels_is_not_copied(kernels):
    with pytest.raises(TypeError, match="load it again"):
        copy.deepcopy(NativeQwen2(language_of(CONFIG), kernels, 1))


def test_only_formats_that_the_kernels_read_are_compiled():
    assert can_compile(language_of(CONFIG))
    assert not can_compile(language_of(CONFIG, torch.float16))
    assert not can_compile(language_of(CONFIG).to("meta"))


def test_they_are_built_once(kernels, tmp_path, monkeypatch):
    build.library(tmp_path)
    (built,) = tmp_path.iterdir()
    before = built.stat().st_mtime_ns
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))

    build.library(tmp_path)

    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.iterdir()] == [(built, before)]


def test_a_library_that_is_built_takes_the_place_of_what_was_long_unused(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_build", lambda _compiler, _flags, path: shutil.copy(kernels._name, path))
    month = time.time() - 31 * 86_400
    old, used, recent = (
        f"{name}-{digit * 16}.so" for name, digit in (("language", "0"), ("kernels", "1"), ("kernels", "2"))
    )
    ages = {
        old: (month, month),
        used: (time.time(), month),
        recent: (month, time.time() - 86_400),
        "notes.so": (month, month),
    }
    for name, times in ages.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, times)

    build.library(tmp_path)

    left = {path.name for path in tmp_path.iterdir()}
    assert len(left - ages.keys()) == 1  # what was built
    assert left & ages.keys() == {used, recent, "notes.so"}


def test_a_library_that_is_loaded_counts_as_used(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_build", lambda _compiler, _flags, path: shutil.copy(kernels._name, path))
    build.library(tmp_path)
    (built,) = tmp_path.iterdir()
    start = time.time()
    os.utime(built, (start - 3600, start - 31 * 86_400))  # an hour ago: many disks note one reading a day

    build.library(tmp_path)

    assert built.stat().st_atime > start - 60
    assert built.stat().st_mtime < start - 30 * 86_400


def test_without_a_compiler_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(DeviceError, match=r"no C\+\+ compiler is here \(looked for no-such-compiler\)"):
        build.library(tmp_path)


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "bad++"
    compiler.write_text("#!/bin/sh\necho 'language.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    kept = tmp_path / "kept"

    with pytest.raises(DeviceError, match=r"cannot build the kernels: language.cpp:1: error: no such thing"):
        build.library(kept)

    assert not list(kept.iterdir())


def test_a_program_that_is_ended_waits_for_no_compiler(tmp_path):
    compiler = tmp_path / "c++"
    told = tmp_path / "pid"
    compiler.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && exit\nsleep 300 &\necho $! > {told}.part; mv {told}.part {told}; wait\n"
    )
    compiler.chmod(0o755)
    image = Path(__file__).parents[2] / "examples" / "images" / "emoji.png"
    command = [sys.executable, "-m", "fastvlm", "predict", "--compile", "--device", "cpu", "--image", str(image)]
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as program:
        try:
            wait_for(told.exists)

            program.send_signal(signal.SIGTERM)

            assert program.wait(30) == 143
        finally:
            program.kill()
    wait_for(lambda: is_gone(int(told.read_text())))
    assert not list((tmp_path / "cache" / "fastvlm" / "native").iterdir())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"  # nobody took its status yet
