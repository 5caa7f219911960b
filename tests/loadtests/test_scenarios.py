"""What a scenario may say, and what its clients then send."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import cv2
import pytest

from hidrop_loadtests.pictures import video_url
from hidrop_loadtests.scenarios import SHIPPED, Scenario, choose, lengthened, load
from hidrop_loadtests.traffic import Ask, first_turns, mistakes, next_turns

NAMES = ["smoke", "steady", "burst", "ramp", "soak", "multi-image", "video", "chat-turns", "cancel-storm", "abuse"]


def scenario(**more: Any) -> Scenario:
    own: dict[str, Any] = {
        "summary": "?",
        "seed": 3,
        "requests": 12,
        "seconds": 60,
        "arrivals": {"kind": "closed", "at_once": 4},
        "images": 1,
        "image_side": 32,
        "words": 5,
        "output_tokens": 4,
        "goal": {"ttft_ms": 1000, "e2e_ms": 2000},
    }
    return Scenario.model_validate(own | more)


def parts(ask: Ask, kind: str) -> list[dict[str, Any]]:
    return [part for part in ask.messages[0]["content"] if part["type"] == kind]


def test_every_scenario_of_the_issue_is_shipped_and_bounded() -> None:
    found = load()
    assert list(found) == NAMES
    assert all(each.requests <= 1000 and each.seconds <= 600 for each in found.values())
    assert len({each.seed for each in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"requets": 1}, "Extra inputs are not permitted"),
        ({"requests": 0}, "greater than or equal to 1"),
        ({"seconds": float("inf")}, "less than or equal to"),
        ({"arrivals": {"kind": "poisson", "requests_per_second": 0.1}}, "sending 12 requests takes 120 s"),
        ({"arrivals": {"kind": "burst", "at_once": 2, "every_seconds": 30}}, "sending 12 requests takes 150 s"),
        ({"arrivals": {"kind": "constant"}}, "does not match any of the expected tags"),
        ({"turns": 5}, "no whole number of conversations"),
        ({"turns": 2, "arrivals": {"kind": "poisson", "requests_per_second": 9}}, "a turn waits"),
        ({"bad_share": 0.6, "cancel_share": 0.6}, "add up to more than 1"),
        ({"passes": {"good_share": 1.5}}, "less than or equal to 1"),
        ({"goal": {"ttft_ms": 0, "e2e_ms": 1}}, "greater than 0"),
    ],
)
def test_a_mistake_in_a_scenario_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        scenario(**more)


def test_a_mistake_in_a_file_names_file_scenario_and_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED.read_text().replace("requests = 8", "requests = -8"))
    with pytest.raises(ValueError, match=r"mine\.toml: smoke\.requests: .*greater than or equal to 1"):
        load(path)
    path.write_text("[smoke")
    with pytest.raises(ValueError, match=r"mine\.toml"):
        load(path)
    with pytest.raises(ValueError, match="unknown scenario 'smok'; known: smoke, steady"):
        choose("smok")


def test_a_longer_run_has_more_requests_in_more_time_at_the_same_rate() -> None:
    soak = choose("soak")
    hour = lengthened(soak, 12)
    assert (hour.requests, hour.seconds, hour.arrivals) == (12 * soak.requests, 12 * soak.seconds, soak.arrivals)
    with pytest.raises(ValueError, match=r"1000 times as long: requests: .*less than or equal to 100000"):
        lengthened(soak, 1000)


def test_two_servers_get_the_same_traffic_and_different_pictures() -> None:
    both = [first_turns(scenario(bad_share=0.2, cancel_share=0.3), seed) for seed in (0, 1)]
    again = first_turns(scenario(bad_share=0.2, cancel_share=0.3), 0)
    assert [ask.messages for ask in again] == [ask.messages for ask in both[0]]
    assert len({ask.bad for ask in both[0]}) > 1
    for one, other in zip(*both, strict=True):
        assert (one.cancel_after, one.bad, one.body) == (other.cancel_after, other.bad, other.body)
        assert parts(one, "text") == parts(other, "text")
        assert parts(one, "image_url") != parts(other, "image_url") or one.bad
    pictures = [json.dumps(part) for asks in both for ask in asks for part in parts(ask, "image_url")]
    assert len(set(pictures)) == len(pictures)


def test_shares_are_kept_and_images_come_before_the_text() -> None:
    asks = first_turns(scenario(requests=200, bad_share=0.25, cancel_share=0.5, images=2), 0)
    assert 30 < sum(ask.bad is not None for ask in asks) < 70
    leaving = [ask.cancel_after for ask in asks if ask.cancel_after is not None]
    assert 80 < len(leaving) < 120
    assert all(0 <= seconds <= 1 for seconds in leaving)
    kinds = [part["type"] for part in next(ask for ask in asks if ask.bad is None).messages[0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    assert {ask.bad for ask in asks} - {None} == set(mistakes())


def test_videos_are_sent_by_the_scenario_of_their_name_alone_and_differ() -> None:
    assert [name for name, each in load().items() if each.videos] == ["video"]
    small = scenario(requests=3, images=1, videos=2, video_side=32, video_frames=5)
    asks = first_turns(small, 0)
    assert [part["type"] for part in asks[0].messages[0]["content"]] == ["video_url", "video_url", "image_url", "text"]
    urls = [part["video_url"]["url"] for ask in asks for part in parts(ask, "video_url")]
    assert len(set(urls)) == 6
    assert [ask.messages for ask in first_turns(small, 0)] == [ask.messages for ask in asks], "the same clips again"
    assert not set(urls) & {
        part["video_url"]["url"] for ask in first_turns(small, 1) for part in parts(ask, "video_url")
    }


def test_a_video_can_be_decoded_to_its_frames() -> None:
    file = base64.b64decode(video_url((1, 2), 48, 7).partition(",")[2])
    stream: Any = io.BytesIO(file)
    capture = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, [])
    frames = [capture.read()[1] for _ in range(7)]
    assert all(frame.shape == (48, 48, 3) for frame in frames)
    assert not capture.read()[0]
    assert abs(frames[0].astype(int) - frames[6]).max() > 50, "something moves"


def test_bursts_are_sent_at_fixed_times() -> None:
    asks = first_turns(scenario(arrivals={"kind": "burst", "at_once": 5, "every_seconds": 2.5}), 0)
    assert [ask.send_at for ask in asks] == [0] * 5 + [2.5] * 5 + [5.0] * 2


def test_a_turn_carries_the_picture_and_the_answers_before_it() -> None:
    turns = scenario(turns=3)
    first = first_turns(turns, 0)
    second = next_turns(turns, first, [f"answer {index}" for index in range(len(first))], 1)
    assert len(first) == 4
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert other.messages[:1] == one.messages
        assert other.messages[1] == {"role": "assistant", "content": f"answer {index}"}
        assert [message["role"] for message in other.messages] == ["user", "assistant", "user"]
    assert second[0].messages[2] != first[0].messages[0]
