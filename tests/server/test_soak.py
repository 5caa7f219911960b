"""The soak's short form; ``make soak`` is the long one."""

import pytest

from tests.soak import SERVERS, distinct_requests, soak

pytestmark = pytest.mark.server

NUM_REQUESTS = 100


@pytest.mark.parametrize("server", SERVERS)
def test_a_short_soak_ends_with_every_answer_as_in_isolation_and_nothing_left(server: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # for the server's process only
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        result = soak(server, NUM_REQUESTS, seconds=180)
    assert result.failures == []
    assert result.requests == NUM_REQUESTS
    assert result.preemptions > 0
    assert result.integrity["checks"] > 0
    ends = {outcome for counts in result.outcomes.values() for outcome in counts}
    assert ends == {"equal", "left"}, "some clients leave, and everybody else has the answer"
    names = distinct_requests([{}] * 4, [], {})
    assert len(set(names) & result.outcomes.keys()) > 0.7 * len(names), "most kinds of request came"
