"""Make a traced graph as small as PyTorch's exporter makes it, in less time.

The exporter would try some thirty rules on each operation. Four of them find something in our graphs, and one of the
rest, for slices that are halves, lists the whole graph again for each operation: a fifth of the decoder's time.
"""

from typing import Any, Final

from fastvlm.export.parts import needs

_ITERATIONS: Final = 2  # folding makes room for rules, and rules for folding

Graph = Any
"""An `onnx_ir.Model`."""


def simplify(graph: Graph) -> None:
    """Fold constants, join operations and drop what is unused, in place; where in our code each came from, too."""
    optimizer, rewriter, rules, passes = needs(
        "onnx",
        "onnxscript.optimizer",
        "onnxscript.rewriter",
        "onnxscript.rewriter.rules.common",
        "onnx_ir.passes.common",
    )
    chosen = [
        rules.collapse_slice_rule,
        rules.materialize_reshape_shape_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
    ]
    optimizer.inline(graph)
    for _ in range(_ITERATIONS):
        optimizer.fold_constants(graph, onnx_shape_inference=True)
        rewriter.rewrite(graph, chosen)
    for each in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        each(graph)
