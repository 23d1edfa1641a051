"""The number formats of a run's checkpoints, from the base model to the last phase."""

from types import SimpleNamespace

import pytest
import torch

from core.steps.formats import written_format


@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("phases", "steps"), [(1, 0), (1, 5), (2, 0), (2, 5)])
def test_the_last_checkpoint_of_a_run_has_the_format_of_its_base(base, phases, steps):
    settings = SimpleNamespace(
        model=SimpleNamespace(dtype="auto", dtype_between_phases="float32"),
        prune=SimpleNamespace(phases=phases),
        training=SimpleNamespace(total_steps=steps),
    )
    run = SimpleNamespace(key="k", settings=settings)
    written, provenance = [base], {}
    for phase in range(1, phases + 1):
        for trained in (False, True)[: 2 if steps else 1]:
            read = SimpleNamespace(provenance=provenance, dtype=written[-1])
            dtype, told = written_format(run, phase, read, trained=trained)
            written.append(dtype)
            provenance = {"run": run.key, **told}
    wide = torch.promote_types(base, torch.float32)
    assert written[1:] == [wide] * (len(written) - 2) + [base]
