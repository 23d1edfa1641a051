"""A separable quadratic model of what changes of layer widths cost, and its minimum at a given sum."""

from collections.abc import Sequence


def parabola(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope and the curvature at 0 of the parabola through the origin and up to two points.

    Args:
        points: Changes other than 0, each with its cost. Without any, both are 0; one gives a straight line.
    """
    if not points:
        return 0.0, 0.0
    (a, of_a), *others = points
    if not others:
        return of_a / a, 0.0
    ((b, of_b),) = others
    curvature = 2 * (of_a / a - of_b / b) / (a - b)
    return of_a / a - curvature * a / 2, curvature


def cheapest(
    slopes: Sequence[float],
    curvatures: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    total: float,
) -> list[float]:
    """Minimise sum(g d + h d^2 / 2) over changes d within bounds that add up to ``total``.

    Args:
        slopes: g of each layer.
        curvatures: h, positive.
        low: Least change of each layer.
        high: Largest change.
        total: Of the changes; the nearest that the bounds allow is taken.

    Returns:
        Each layer's change: all have the same marginal cost, except those at a bound.
    """

    def changes(price: float) -> list[float]:
        return [
            min(max((price - g) / h, least), most)
            for g, h, least, most in zip(slopes, curvatures, low, high, strict=True)
        ]

    ends = [
        g + h * bound
        for bounds in (low, high)
        for g, h, bound in zip(slopes, curvatures, bounds, strict=True)
    ]
    least, most = min(ends), max(ends)
    for _ in range(100):
        middle = (least + most) / 2
        if sum(changes(middle)) < total:
            least = middle
        else:
            most = middle
    return changes(most)
