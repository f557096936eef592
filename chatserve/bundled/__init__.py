"""The model that travels with chatserve, and everything needed to make it again.

What is said: `words` draws values and splits them into training and held-out, `phrases` holds the templates, `manner`
how people type, `keys` what facts are about. `facts` and `data` make conversations of them and know every right answer;
`tokenizer` and `train` make the files in `model/`, `evaluate` measures them. `model/MODEL_CARD.md` has the figures.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
CONTEXT_TOKENS = 4096
