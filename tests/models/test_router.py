import torch

from moetrain.config import ModelSettings
from moetrain.model_input import PackedTokens
from moetrain.models.router import RecordingMasks, Router, record_weights


def make_router(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_experts": 6, "num_experts_per_tok": 2}
    router = Router(ModelSettings(**(sizes | changes)))
    torch.nn.init.normal_(router.weight)
    return router


def masks():
    """Two rows of 10 tokens: two samples and a padding token; one sample. Some tokens of the first are recorded."""
    slots, recorded = torch.zeros(2, 10, dtype=torch.int64), torch.full((2, 10), -1)
    slots[0, 4:9], slots[0, 9] = 1, -1
    recorded[0, 1:3] = torch.tensor([0, 1])
    recorded[0, 5:8] = torch.tensor([2, 3, 2])
    unused = torch.zeros_like(slots)
    return RecordingMasks.make(PackedTokens(unused, None, unused, slots, recorded, unused, slots_per_row=3))


def test_statistics_equal_a_plain_count():
    router, x = make_router(), torch.randn(20, 8)
    decision, routing = router(x, masks())
    probs = (x @ router.weight.T).softmax(-1)
    chosen = probs.topk(2).indices
    assert torch.equal(decision.index_NK, chosen)
    torch.testing.assert_close(decision.weight_NK, probs.gather(1, chosen))
    sent = torch.zeros(20, 6).scatter_(1, chosen, 1.0)
    assert routing.sums_BRE.shape == (2, 6, 6)
    for half, tokens in {0: [1], 1: [2], 2: [5, 7], 3: [6], 4: [], 5: []}.items():
        torch.testing.assert_close(routing.sums_BRE[0, half], probs[tokens].sum(0))
        torch.testing.assert_close(routing.counts_BRE[0, half], sent[tokens].sum(0))
    assert (routing.sums_BRE[1] == 0).all()
    real = [*range(9), *range(10, 20)]
    logits = x[real] @ router.weight.T
    torch.testing.assert_close(routing.probs_E, probs[real].sum(0))
    torch.testing.assert_close(routing.load_E, sent[real].sum(0))
    torch.testing.assert_close(routing.z, logits.logsumexp(-1).square().sum())
    torch.testing.assert_close(routing.entropy, -(probs[real] * probs[real].log()).sum())


def test_only_inputs_of_losses_have_gradients():
    _, routing = make_router()(torch.randn(20, 8, requires_grad=True), masks())
    assert routing.probs_E.requires_grad
    assert routing.z.requires_grad
    assert not any(x.requires_grad for x in (routing.sums_BRE, routing.counts_BRE, routing.load_E, routing.entropy))


def test_the_router_computes_in_float32_from_bf16_input():
    decision, routing = make_router()(torch.randn(20, 8).bfloat16(), masks())
    assert decision.weight_NK.dtype == routing.sums_BRE.dtype == torch.float32


def test_a_selection_bias_changes_the_selection_but_not_the_weights():
    router = make_router(balancing="bias")
    x = torch.randn(20, 8)
    router.selection_bias[3] = 10.0
    decision, _ = router(x, masks())
    assert (decision.index_NK == 3).any(1).all()
    probs = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(decision.weight_NK, probs.gather(1, decision.index_NK))


def test_normalized_weights_sum_to_one():
    decision, _ = make_router(norm_topk_prob=True)(torch.randn(20, 8), masks())
    torch.testing.assert_close(decision.weight_NK.sum(1), torch.ones(20))


def test_top_k_weights_are_recorded_on_request_and_nothing_else_changes():
    router, x = make_router(), torch.randn(20, 8)
    decision, usual = router(x, masks())
    record_weights(torch.nn.Sequential(router), "top_k")
    same, renormalised = router(x, masks())
    assert torch.equal(same.weight_NK, decision.weight_NK)
    probs = (x @ router.weight.T).softmax(-1)
    for half, tokens in {0: [1], 2: [5, 7], 3: [6]}.items():
        expected = torch.zeros(6)
        for token in tokens:
            chosen = probs[token].topk(2)
            expected[chosen.indices] += chosen.values / chosen.values.sum()
        torch.testing.assert_close(renormalised.sums_BRE[0, half], expected)
    for name in ("counts_BRE", "probs_E", "load_E", "z", "entropy"):
        assert torch.equal(getattr(renormalised, name), getattr(usual, name)), name
