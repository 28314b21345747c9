"""The streaming monitor in a training loop that is not ours: transformers' OLMoE, on two small domains.

    python tools/monitor_transformers.py --steps 60

The lines that put it there are marked: any loop that can name its samples and has router probabilities can do the same.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

import numpy as np
import torch

from moetrain.routing.recorder import SampleRouting
from moetrain.routing.stream import StreamMonitor, StreamReading

LENGTH, VOCABULARY = 32, 64
DOMAINS = ("counting", "noise")


def draw(rng: random.Random, domain: int) -> list[int]:
    """A sample: numbers that count up from a random one by a random step, or numbers without any order."""
    if domain == 1:
        return [rng.randrange(VOCABULARY) for _ in range(LENGTH)]
    start, step = rng.randrange(VOCABULARY), rng.randrange(1, 8)
    return [(start + step * place) % VOCABULARY for place in range(LENGTH)]


def train(steps: int, every: int, batch: int, seed: int = 0) -> list[tuple[int, list[StreamReading]]]:
    """Train a small OLMoE and return the monitor's readings by step."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = StreamMonitor(DOMAINS, size=64, tau=0.7)  # <- the monitor
    readings = []
    for step in range(1, steps + 1):
        domains = np.array([rng.randrange(len(DOMAINS)) for _ in range(batch)])
        tokens = torch.tensor([draw(rng, int(domain)) for domain in domains])
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # <- what it needs: mean router probabilities by sample and layer, with the samples' domains
        logits_LBTE = torch.stack(output.router_logits).detach().view(config.num_hidden_layers, batch, LENGTH, -1)
        weights_SLE = logits_LBTE.float().softmax(-1).mean(2).transpose(0, 1).numpy()
        met = (step - 1) * batch
        monitor.add(SampleRouting.from_weights(weights_SLE, met + np.arange(batch), domains, met))
        if step % every == 0:
            rows_LED = np.stack([layer.mlp.gate.weight.detach().numpy() for layer in model.model.layers])
            readings.append((step, monitor.measure(rows_LED)))  # <- what it gives
    return readings


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print a line a reading and domain; returns the exit status: 0 done, 2 numbers that are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--every", type=int, default=20, help="steps between readings (default 20)")
    parser.add_argument("--batch", type=int, default=16, help="samples a step (default 16)")
    options = parser.parse_args(arguments)
    if min(options.steps, options.every, options.batch) < 1:
        parser.error("--steps, --every and --batch are 1 or more")
    for step, readings in train(options.steps, options.every, options.batch):
        for reading in readings:
            shown = "  ".join(f"{name} {value.mean:.3f}" for name, value in reading.metrics.items())
            print(f"step {step}  {reading.domain}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
