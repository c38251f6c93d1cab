"""What one run does: a frozen dataclass a command; its fields are the command's flags, its docstrings their help."""

from fastvlm.options.answer import (
    ChatOptions,
    Engine,
    GenerationOptions,
    ImageOptions,
    LoadOptions,
    PredictOptions,
    ReuseOptions,
)
from fastvlm.options.checkpoint import (
    ConvertOptions,
    DoctorOptions,
    ModelsInitOptions,
    ModelsListOptions,
    ModelsPullOptions,
    ModelsShowOptions,
    PushOptions,
    QuantizeOptions,
)
from fastvlm.options.data import DataAssetsOptions, DataCheckOptions, DataSynthOptions
from fastvlm.options.export import EXPORT_FORMATS, ExportFormat, ExportOptions, Precision
from fastvlm.options.measure import (
    ROUTES,
    BenchLatencyOptions,
    BenchPaperOptions,
    BenchPeersOptions,
    BenchPlotOptions,
    BenchRooflineOptions,
    BenchThroughputOptions,
    BenchTrainOptions,
    EvalOptions,
)
from fastvlm.options.train import CAPTION_PROMPT, FRESH, Learning, PretrainOptions, TrainOptions

__all__ = [
    "CAPTION_PROMPT",
    "EXPORT_FORMATS",
    "FRESH",
    "ROUTES",
    "BenchLatencyOptions",
    "BenchPaperOptions",
    "BenchPeersOptions",
    "BenchPlotOptions",
    "BenchRooflineOptions",
    "BenchThroughputOptions",
    "BenchTrainOptions",
    "ChatOptions",
    "ConvertOptions",
    "DataAssetsOptions",
    "DataCheckOptions",
    "DataSynthOptions",
    "DoctorOptions",
    "Engine",
    "EvalOptions",
    "ExportFormat",
    "ExportOptions",
    "GenerationOptions",
    "ImageOptions",
    "Learning",
    "LoadOptions",
    "ModelsInitOptions",
    "ModelsListOptions",
    "ModelsPullOptions",
    "ModelsShowOptions",
    "Precision",
    "PredictOptions",
    "PretrainOptions",
    "PushOptions",
    "QuantizeOptions",
    "ReuseOptions",
    "TrainOptions",
]
