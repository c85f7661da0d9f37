#!/usr/bin/env python3
"""Weight selection: the first weights of a small model, picked from a larger pretrained one. The package has it all.

python weight_selection.py --output_dir init/ --model_type vit --pretrained_model vit_small_patch16_224_in21k
"""

import sys
from pathlib import Path

from weight_selection.cli import run  # the package of this name: Python prefers it to this file

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]  # its datasets.py is not Hugging Face's
    run()
