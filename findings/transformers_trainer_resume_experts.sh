#!/usr/bin/env bash
# transformers 5.24.0: Trainer.train(resume_from_checkpoint=...) does not restore the experts of an OLMoE model, whose
# checkpoint was written by the same Trainer. All other weights are restored, and training goes on.
#
# Seen with transformers 5.24.0, torch 2.13.0 (CPU), accelerate 1.15.0, Python 3.11: on disk each expert has a key of its
# own, in memory the experts of a layer are one tensor, and the Trainer loads the file without joining them. The two
# tensors of experts keep the values that the new model was initialized with; a warning about missing keys is all that
# is said. OlmoeForCausalLM.from_pretrained of the same folder is right. This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/case.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainingArguments

place = sys.argv[1] + "/run"


def model(seed):
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    experts = dict(num_experts=4, num_experts_per_tok=2)
    return OlmoeForCausalLM(OlmoeConfig(vocab_size=32, pad_token_id=None, eos_token_id=None, **shape, **experts))


def trainer(model):
    data = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    # A learning rate of 0: all weights stay what they are when training begins.
    short = dict(max_steps=2, save_steps=2, learning_rate=0.0)
    return Trainer(model, TrainingArguments(place, report_to=[], use_cpu=True, **short), train_dataset=data)


first = trainer(model(0))
first.train()
resumed = trainer(model(1))
resumed.train(resume_from_checkpoint=place + "/checkpoint-2")
loaded = OlmoeForCausalLM.from_pretrained(place + "/checkpoint-2")


def different(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    return [name for (name, x), y in pairs if not torch.equal(x, y)]


print("transformers", transformers.__version__, "torch", torch.__version__)
print("differs from the saved model after from_pretrained:", different(first.model, loaded))
print("differs from the saved model after resuming:", different(first.model, resumed.model))
assert different(first.model, loaded) == []
experts = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
assert different(first.model, resumed.model) == experts, "experts are restored now"
PYTHON
"$folder/venv/bin/python" "$folder/case.py" "$folder"
