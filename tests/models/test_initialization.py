import pytest
import torch
from torch import nn

from moetrain.config import ModelSettings
from moetrain.models.initialization import initial_weights, initialize_weights
from moetrain.models.transformer import Transformer
from tests.models.test_transformer import SMALL

VARIANTS = [{}, {"tie_word_embeddings": True}, {"experts": "dense"}, {"num_shared_experts": 1, "balancing": "bias"}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_seed_gives_the_bits_that_it_gave_when_models_drew_their_weights_themselves(changes):
    settings = ModelSettings(**(SMALL | changes))
    torch.manual_seed(5)
    model = initialize_weights(Transformer(settings, 50, torch.float32))
    state = torch.get_rng_state()
    expected = Transformer(settings, 50, torch.float32)
    torch.manual_seed(5)
    expected.model.embed_tokens.weight = nn.Embedding(50, settings.hidden_size).weight
    if settings.tie_word_embeddings:
        expected.lm_head.weight = expected.model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, settings.initializer_range)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_are_drawn_one_parameter_at_a_time_in_the_models_order(changes):
    settings = ModelSettings(**(SMALL | changes))
    with torch.device("meta"):
        model = Transformer(settings, 50, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(5)
    drawn = initial_weights(settings, 50)
    first = next(drawn)
    after_first = torch.get_rng_state()
    weights = [first, *drawn]
    assert not torch.equal(torch.get_rng_state(), after_first)
    assert [(name, w.shape) for name, w in weights] == [(name, p.shape) for name, p in model.named_parameters()]
    assert all(w.device.type == "cpu" and w.dtype == torch.float32 for _, w in weights)
