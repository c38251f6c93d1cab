"""A folder on disk to a model and back; all that is known about foreign names and files is in this folder."""

from fastvlm.checkpoint.convert import convert
from fastvlm.checkpoint.create import init_checkpoint, packaged_tokenizer
from fastvlm.checkpoint.load import Checkpoint, assemble, load, load_encoder, load_language
from fastvlm.checkpoint.save import save

__all__ = [
    "Checkpoint",
    "assemble",
    "convert",
    "init_checkpoint",
    "load",
    "load_encoder",
    "load_language",
    "packaged_tokenizer",
    "save",
]
