"""A slow reference for scoring: one item and one choice at a time, with all logits."""

import math

import torch

from moetrain.model_input import PackedTokens


def parted(prompt, continuation):
    """lm-evaluation-harness's rule for splitting prompt and answer, letter by letter."""
    moved = ""
    while prompt and prompt[-1].isspace():
        moved = prompt[-1] + moved
        prompt = prompt[:-1]
    return prompt, moved + continuation


def answer_tokens(tokenizer, prompt, continuation, context_tokens):
    """(all tokens with the beginning mark, how many of them are scored)."""
    context, continuation = parted(prompt, continuation)
    whole = tokenizer.encode(context + continuation)
    scored = len(whole) - len(tokenizer.encode(context))
    whole = whole[-context_tokens:]
    return [tokenizer.begin_id, *whole], min(scored, len(whole))


def logits(model, tokens):
    """All logits [T, V] of one sample in a row of its own."""
    with torch.no_grad():
        hidden, _ = model.hidden_states(PackedTokens.one_sample_per_row(torch.tensor(tokens)[None]))
        return hidden @ model.lm_head.weight.T


def log_probability(model, tokenizer, prompt, continuation, context_tokens=10_000):
    """(nats of the continuation, whether greedy decoding gives it)."""
    tokens, scored = answer_tokens(tokenizer, prompt, continuation, context_tokens)
    found = logits(model, tokens[:-1])
    total, greedy = 0.0, True
    for place in range(len(tokens) - scored, len(tokens)):
        row = found[place - 1].double()
        total += float(row[tokens[place]] - row.logsumexp(0))
        greedy &= int(row.argmax()) == tokens[place]
    return total, greedy


def mean_and_error(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
