"""Apple's command line: `python predict.py --model-path DIR --image-file PNG --prompt "..."`; see `fastvlm predict`.

Where Apple's script samples at temperature 0.2, this one takes the likeliest words; `--temperature 0.2` asks for that.
"""

import sys

from fastvlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
