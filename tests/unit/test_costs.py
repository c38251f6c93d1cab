"""Operations are counted as PyTorch's own counter counts them, weights as the modules have them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.benchmark import costs
from fastvlm.config import PRESETS, Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.generate import make_cache
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM

CONFIG = Config(
    vision=VisionConfig(image_size=128, depths=(1, 2, 1, 2, 1), dims=(16, 32, 64, 128, 256)),
    projector=ProjectorConfig(in_dim=512, out_dim=48),
    language=LanguageConfig(
        dim=48, num_layers=3, num_heads=6, num_kv_heads=2, mlp_dim=80, vocab_size=300, tied=True, max_positions=256
    ),
    image_token_id=299,
)


@pytest.fixture(scope="module")
def model():
    return fold.for_inference(FastVLM(CONFIG))


def counted(work):
    """Operations of convolutions, products and attention; attention as products, all pairs of them."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def num_weights(*modules):
    return sum(weight.numel() for module in modules for weight in module.parameters())


@pytest.mark.parametrize("size", [(128, 128), (64, 192)])
def test_each_part_of_the_encoder_costs_what_pytorch_counts(model, size):
    parts, vision = costs.vision(CONFIG.vision, *size), model.vision
    modules = {"stem": vision.stem, **{f"stage {i + 1}": stage for i, stage in enumerate(vision.stages)}}
    modules["final convolution"] = vision.final_conv
    x = torch.zeros(1, 3, *size)

    assert list(parts) == list(modules)
    for name, module in modules.items():
        entering = x
        assert parts[name].flops == counted(lambda module=module, x=x: module(x)), name
        with torch.inference_mode():
            x = module(x)
        assert parts[name].weights == num_weights(module), name
        assert parts[name].maps == entering.numel() + x.numel(), name


def test_the_projector_costs_what_pytorch_counts(model):
    cost = costs.projector(CONFIG.projector, 4)

    assert cost.flops == counted(lambda: model.projector(torch.zeros(1, 4, 512)))
    assert cost.weights == num_weights(model.projector)


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(7, 0), (1, 9)])
def test_the_language_model_costs_what_pytorch_counts(model, num_tokens, num_cached):
    cache = make_cache(model, 1, 32)
    cache.advance([num_cached])
    cost = costs.language(CONFIG.language, num_tokens, num_cached) + costs.head(CONFIG.language)

    found = counted(lambda: model.language.head(model.language(torch.zeros(1, num_tokens, 48), cache)[:, -1:]))

    # PyTorch counts the pairs that causal attention leaves out as well
    needed = num_tokens * num_cached + num_tokens * (num_tokens + 1) // 2
    all_pairs = num_tokens * (num_tokens + num_cached)
    assert cost.matrix + cost.attention * all_pairs // needed == found
    assert cost.weights == num_weights(model.language)


def test_attention_grows_with_pairs_and_everything_else_with_tokens():
    short, long = (costs.language(CONFIG.language, number) for number in (10, 20))

    assert long.matrix == 2 * short.matrix
    assert long.attention * (10 * 11) == short.attention * (20 * 21)
    assert long.weights == short.weights


def test_the_half_billion_model_costs_what_is_known_of_it():
    parts = costs.whole(PRESETS["0.5b"], image_size=1024, text_tokens=35)
    vision = sum(costs.vision(PRESETS["0.5b"].vision, 1024, 1024).values(), costs.Cost())

    assert vision.flops / 2 == pytest.approx(243.35e9, rel=1e-3)  # timm's count for fastvit_mci3 at 1024 pixels
    assert parts["decode"].num_bytes(16, 0) == pytest.approx(2 * 494e6, rel=2e-3)


def test_bytes_are_those_of_the_width():
    cost = costs.Cost(weights=1000, maps=10)

    assert cost.num_bytes(4, 16) == 500 + 20
    assert (cost + cost).num_bytes(16, 32) == 4000 + 80
