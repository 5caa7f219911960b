"""Whether a run passed: every threshold of its scenario against what was measured."""

import math
from dataclasses import dataclass

from hidrop_loadtests.running import Result
from hidrop_loadtests.scenarios import Scenario


@dataclass(frozen=True)
class Verdict:
    """One threshold at one arm: what was measured, wanted and found, as text, and whether the arm passed."""

    arm: str
    what: str
    wanted: str
    found: str
    passed: bool


def judge(scenario: Scenario, result: Result) -> list[Verdict]:
    """Check every threshold of the scenario that applies to this result."""
    passes, verdicts = scenario.passes, []

    def verdict(what: str, wanted: str, found: str, passed: bool) -> None:
        verdicts.append(Verdict(result.arm.name, what, wanted, found, passed))

    answered = result.count("answered", bad=False)
    failed = sum(result.count(kind, bad=False) for kind in ("failed", "refused"))
    verdict("requests without an answer", f"<= {passes.failed}", str(failed), failed <= passes.failed)
    share = result.within(scenario.goal) / answered if answered else 0.0
    verdict("answers within the goal", f">= {passes.good_share:.0%}", f"{share:.1%}", share >= passes.good_share)
    if passes.layer_token_ratio is not None and result.arm.prunes:
        saved = result.growth.savings()["pairs"].get("layer tokens of prefills", {}).get("ratio", 1.0)
        wanted = passes.layer_token_ratio
        verdict("layer tokens, dense to run", f">= {wanted:.2f}x", f"{saved:.2f}x", saved >= wanted)
    if passes.drift is not None:
        drift = result.drift()
        found = "too few answers" if drift is None else f"{drift:.2f}x"
        verdict("times at the end to the start", f"<= {passes.drift:g}x", found, (drift or math.inf) <= passes.drift)
    bad = [outcome for outcome in result.outcomes if outcome.bad is not None]
    if bad:
        answered_otherwise = sorted({f"{o.bad}: {o.error or o.kind}" for o in bad if o.kind != "refused"})
        verdict(
            "bad requests refused", "each by a 4xx", ", ".join(answered_otherwise) or "each", not answered_otherwise
        )
        slowest = max(outcome.latency for outcome in bad)
        limit = passes.refusal_seconds
        verdict("slowest refusal", f"<= {limit:.1f} s", f"{slowest:.2f} s", slowest <= limit)
    idle = result.idle_seconds
    found = "not" if idle is None else f"after {idle:.1f} s"
    verdict("idle and ready again", f"<= {passes.idle_seconds:.0f} s", found, idle is not None)
    return verdicts
