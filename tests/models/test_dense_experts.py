"""A dense model's hidden units in blocks, recorded as routing."""

import pytest
import torch

from moetrain.config import SettingsError
from moetrain.models.dense_experts import block_rows, block_shares, record_blocks
from tests.models.test_router import masks
from tests.models.test_transformer import batch as batch
from tests.models.test_transformer import make_model


def numbers(tokens=20, hidden=8, units=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, units, generator=draw), torch.randn(hidden, units, generator=draw)


def slow_shares(units, down, blocks):
    """The definition, unit by unit, in Python's floats."""
    size, shares = units.shape[1] // blocks, []
    for token in units.tolist():
        mass = [abs(a) * sum(w * w for w in down[:, u].tolist()) ** 0.5 for u, a in enumerate(token)]
        sums = [sum(mass[block * size : (block + 1) * size]) for block in range(blocks)]
        shares.append([each / sum(sums) for each in sums])
    return torch.tensor(shares)


@pytest.mark.parametrize("blocks", [1, 3, 4, 12])
def test_shares_equal_a_slow_reference_and_sum_to_one(blocks):
    units, down = numbers()
    shares = block_shares(units, down, blocks)
    torch.testing.assert_close(shares, slow_shares(units, down, blocks))
    torch.testing.assert_close(shares.sum(-1), torch.ones(20))
    rounded = block_shares(units.bfloat16(), down.bfloat16(), blocks)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, slow_shares(units.bfloat16().float(), down.bfloat16().float(), blocks))


def test_shares_do_not_depend_on_how_a_units_scale_is_split_between_its_activation_and_its_column():
    units, down = numbers()
    scale = 2.0 ** torch.arange(-6, 6)  # exact in floating point
    assert torch.equal(block_shares(units * scale, down / scale, 4), block_shares(units, down, 4))
    assert not torch.allclose(block_shares(units * scale, down, 4), block_shares(units, down, 4))


def test_a_token_without_an_active_unit_has_equal_shares():
    units, down = numbers()
    units[3] = 0
    assert (block_shares(units, down, 4)[3] == 0.25).all()


def test_sums_and_counts_of_each_half_equal_a_plain_count():
    (units, down), x = numbers(), torch.randn(20, 8)
    routing = record_blocks(x, units, down, 4, masks())
    shares = slow_shares(units, down, 4)
    largest = torch.nn.functional.one_hot(shares.argmax(-1), 4).float()
    assert routing.sums_BRE.shape == routing.counts_BRE.shape == (2, 6, 4)
    for half, tokens in {0: [1], 1: [2], 2: [5, 7], 3: [6], 4: [], 5: []}.items():
        torch.testing.assert_close(routing.sums_BRE[0, half], shares[tokens].sum(0))
        assert torch.equal(routing.counts_BRE[0, half], largest[tokens].sum(0))
    assert not routing.sums_BRE[1].any()
    assert routing.inputs_BRD.numel() == 0


def test_a_blocks_row_gives_the_mean_of_its_gates_before_the_nonlinearity():
    gate_up, x = torch.randn(24, 8), torch.randn(20, 8)
    gates = (x @ gate_up[:12].T).view(20, 3, 4)
    torch.testing.assert_close(x @ block_rows(gate_up, 3).T, gates.mean(-1))


def test_recording_changes_no_bit_of_loss_and_gradients(batch):
    silent, silent_gradients = loss_and_gradients(make_model(experts="dense"), batch)
    for recompute in (False, True):
        model = make_model(experts="dense", dense_experts=8, recompute=recompute)
        output, found = loss_and_gradients(model, batch)
        assert torch.equal(output.loss_BT, silent.loss_BT)
        assert all(torch.equal(found[name], gradient) for name, gradient in silent_gradients.items())
        assert not output.routing.sums_LBRE.requires_grad
    assert silent.routing is None


def loss_and_gradients(model, batch, **options):
    output = model(batch.model_input(), **options)
    (output.loss_sum / 100).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_recomputing_layers_records_each_token_once(batch):
    kept, again = (
        loss_and_gradients(
            make_model(experts="dense", dense_experts=8, recompute=recompute), batch, record_layer_inputs=True
        )[0].routing
        for recompute in (False, True)
    )
    tokens = (batch.recorded_BT[:, None, :] == torch.arange(2 * batch.samples_BS.shape[1])[None, :, None]).sum(-1)
    for layer in range(3):
        torch.testing.assert_close(again.sums_LBRE[layer].sum(-1), tokens.float())
        assert torch.equal(again.counts_LBRE[layer].sum(-1), tokens.float())
    for field in ("sums_LBRE", "counts_LBRE", "inputs_LBRD"):
        assert getattr(kept, field).abs().sum() > 0
        assert torch.equal(getattr(kept, field), getattr(again, field)), field
    for field in ("probs_LE", "load_LE", "z_L", "entropy_L"):
        assert getattr(kept, field).numel() == 0


def test_a_pass_that_records_no_sample_records_nothing(batch):
    model = make_model(experts="dense", dense_experts=8)
    assert model(batch.model_input(by_sample=False)).routing is None


def test_the_order_of_the_blocks_is_that_of_the_units(batch):
    """Units moved together with their columns leave the model as it is, and their blocks move with them."""
    model, moved = (make_model(experts="dense", dense_experts=8) for _ in range(2))
    order = torch.arange(32).view(8, 4).flip(0).flatten()  # 8 blocks of 4 units, last block first
    with torch.no_grad():
        for layer in moved.model.layers:
            gate_up, down = layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
            gate_up.copy_(gate_up[torch.cat([order, 32 + order])])
            down.copy_(down[:, order])
        before, after = (each(batch.model_input()) for each in (model, moved))
    torch.testing.assert_close(after.loss_BT, before.loss_BT)
    torch.testing.assert_close(after.routing.sums_LBRE, before.routing.sums_LBRE.flip(-1))
    assert not torch.allclose(after.routing.sums_LBRE, before.routing.sums_LBRE)


def test_blocks_that_do_not_divide_the_units_are_refused(make_settings):
    dense = ("model.experts=dense", "model.intermediate_size=24", "model.num_experts_per_tok=2")
    assert make_settings(*dense, "model.dense_experts=16").watches_routing
    with pytest.raises(SettingsError, match=r"dense_experts 9 must divide the 48 hidden units"):
        make_settings(*dense, "model.dense_experts=9")
    assert not make_settings(*dense).watches_routing
    assert make_settings("model.dense_experts=9").watches_routing  # a setting of the dense model alone
