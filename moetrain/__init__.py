"""Pretrain mixture-of-experts language models and watch memorization turn into generalization from the router alone."""

__version__ = "0.1.0"
