"""Rows of what the trainer, the evaluation and the probes measure themselves: load of the experts, system, probes."""

from __future__ import annotations

from moetrain.metrics.cell import DOMAIN, MODEL, PROBE
from moetrain.metrics.metric import Metric

# fmt: off
TRAINER_METRICS: tuple[Metric, ...] = (
    Metric("load_cv", "experts/load_cv", "Load of the experts, variation", (MODEL,), evidence=15, compared=True,
           chart="control: load of the experts"),
    Metric("rank_load_cv", "experts/rank_load_cv", "Load of the ranks that hold experts, variation", (MODEL,),
           chart="control: load of the experts",
           text="With `train.expert_parallel`: standard deviation over mean of the rows sent to each of the ranks over "
           "which a layer's experts are split, summed over the steps since the last point; mean over layers, and the "
           "worst layer (`/worst`). 0: all ranks have the same work. The rank with the most sets the pace of all: of "
           "two ranks it has the mean times 1 plus this value. It does not show the load of single experts, as "
           "`experts/load_cv` does: full and empty experts on one rank balance each other."),
    Metric("entropy", "experts/entropy", "Entropy of the load", (MODEL,), compared=True,
           chart="control: load of the experts"),
    Metric("dead", "experts/dead", "Experts without a token, per layer", (MODEL,), compared=True),
    Metric("router_entropy", "", "Entropy of the router", (MODEL,), evidence=14,
           text="Entropy of the router's probabilities, mean over tokens and layers, in nats."),
    Metric("first_exposure", "loss/first_exposure", "Loss at first exposure", (DOMAIN,), compared=True,
           chart="loss at first exposure (a test loss at no cost)",
           text="Training loss of texts that the run meets for the first time, before the update, in nats per token, "
           "over the newest samples: a test loss that costs nothing. While it falls, the domain is still being learned "
           "in a way that carries over to new text."),
    *(
        Metric(f"exposure_{count}", f"loss/exposure_{count}", f"Loss after {count} or more exposures", (DOMAIN,),
               text=f"Training loss of texts that the run has trained on at least "
               f"{count} times, and less than twice as often, before the update, in nats per token. Its distance to "
               "loss/first_exposure is what the earlier exposures to the same text are worth.")
        for count in (1, 2, 4, 8, 16, 32, 64)
    ),
    Metric("excess_confidence", "memorized/excess_confidence", "Excess confidence on texts trained on", (DOMAIN,),
           text="Entropy of the prediction minus loss, nats per token, over the newest samples of texts that the run "
           "has trained on before. A calibrated model has 0 on new text, however hard it is. Above 0 the model is "
           "right more often than it believes, as memorized text makes it; towards perfect recall, and towards a "
           "perfectly learned rule, it returns to 0."),
    Metric("excess_confidence_unseen", "memorized/excess_confidence_unseen", "Excess confidence at first exposure",
           (DOMAIN,), text="The control of memorized/excess_confidence: the same at the first exposure to a text. "
           "It is near 0 unless the model is badly calibrated, as early in a run."),
    Metric("repeat_worth", "repeat/worth", "Worth of the next pass", (DOMAIN,), compared=True,
           chart="worth of the next pass (1 as good as fresh text, 0 worthless)"),
    Metric("repeat_passes", "repeat/passes", "Passes over the domain", (DOMAIN,),
           text="Tokens of the domain trained on, over the tokens of all its distinct texts."),
    Metric("repeat_budget", "repeat/budget", "Passes after which the next is worth half", (DOMAIN,), compared=True,
           text="Forecast of the passes after which the next one is worth half of fresh text, from all readings of "
           "repeat/worth so far: a curve exp(-(n / P) ** 2) through them. `summary.json` has its interval."),
    Metric("balance", "loss/balance", "Load-balancing loss", (MODEL,),
           text="Load-balancing loss, mean over layers. It is 1 where all experts have the same load."),
    Metric("z", "loss/z", "Router z loss", (MODEL,),
           text="Router z loss: mean squared logsumexp of the router's logits."),
    Metric("learning_rate", "optim/learning_rate", "Learning rate", (MODEL,), text="Learning rate of the update."),
    Metric("grad_norm", "optim/grad_norm", "Gradient norm", (MODEL,), text="Norm of the gradient before clipping."),
    Metric("tokens", "data/tokens", "Text tokens trained on", (DOMAIN,),
           text="Text tokens of the domain trained on so far."),
    Metric("tokens_per_second", "system/tokens_per_second", "Tokens per second", (MODEL,), compared=True,
           text="Throughput: text and marker tokens per second, over the time of training alone."),
    Metric("mfu", "system/mfu", "Model FLOPs utilization", (MODEL,),
           text="Model FLOPs utilization: share of the matmul rate measured at the start, at 6 FLOPs per token and "
           "active parameter. The matmuls of attention scores are not counted."),
    Metric("data_wait", "system/data_wait", "Share of training time spent waiting for data", (MODEL,),
           text="Share of training time during which training waited for the next batch."),
    Metric("memory", "system/memory", "Peak memory", (MODEL,),
           text="Peak memory in bytes: of the device on CUDA, else of the process."),
    Metric("monitor_share", "system/monitor_share", "Share of time spent on monitoring", (MODEL,), compared=True,
           text="Share of the run's time spent on monitoring."),
    Metric("monitor_panel", "system/monitor_panel", "Share of time spent on the panel", (MODEL,),
           text="Share of the run's time spent on reading the panel and computing its metrics."),
    Metric("monitor_probes", "system/monitor_probes", "Share of time spent on probes", (MODEL,),
           text="Share of the run's time spent on the probes."),
    Metric("monitor_stream", "system/monitor_stream", "Share of time spent on streaming metrics", (MODEL,),
           text="Share of the run's time spent on recording routing and on the streaming metrics."),
    Metric("accuracy", "probe/accuracy", "accuracy", (PROBE,), compared=True,
           text="Share of the task's items answered correctly: the correct choice has the largest log-probability, or "
           "the most likely answer is the target."),
    Metric("accuracy_per_character", "probe/accuracy_per_character", "accuracy per character", (PROBE,),
           text="Share of items whose correct choice has the largest log-probability per character."),
    Metric("accuracy_centred", "probe/accuracy_centred", "accuracy above chance", (PROBE,),
           chart="probes: accuracy above chance (0) to all correct (1)",
           text="Accuracy on a scale where 0 is chance and 1 is all items correct."),
    Metric("bpb", "probe/bpb", "bits per byte", (PROBE,), compared=True,
           chart="probes: bits per byte of the correct answer",
           text="Bits per byte of the correct answer, given the question. It falls long before accuracy rises."),
    Metric("soft", "probe/soft", "soft", (PROBE,),
           text="Probability of the correct choice among all choices, mean over items. Less noisy than accuracy."),
    Metric("exact_match", "probe/exact_match", "exact match", (PROBE,),
           text="Share of items whose generated answer is the target."),
)
# fmt: on
