"""Print an answer while it is written: `python stream.py cat.jpg "What is this?" [model]`."""

import sys

import fastvlm

picture, question, *model = sys.argv[1:]
stream = fastvlm.load(*model).stream(question, images=[picture])
for piece in stream:
    print(piece, end="", flush=True)
print(f"\n{stream.finish().timings_ms.ttft:.0f} ms to the first token", file=sys.stderr)
