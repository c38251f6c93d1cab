"""Run by an interpreter that has mlx-vlm: `mlx_oracle.py FOLDER REQUEST OUT`; knows nothing of fastvlm.

REQUEST is JSON: `questions`, each a rendered prompt and a picture's file, and, for an encoder of another geometry than
the standard one, `layers` and `embed_dims`. OUT gets the greedy answers as a list.
"""

import json
import sys
from pathlib import Path

from mlx_vlm import generate, load
from mlx_vlm.models.fastvlm.config import VisionConfig


def main(folder: str, request: str, out: str) -> None:
    """Answer every question with the folder's own settings, tokenizer and image processor."""
    values = json.loads(Path(request).read_text(encoding="utf-8"))
    for name in ("layers", "embed_dims"):
        if name in values:
            setattr(VisionConfig, name, values[name])
    model, processor = load(folder)
    answers = [
        generate(model, processor, prompt, image=[picture], max_tokens=values["tokens"], temperature=0.0).text
        for prompt, picture in values["questions"]
    ]
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
