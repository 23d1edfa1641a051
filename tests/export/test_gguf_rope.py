import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.export.gguf_rope import frequency_factors
from tests.support.models import CONFIGS, LLAMA3

TINY = LLAMA3 | {"factor": 4.0, "high_freq_factor": 2.0}


@pytest.mark.parametrize(
    ("width", "rope"), [(10, TINY), (64, LLAMA3 | {"original_max_position_embeddings": 8192})]
)
def test_rotary_factors_divide_the_frequencies_as_transformers_does(width, rope):
    config = CONFIGS["llama"]()
    config = type(config).from_dict(config.to_dict() | {"head_dim": width, "rope_parameters": rope})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = frequency_factors(config, "llama")
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    torch.testing.assert_close(factors, (plain / theirs).float(), rtol=1e-5, atol=0)
    assert {1.0, rope["factor"]} <= set(factors.tolist())
    assert frequency_factors(CONFIGS["llama"](), "llama") is None
