"""A small tokenizer, a small model with random weights, and items of every form."""

import random

import pytest
import torch

from moetrain.config import ModelSettings
from moetrain.data.tokenizer import train_tokenizer
from moetrain.models.initialization import initialize_weights
from moetrain.models.transformer import Transformer
from tests.conftest import sentences, sums


def small_model(vocab_size, seed=0, **changes):
    """Random weights, large enough that no two choices have equal scores."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    routed = {"num_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.3}
    return initialize_weights(Transformer(ModelSettings(**(sizes | routed | changes)), vocab_size, torch.float32))


@pytest.fixture(scope="session")
def tokenizer():
    rng = random.Random(1)
    return train_tokenizer([sentences(rng, 40), sums(rng, 40), "Question: Who?\nAnswer: no one\n" * 5], 320)


@pytest.fixture(scope="session")
def model(tokenizer):
    return small_model(tokenizer.vocab_size)


def item(prompt, answer=0, *, task="t", name=None, choices=None, **more):
    rest = {"target": answer} if choices is None else {"choices": list(choices), "answer": answer}
    return {"domain": "d", "task": task, "id": name or prompt, "prompt": prompt, "sep": " ", **rest, **more}


def some_items(count=12, seed=0):
    """Multiple choice with 2 to 5 choices, open answers, some with a worked solution, and long texts."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        question = f"Question: {sentences(rng, rng.randint(1, 3))}\nAnswer:"
        choices = [sentences(rng, 1) if rng.random() < 0.3 else rng.choice("abcdé") * rng.randint(1, 6)]
        while len(choices) < rng.randint(2, 5):
            choices.append(f"{rng.choice(['Ada', 'Ben'])} {rng.randint(0, 99)}")
        made.append(item(question, rng.randrange(len(choices)), task="mc", choices=choices, name=str(number)))
        solution = {"solution": sums(rng, 3)} if number % 2 else {}
        made.append(item(f"{number} plus {number} is", str(2 * number), task="open", name=str(number), **solution))
        long = {"sep": "", "task": "text", "name": str(number)}
        made.append(item(f"A text, {number}:\n", sentences(rng, 3), **long))
    return made
