"""Our safety flags, and what stands when none is given; no engine."""

import argparse
from pathlib import Path

import pytest

from hidrop_server.control.settings import METRICS_KEY, SETTINGS, Setting, add_flags, keys_of

ROOT = Path(__file__).parents[3]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    add_flags(made)
    return made


@pytest.mark.parametrize(
    ("says", "argv"),
    [
        ("at least 1", ["--max-body-mb", "0"]),
        ("at least 1", ["--max-header-kb", "-1"]),
        ("at least 1", ["--max-json-values", "0"]),
        ("at least 1", ["--max-body-mb", "lots"]),
        ("number of seconds", ["--request-timeout", "-1"]),
        ("number of seconds", ["--request-timeout", "nan"]),
        ("number of seconds", ["--request-timeout", "soon"]),
        ("IPv4 or IPv6 network", ["--allowed-media-networks", "here"]),
        ("host bits", ["--allowed-media-networks", "10.0.0.1/8"]),
    ],
)
def test_a_value_that_means_nothing_is_refused(says: str, argv: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError, match=says):
        parser().parse_args(argv)


def test_nothing_is_unbounded_by_default() -> None:
    args = parser().parse_args([])
    assert (args.max_body_mb, args.max_header_kb, args.request_timeout) == (32, 32, 600)
    assert args.max_json_values == 262144
    assert not args.enable_admin_routes
    assert args.allowed_media_networks == []
    assert (args.limit_mm_per_prompt, args.max_num_queued_reqs, args.shutdown_timeout) == (
        {"image": 16, "video": 1},
        1024,
        20,
    )
    assert (args.max_video_frames, args.max_video_seconds) == (32, 300)
    assert (args.max_video_megapixels, args.max_video_decode_seconds) == (100, 30)


def test_help_does_not_print_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDROP_METRICS_API_KEY", "the-key")
    formatted = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(formatted)
    assert "the-key" not in formatted.format_help()
    assert keys_of(formatted.parse_args([]), METRICS_KEY) == ["the-key"]
    assert keys_of(formatted.parse_args(["--metrics-api-key", "another"]), METRICS_KEY) == ["another"]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_row_names_the_modules_that_apply_it(setting: Setting) -> None:
    names = [name.replace(".", "/") for name in setting.applied.split(", ") if "vLLM" not in name]
    for name in names:
        assert (ROOT / f"{name}.py").exists() or (ROOT / "server" / f"{name}.py").exists() or " " in name, name
