"""vLLM's own API-server entry with our plug-in installed: no command of ours is needed."""

import json
import sys

import httpx
import pytest

from tests.server.harness import QUESTION, Server, content, image_url, kept, user
from vllm_hidrop.cli.local_server import local_server
from vllm_hidrop.embedded import MODEL_DIR

pytestmark = pytest.mark.server

COMMAND = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry")
SETTINGS = {
    "--model": str(MODEL_DIR),
    "--served-model-name": "tiny",
    "--hf-overrides": json.dumps({"architectures": ["HidropLlavaForConditionalGeneration"]}),
    "--additional-config": json.dumps({"hidrop": {"method": "fastv"}}),
    "--max-model-len": "2048",
}


def test_the_stock_entry_serves_pruned_and_survives_a_bad_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    arguments = [part for pair in SETTINGS.items() for part in pair]
    with (
        local_server([*arguments, "--enforce-eager"], on_wait=lambda: None, command=COMMAND) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        body = {"model": "tiny", "messages": [user([image_url()], QUESTION)], "max_tokens": 6, "temperature": 0}
        good = http.post("/v1/chat/completions", json=body)
        bad = http.post("/v1/chat/completions", json=body | {"vllm_xargs": {"hidrop": "perhaps"}})
        again = http.post("/v1/chat/completions", json=body)
    assert good.status_code == again.status_code == 200
    report = good.json()["kv_transfer_params"]["hidrop"]
    assert (report["mode"], kept(report)) == ("pruned", [576, 288])
    assert good.json()["choices"] == again.json()["choices"]
    assert bad.status_code == 500, "stock vLLM has no hook for a 400 here; hidrop serve answers one"


def test_a_stop_string_still_brings_the_report(server: Server) -> None:
    whole = server.chat([image_url()])
    end = content(whole).strip()[-2:]
    stopped = server.chat([image_url()], stop=[end])
    assert content(stopped) == content(whole).strip()[:-2]
    assert stopped["choices"][0]["stop_reason"] == end
    assert kept(stopped["hidrop"]) == kept(whole["hidrop"])
