import numpy as np
import pytest
import torch

from fastvlm import checkpoint
from fastvlm.export import quantise
from fastvlm.export.compensate import compensated, decoder, factors, products

ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")


def graph_of(kind, weight, shape, *, is_table=False):
    """One operation on one constant."""
    stored = ir.Value(name="w", const_value=ir.tensor(weight, name="w"), type=ir.TensorType(ir.DataType.FLOAT))
    dtype = ir.DataType.INT64 if is_table else ir.DataType.FLOAT
    given = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(dtype))
    node = ir.node(kind, [stored, given] if is_table else [given, stored])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [given], [node.outputs[0]], nodes=[node], initializers=[stored], opset_imports={"": 21}, name="graph"
    )
    return ir.Model(graph, ir_version=10)


def run(model, x, tmp_path):
    ir.save(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def types_of(model):
    return {value.const_value.dtype for value in model.graph.initializers.values()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 96, 100])
def test_packed_matrices_multiply_as_their_values_do_in_onnx_runtime(tmp_path, bits, width):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(width, 48)).astype(np.float32)
    x = rng.normal(size=(5, width)).astype(np.float32)
    model = graph_of("MatMul", weight, (5, width))

    quantise.matrices(model, [quantise.pack(weight.T, bits=bits)] if bits == 4 else None)
    found = run(model, x, tmp_path)

    error = np.linalg.norm(found - x @ weight) / np.linalg.norm(x @ weight)
    assert 0 < error < (0.1 if bits == 4 else 0.006)
    assert {node.op_type for node in model.graph} == {"MatMulNBits"}


def test_values_on_the_grid_of_four_bits_are_kept_exactly():
    weight = (np.arange(64).reshape(2, 32) % 16 - 8).astype(np.float32)

    assert np.array_equal(quantise.unpack(quantise.pack(weight, bits=4), 32), weight)


@pytest.mark.parametrize("width", [100, 1056])
def test_errors_are_made_good_where_the_inputs_allow(width):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(48, width)).astype(np.float32)
    # Inputs that go together: an error in one column can be made good by another.
    x = (rng.normal(size=(4000, 40)) @ rng.normal(size=(40, width))).astype(np.float32)

    def error(packed):
        return np.linalg.norm(x @ (quantise.unpack(packed, width) - weight).T) / np.linalg.norm(x @ weight.T)

    nearest = error(quantise.pack(weight, bits=4))
    ours = error(compensated(weight, factors(products(torch.from_numpy(x)))))

    assert ours < 0.5 * nearest


def test_inputs_that_were_never_seen_are_rounded_to_the_nearest():
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)

    packed = compensated(weight, factors(products(torch.zeros(3, 64))))

    assert np.array_equal(quantise.unpack(packed, 64), quantise.unpack(quantise.pack(weight, bits=4), 64))


@torch.inference_mode()
def test_a_rounded_decoder_lists_its_matrices_in_the_order_of_the_graph(tiny):
    language = checkpoint.load(tiny, dtype=torch.float32).model.language
    before = {name: weight.clone() for name, weight in language.state_dict().items()}
    sentences = [torch.randn(1, length, language.config.dim) for length in (9, 14)]

    packed = decoder(language, sentences)

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    order = [
        weight
        for index in range(language.config.num_layers)
        for kind in names
        for name, weight in before.items()
        if name.startswith(f"layers.{index}.") and name.endswith(f"{kind}.weight")
    ] + [before["embed_tokens.weight" if language.config.tied else "lm_head.weight"]]
    assert len(packed) == len(order)
    for each, weight in zip(packed, order, strict=True):
        found = torch.from_numpy(quantise.unpack(each, weight.shape[1]))
        assert torch.cosine_similarity(found.flatten(), weight.flatten(), dim=0) > 0.98
    assert {each.bits for each in packed[:-8]} == {4, 8}
    assert {each.bits for each in packed[-8:]} == {8}
    assert all(torch.equal(weight, before[name]) for name, weight in language.state_dict().items())


def test_an_int8_convolution_has_one_scale_a_channel_and_is_close(tmp_path):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(256, 256, 1, 1)) * np.logspace(-3, 3, 256)[:, None, None, None]).astype(np.float32)
    x = rng.normal(size=(1, 256, 4, 4)).astype(np.float32)
    model = graph_of("Conv", weight, (1, 256, 4, 4))
    expected = run(model, x, tmp_path)

    quantise.convolutions(model)
    found = run(model, x, tmp_path)

    errors = np.sqrt(np.square(found - expected).sum((0, 2, 3)) / np.square(expected).sum((0, 2, 3)))
    assert 0 < errors.max() < 0.02  # in the channel of the smallest weights too
    assert types_of(model) == {ir.DataType.INT8, ir.DataType.FLOAT}


def test_a_small_kernel_is_stored_as_float16(tmp_path):
    weight = np.random.default_rng(0).normal(size=(8, 4, 3, 3)).astype(np.float32)
    model = graph_of("Conv", weight, (1, 4, 8, 8))

    quantise.convolutions(model)

    assert types_of(model) == {ir.DataType.FLOAT16}
    run(model, np.ones((1, 4, 8, 8), np.float32), tmp_path)


def test_an_int8_table_gives_each_row_its_own_scale(tmp_path):
    weight = np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32) * np.logspace(-3, 3, 10)[:, None]
    model = graph_of("Gather", weight.astype(np.float32), (1, 3), is_table=True)
    ids = np.array([[0, 9, 4]])

    quantise.table(model)
    found = run(model, ids, tmp_path)

    errors = np.abs(found - weight[ids]).max(-1) / np.abs(weight[ids]).max(-1)
    assert 0 < errors.max() <= 0.5 / 127 * 1.001
