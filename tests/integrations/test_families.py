"""The table of families against what each family's expert layers receive, on tiny random models."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from moetrain.integrations.families import FAMILIES, LEFT_OUT, FamilyError, attribute, find_routers  # noqa: E402
from tests.integrations.tiny import VOCABULARY, tiny_model  # noqa: E402


def with_routers():
    """The folders of transformers' models whose routers it can record."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if '"router_logits": OutputRecorder' in path.read_text():
            yield path


def test_every_family_of_transformers_has_a_row_or_a_reason():
    unknown = []
    for path in with_routers():
        text = path.read_text()
        kinds = {
            kind
            for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
            if any(f"class {name}(" in text for name in ([names] if isinstance(names, str) else names))
        }
        unknown += [kind for kind in kinds or {path.parent.name} if kind not in FAMILIES and kind not in LEFT_OUT]
    assert unknown == []
    assert not FAMILIES.keys() & LEFT_OUT.keys()


def received(model, routers):
    """Hooks that collect, by router, the (token, expert) pairs that its expert layer computes."""
    found = {}
    blocks = {id(router): number for number, router in enumerate(routers.modules)}
    for module in model.modules():
        children = dict(module.named_children())
        numbers = [blocks[id(child)] for child in children.values() if id(child) in blocks]
        experts = [child for child in children.values() if re.search(r"Experts?(Module|List)?$", type(child).__name__)]
        if not numbers or not experts:
            continue
        experts[0].register_forward_pre_hook(collector(found, numbers[0], module), with_kwargs=True)
    return found


def collector(found, number, block):
    def hook(experts, args, kwargs):
        names = list(inspect.signature(experts.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        integers = [value for value in given.values() if torch.is_tensor(value) and value.dtype == torch.int64]
        if integers:
            (index,) = integers
            floats = [
                v for v in given.values() if torch.is_tensor(v) and v.is_floating_point() and v.shape == index.shape
            ]
            used = floats[0] != 0 if floats else torch.ones_like(index, dtype=torch.bool)
            index = index.reshape(-1, index.shape[-1])
            used = used.reshape(index.shape)
            found[number] = {
                (t, int(e)) for t, row in enumerate(index) for e, ok in zip(row, used[t], strict=True) if ok
            }
        elif "expert_size" in given:  # jetmoe: rows sorted by expert
            rows, sizes = given["inputs"], given["expert_size"]
            owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            same = (rows[:, None] == block.seen[None]).all(-1)
            assert (same.sum(1) == 1).all()
            found[number] = set(zip(same.float().argmax(1).tolist(), owner.tolist(), strict=True))
        else:  # llama4: every expert computes all tokens, scaled to 0 where it is not chosen
            (rows,) = (value for value in given.values() if torch.is_tensor(value))
            used = rows.view(8, -1, rows.shape[-1]).abs().sum(-1) > 0
            found[number] = {(int(t), int(e)) for e, t in used.nonzero()}

    return hook


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_the_table_chooses_the_experts_that_the_model_uses(kind):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    model = tiny_model(kind)
    routers = find_routers(model)
    family = routers.family
    for router in routers.modules:  # at initialization rows are nearly 0 and biases all 0: no test of their use
        rows = attribute(router, family.rows)
        rows.copy_(torch.randn_like(rows))
        if family.bias and not family.bias_is_argument:
            bias = attribute(router, family.bias)
            bias.copy_(0.3 * torch.randn_like(bias))
    if family.bias_is_argument:
        for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith(family.bias):
                buffer.copy_(0.3 * torch.randn_like(buffer))
    for module in model.modules():
        if type(module).__name__ == "JetMoeTopKGating":
            parent = next(each for each in model.modules() if module in each.children())
            module.register_forward_pre_hook(lambda router, args, parent=parent: setattr(parent, "seen", args[0]))
    truth = received(model, routers)
    derived, biased = {}, []

    def hook(number):
        def derive(router, args, kwargs, output):
            logits = output[routers.output] if isinstance(output, tuple) else output
            logits = logits.reshape(-1, routers.experts)
            argument = (list(args[1:]) + list(kwargs.values()) + [None])[0] if family.bias_is_argument else None
            biased.append(argument is not None)
            chosen = family.choice(router, logits, routers.top_k, argument)
            assert chosen.shape == (len(logits), routers.top_k)
            probabilities = family.probabilities(router, logits)
            assert torch.allclose(probabilities.sum(-1), torch.ones(len(logits)), atol=1e-5)
            assert (probabilities >= 0).all()
            derived[number] = {
                (t, int(e)) for t, row in enumerate(chosen) for e in row if e < routers.experts - family.skips
            }

        return derive

    for number, router in enumerate(routers.modules):
        router.register_forward_hook(hook(number), with_kwargs=True)
    # No token twice: equal tokens have equal inputs in the first layer, which jetmoe's are told apart by.
    tokens = 3 + torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(1))[:32].view(2, 16)
    model(input_ids=tokens, use_cache=False)
    assert all(biased) or not family.bias_is_argument
    assert len(truth) == len(routers.modules)
    assert derived == truth
    assert len({expert for pairs in truth.values() for _, expert in pairs}) > routers.top_k


def test_a_model_without_experts_is_refused():
    with pytest.raises(FamilyError, match="Linear has no router"):
        find_routers(nn.Linear(2, 2))


def test_a_family_without_a_row_is_refused_with_the_reason():
    with pytest.raises(FamilyError, match="doge models cannot be read: its router scores two lists of keys"):
        find_routers(tiny_model("doge", is_moe=True))
