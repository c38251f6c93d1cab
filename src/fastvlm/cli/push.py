"""`fastvlm push`: a checkpoint folder to the Hugging Face hub."""

from pathlib import Path

from fastvlm.checkpoint.push import CARD, Upload, local_base_remark, prepare_upload, send
from fastvlm.cli.output import Output
from fastvlm.options import PushOptions


def run(options: PushOptions, output: Output) -> None:
    """Print what is sent, a line a file; then, only with --upload, send it and print the address."""
    upload = prepare_upload(Path(options.model), options.to, licence=options.license)
    if not options.upload:
        for name in upload.files:
            output.line(f"{upload.size(name):>14,}  {name}")
        _remark(upload, output)
        output.note(f"fastvlm: nothing was sent; say --upload to send these files to {upload.repository}")
        return
    output.line(send(upload, is_private=options.private, message=options.message))


def _remark(upload: Upload, output: Output) -> None:
    if upload.kept_back:
        output.note(f"fastvlm: stays here: {', '.join(upload.kept_back)}")
    card = upload.files[CARD]
    if isinstance(card, bytes):
        output.note(f"fastvlm: the folder has no {CARD}; this one would be sent, and may be written by you instead:")
        for line in card.decode().splitlines():
            output.note(f"    {line}")
    if upload.local_base is not None:
        output.note(f"fastvlm: --upload will be refused: {local_base_remark(upload.local_base)}")
    if upload.licence is None:
        output.note("fastvlm: nothing says under which licence; --upload will want --license")
