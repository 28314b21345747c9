"""Training: one step, load balancing, guards against bad steps, held-out loss, throughput, initial weights."""
