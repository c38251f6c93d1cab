"""What runs on a GPU, but for the recording: the same passes, computed at once, equal the model's own."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import PRESETS
from fastvlm.errors import DeviceError
from fastvlm.model import fold, gpu_graphs, gpu_language, gpu_vision
from fastvlm.model.gpu_language import GraphedQwen2, length_of_graph
from fastvlm.model.language import Qwen2
from fastvlm.model.quantize import Packing, QuantizedLinear

CONFIG = PRESETS["nano"].language


class Unrecorded:
    """Stands where a graph does and computes; what is behind a shorter input is noise, as in a graph's memory."""

    made = 0

    def __init__(self, function, like, pool=None):
        self.function, self.like = function, like
        Unrecorded.made += 1

    def __call__(self, x):
        return self.function(x)

    def at_least(self, x, length):
        padded = torch.randn_like(self.like)
        padded[:, :length] = x
        return self.function(padded)[:, :length].clone()


@pytest.fixture(autouse=True)
def unrecorded(monkeypatch):
    for module in (gpu_language, gpu_vision):
        monkeypatch.setattr(module, "capture", Unrecorded)
    Unrecorded.made = 0


@pytest.fixture
def language():
    torch.manual_seed(0)
    model = Qwen2(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    return model


def read_both(plain, graphed, lengths, capacity=700):
    own, other = plain.make_cache(1, 1024), graphed.make_cache(1, capacity)
    with torch.inference_mode():
        for num_tokens in lengths:
            x = torch.randn(1, num_tokens, CONFIG.dim)
            assert_close(graphed(x, other), plain(x, own), rtol=1e-4, atol=1e-5)
            own.advance([num_tokens])
            other.advance([num_tokens])
    return own, other


def test_first_tokens_single_ones_and_later_turns_equal_the_models_own(language):
    plain = copy.deepcopy(language)

    own, other = read_both(plain, GraphedQwen2(language, None), (40, 1, 1, 5, 1, 300, 1))

    assert_close(other.keys[:, :, :, :349], own.keys[:, :, :, :349], rtol=1e-4, atol=1e-5)
    assert Unrecorded.made == 4  # 64 from nothing, 1, 8 and 320 behind others


def test_a_quantised_model_keeps_its_matrices(language):
    for layer in language.layers:
        layer.mlp.down_proj = QuantizedLinear(CONFIG.mlp_dim, CONFIG.dim, Packing(bits=8, group_size=32), bias=False)
        for name, values in layer.mlp.down_proj.named_buffers():
            values.random_(0, 255) if name == "weight" else values.uniform_(-1e-3, 1e-3)
    plain = copy.deepcopy(language)

    read_both(plain, GraphedQwen2(language, None), (20, 1))


def test_joined_matrices_are_the_layers_own(language):
    before = sum(p.numel() for p in language.parameters())
    graphed = GraphedQwen2(language, None)

    attention = language.layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    assert sum(p.numel() for p in graphed.parameters()) == before


def test_a_forgotten_caches_room_serves_the_next_and_its_graphs_too(language):
    plain, graphed = copy.deepcopy(language), GraphedQwen2(language, None)
    _, first = read_both(plain, graphed, (40, 1))
    first.keys[0, 0, 0, 45] = torch.inf  # masked, and still multiplied with zero
    room, made = first.room, Unrecorded.made
    second = graphed.make_cache(1, 100)
    assert second.room is not room

    del first, second
    gc.collect()
    _, third = read_both(plain, graphed, (40, 1))

    assert third.room is room
    assert Unrecorded.made == made


def test_what_no_graph_fits_goes_the_models_own_way(language):
    plain, graphed = copy.deepcopy(language), GraphedQwen2(language, None)
    capacity = graphed.make_cache(1, 1).capacity

    read_both(plain, graphed, (capacity - 3, 1, 1, 1), capacity=capacity - 32)

    rows = torch.randn(2, 6, CONFIG.dim)
    with torch.inference_mode():
        assert_close(graphed(rows, graphed.make_cache(2, 8)), plain(rows, plain.make_cache(2, 8)))
        assert_close(graphed(rows), plain(rows))


@pytest.mark.parametrize(("num_tokens", "length"), [(1, 1), (2, 8), (8, 8), (9, 32), (291, 320), (513, 640)])
def test_lengths_of_graphs(num_tokens, length):
    assert length_of_graph(num_tokens) == length


class Operators:
    """What Triton's kernels compute, by PyTorch's operators."""

    @staticmethod
    def depthwise(x, weight, bias, *, stride, has_act, outside=None):
        margin, num_in = len(weight) // 2, x.shape[1]
        around = torch.zeros(num_in) if outside is None else outside
        padded = F.pad(x - around[:, None, None], (margin,) * 4) + around[:, None, None]
        y = F.conv2d(padded, weight.permute(2, 0, 1)[:, None], bias, stride, groups=num_in)
        return (F.gelu(y) if has_act else y).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def convolve(x, weight, bias, *, kernel, stride, has_act):
        y = F.conv2d(x, weight.unflatten(0, (kernel, kernel, -1)).permute(3, 2, 0, 1), bias, stride, kernel // 2)
        return (F.gelu(y) if has_act else y).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernels", [None, Operators])
def test_the_encoder_in_matrix_products_equals_its_own(kernels):
    vision = fold.for_inference(checkpoint.load(resolve("nano"), dtype=torch.float32).model).vision
    pixels = torch.rand(2, 3, 128, 192)
    before = pixels.clone()
    with torch.inference_mode():
        wanted = vision(pixels)
        graphed = gpu_vision.GraphedVision(gpu_vision.fuse(vision, kernels))

        assert_close(graphed(pixels), wanted, rtol=1e-4, atol=1e-4)
        assert_close(graphed(pixels.repeat(3, 1, 1, 1)), wanted.repeat(3, 1, 1), rtol=1e-4, atol=1e-4)

    assert torch.equal(pixels, before)
    assert Unrecorded.made == 1  # many pictures need no graph
    left = [m for m in vision.modules() if isinstance(m, nn.Conv2d) and (kernels or m.kernel_size == (1, 1))]
    assert all(m in list(vision.final_conv.modules()) for m in left)


def test_compiling_needs_triton_and_a_compiler(monkeypatch):
    monkeypatch.setattr(gpu_graphs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match="needs Triton"):
        gpu_graphs.kernels()

    monkeypatch.setattr(gpu_graphs.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(gpu_graphs.shutil, "which", lambda _: None)
    with pytest.raises(DeviceError, match="needs a C compiler"):
        gpu_graphs.kernels()
