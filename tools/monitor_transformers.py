"""Example: the streaming monitor in a plain training loop of transformers' OLMoE, on two small domains.

    python tools/monitor_transformers.py --steps 60

The lines that add the monitor are marked. It needs router probabilities, and the ids and domains of the samples.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import numpy as np
import torch
from common.command_line import make_parser

from moetrain.routing.recorder import SampleRouting
from moetrain.routing.stream import StreamMonitor, StreamReading

LENGTH, VOCABULARY = 32, 64
DOMAINS = ("counting", "noise")


def draw(rng: random.Random, domain: int) -> list[int]:
    """A sample: numbers that count up from a random start by a random step, or random numbers."""
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
        # <- its input: mean router probabilities per sample and layer, with the samples' domains
        logits_LBTE = torch.stack(output.router_logits).detach().view(config.num_hidden_layers, batch, LENGTH, -1)
        weights_SLE = logits_LBTE.float().softmax(-1).mean(2).transpose(0, 1).numpy()
        first = (step - 1) * batch
        monitor.add(SampleRouting.from_weights(weights_SLE, first + np.arange(batch), domains, first))
        if step % every == 0:
            rows_LED = np.stack([layer.mlp.gate.weight.detach().numpy() for layer in model.model.layers])
            readings.append((step, monitor.measure(rows_LED)))  # <- its output
    return readings


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print one line per reading and domain; returns the exit status: 0 done, 2 invalid numbers."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--every", type=int, default=20, help="steps between readings (default 20)")
    parser.add_argument("--batch", type=int, default=16, help="samples per step (default 16)")
    options = parser.parse_args(arguments)
    if min(options.steps, options.every, options.batch) < 1:
        parser.error("--steps, --every and --batch must be 1 or more")
    for step, readings in train(options.steps, options.every, options.batch):
        for reading in readings:
            shown = "  ".join(f"{name} {value.mean:.3f}" for name, value in reading.metrics.items())
            print(f"step {step}  {reading.domain}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
