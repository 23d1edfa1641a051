"""The warmup-stable-decay learning rate, one schedule over all phases of a run (section 3.2)."""


def wsd_learning_rate(
    step: int, total_steps: int, *, peak: float, floor: float, warmup_share: float, decay_share: float
) -> float:
    """Return the learning rate of one optimizer step.

    Linear warm-up to ``peak``, constant, then linear decay to ``floor``, which the last step reaches. A
    phase that starts at a later step continues the same curve.

    Args:
        step: Global step, from 0, over all phases.
        total_steps: Steps of all phases together.
        peak: Learning rate between warm-up and decay.
        floor: Learning rate of the last step.
        warmup_share: Share of all steps that warm up.
        decay_share: Share of all steps that decay.
    """
    warmup = round(total_steps * warmup_share)
    decay = round(total_steps * decay_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    decayed = step - (total_steps - decay) + 1
    if decayed > 0:
        return peak + (floor - peak) * decayed / decay
    return peak
