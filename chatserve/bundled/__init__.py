"""The model that travels with chatserve, and everything needed to make it again.

`words` draws values and splits them into training and held-out, `phrases` holds what people say, `data` makes
conversations of both, `tokenizer` and `train` make the files in `model/`, `evaluate` measures them.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
CONTEXT_TOKENS = 4096
