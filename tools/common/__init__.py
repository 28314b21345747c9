"""Shared by the tools: the command line, figures, and paths of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "moetrain" / "train.py"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CODE_AND_MATH = ROOT / "configs" / "code_and_math.yaml"
