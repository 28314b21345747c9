import torch
from torch.distributed.utils import _to_kwargs

from moetrain.model_input import PackedTokens
from tests.models.test_transformer import make_model

TOKENS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))


def test_ddp_and_fsdp_leave_its_tensors_where_they_are():
    inputs = PackedTokens.one_sample_per_row(TOKENS)
    (arguments,), _ = _to_kwargs((inputs,), {}, torch.device("meta"), False)  # how both move arguments to the device
    assert arguments[0] is inputs


def test_one_sample_per_row():
    inputs = PackedTokens.one_sample_per_row(TOKENS, TOKENS.roll(-1, 1), torch.arange(40).expand(2, 40) % 2)
    with torch.no_grad():
        together = make_model()(inputs)
        for row in range(2):
            alone = make_model()(
                PackedTokens.one_sample_per_row(
                    TOKENS[row, None], inputs.targets_BT[row, None], inputs.recorded_BT[row, None]
                )
            )
            torch.testing.assert_close(together.loss_BT[row], alone.loss_BT[0])
            torch.testing.assert_close(together.routing.sums_LBRE[:, row], alone.routing.sums_LBRE[:, 0])
    assert together.routing.sums_LBRE.shape == (3, 2, 2, 8)
    assert torch.equal(together.routing.load_LE.sum(1), torch.full((3,), 2.0 * 80))


def test_without_recorded_tokens_no_sums_per_sample():
    with torch.no_grad():
        _, routing = make_model().hidden_states(PackedTokens.one_sample_per_row(TOKENS))
    assert routing.sums_LBRE.shape == (3, 2, 0, 8)
