"""Who is the champion when promotions race, are killed, or are measured otherwise."""

import pytest

from core.settings.registry import RegistrySettings
from core.steps.promotion import promote
from core.tracking.registry import CHAMPION, Registry
from tests.support.registry import candidate


@pytest.fixture
def name(request):
    return request.node.originalname


def test_who_loses_the_race_for_the_alias_is_compared_with_who_has_won_it(uri, name, monkeypatch):
    old = candidate(uri, name, "old", perplexity=30.0)[1]
    registry = Registry(uri, name)
    assert registry.move(CHAMPION, old, expected="")
    winner = candidate(uri, name, "winner", perplexity=20.0)[1]
    loser = candidate(uri, name, "loser", perplexity=29.0)[1]
    move, moves = Registry.move, []

    def late(self, alias, version, *, expected):
        if not moves:
            assert move(self, CHAMPION, winner, expected=old)
        moves.append(version)
        return move(self, alias, version, expected=expected)

    monkeypatch.setattr(Registry, "move", late)
    decision = promote(registry, RegistrySettings(), loser, again=False)
    assert (decision.verdict, decision.champion, moves) == ("worse", winner, [loser])
    assert registry.find(CHAMPION).number == winner
    tags = registry.client.get_model_version(name, loser).tags
    assert (tags["adapt_pruner.decision"], tags["adapt_pruner.decided_against"]) == ("not promoted", winner)


def test_a_decision_that_was_not_written_down_is_when_its_step_runs_again(uri, name, monkeypatch):
    version = candidate(uri, name, "only", perplexity=30.0)[1]
    registry = Registry(uri, name)
    with monkeypatch.context() as killed:
        killed.setattr(Registry, "note", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote(registry, RegistrySettings(), version, again=False)
    assert registry.find(CHAMPION).number == version
    assert promote(registry, RegistrySettings(), version, again=False).verdict == "is the champion"
    assert registry.find(version).tags["adapt_pruner.decision"] == "promoted"


def test_a_champion_that_is_measured_again_can_be_compared(uri, name):
    registry = Registry(uri, name)
    champion = candidate(uri, name, "first", measured="before", perplexity=30.0)[1]
    assert registry.move(CHAMPION, champion, expected="")
    newer = candidate(uri, name, "second", measured="after", perplexity=24.0)[1]
    assert promote(registry, RegistrySettings(), newer).verdict == "not comparable"
    again = candidate(uri, name, "first-after", checkpoint="first", measured="after", perplexity=25.0)[1]
    assert again not in (champion, newer)
    assert promote(registry, RegistrySettings(), again).verdict == "is the champion"
    decision = promote(registry, RegistrySettings(), newer)
    assert (decision.verdict, decision.champion) == ("not worse", champion)
    assert decision.comparison.champion == 25.0
    assert registry.find(CHAMPION).number == newer
