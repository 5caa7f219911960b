"""``hidrop methods`` and ``hidrop plan``, as a user types them."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.command_line import run, the_line
from vllm_hidrop.cli.app import app
from vllm_hidrop.cli.costing import SHAPES, Workload, request_costs
from vllm_hidrop.cli.media import image
from vllm_hidrop.config import HidropConfig, resolve
from vllm_hidrop.methods import METHODS, ModelShape
from vllm_hidrop.models.llava import Llava
from vllm_hidrop.plan.shapes import TextShape, text_shape
from vllm_hidrop.plan.vision import LLAVA_7B_VISION

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 192,
        "patch_size": 8,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 89,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.stderr
    return result.stdout


def plan_json(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(invoke("plan", *arguments, "--json"))
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidrop": {"method": "hidrop", "preset": "embedded"}}))
    return tmp_path


def test_help_and_the_command_line_itself_import_neither_torch_nor_vllm() -> None:
    heavy = ("torch", "vllm", "transformers")
    code = f"import sys, vllm_hidrop.cli.app; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_methods_lists_every_method_with_its_options_and_presets() -> None:
    text = invoke("methods")
    catalogue = json.loads(invoke("methods", "--json"))
    assert [row["name"] for row in catalogue] == list(METHODS)
    for row in catalogue:
        assert row["name"] in text
        assert all(f"{option} =" in text for option in row["options"])
        assert all(preset in text for preset in row["presets"])
    fastv = next(row for row in catalogue if row["name"] == "fastv")
    assert fastv["options"] == {"layer": 2, "keep": 0.5, "exit_layer": None}
    assert fastv["paper"] == "arXiv 2403.06764"


def test_plan_prints_a_row_per_stage_and_the_totals_within_80_columns() -> None:
    text = invoke("plan", "7b", "--method", "hidrop", "--preset", "tok64", "--images", "576", "--text", "64")
    assert "hidrop tok64 on 7b: 576 vision and 64 text tokens" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["2", "10-13", "215", "279", "44%", "18", "45%", "18.00", "45%", "490.61", "47%"] in lines
    assert ["all", "0-31", "64.0", "128.0", "20%", "69", "22%", "69.00", "22%", "1726.22", "21%"] in lines
    assert "text model: 4.86" in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_json_says_what_the_table_says() -> None:
    found = plan_json("7b", "--method", "hidrop", "--block-size", "16")
    assert (found["method"], found["preset"], found["block_size"]) == ("hidrop", "tok64", 16)
    assert found["images"] == [576]
    assert [stage["vision_tokens"] for stage in found["stages"]] == [0, 576, 215, 10, 5, 1, 0]
    assert [stage["rows"] for stage in found["stages"]] == [64, 640, 279, 74, 69, 65, 64]
    assert found["total"]["vision_token_layers"] == 2048
    assert found["total"]["mean_vision_tokens"] == 64
    layers = sum(stage["flops"] for stage in found["stages"])
    assert found["total"]["flops"] == layers + found["total"]["lm_head_flops"]
    assert found["ideal_speedup"] == found["total"]["dense_flops"] / found["total"]["flops"]
    assert found["ideal_speedup_with_encoder"] < found["ideal_speedup"]


FIXED = '{"filter_layer": 14, "keep": 10, "exit_layer": 23}'
"""VisiPruner's cut and exit where its paper's figure has them: 14.9 full layers, 10.3 tokens, exit at layer 23.9."""
PAPERS = {
    "HiDrop, table 2": (("hidrop", "--preset", "tok64"), "0.42"),
    "PyramidDrop": (("pyramiddrop",), "1.78"),
    "VisiPruner, table 5": (("visipruner", "--options", FIXED), "1.76"),
    "dense": (("none",), "3.82"),
}
# (layers, vision tokens, whether vision attends to vision there), as the papers have them.
LAYERS = {
    "HiDrop, table 2": [(8, 0, 1), (2, 576, 1), (4, 215, 1), (2, 10, 1), (2, 5, 1), (6, 1, 1), (8, 0, 1)],
    "PyramidDrop": [(8, 576, 1), (8, 288, 1), (8, 144, 1), (8, 72, 1)],
    "VisiPruner, table 5": [(15, 576, 0), (8, 10, 1), (9, 0, 1)],
    "dense": [(32, 576, 1)],
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_own_flops_can_be_read_off(name: str) -> None:
    arguments, printed = PAPERS[name]
    text = " ".join(invoke("plan", "7b", "--text", "74", "--method", *arguments).split())
    assert f"By the papers' formula for vision alone: {printed} of 3.82 TFLOPs" in text
    assert "sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m; n vision tokens, d 4096, m 11008" in text
    paper = plan_json("7b", "--text", "74", "--method", *arguments)["paper"]
    assert paper["dense_flops"] == 32 * 576 * (4 * 4096 * 4096 + 2 * 576 * 4096 + 3 * 4096 * 11008)
    assert f"{paper['flops'] / 1e12:.2f}" == printed
    # Every matrix product on its own: Q, K, V, output; scores and values; gate, up, down.
    products = sum(
        layers * (4 * tokens * 4096 * 4096 + attends * 2 * tokens * tokens * 4096 + 3 * tokens * 4096 * 11008)
        for layers, tokens, attends in LAYERS[name]
    )
    assert sum(layers for layers, *_ in LAYERS[name]) == 32
    assert paper["flops"] == products


def test_visipruners_layers_are_data_until_they_are_fixed() -> None:
    text = " ".join(invoke("plan", "7b", "--method", "visipruner").split())
    assert f"VisiPruner's own figures are for fixed layers: --options '{FIXED}'" in text
    assert "upper bounds" in text
    assert plan_json("7b", "--method", "visipruner")["paper"]["quiet_layers"] == 0
    fixed = " ".join(invoke("plan", "7b", "--method", "visipruner", "--options", FIXED).split())
    assert "2 n^2 d not in the first 15 layers, as VisiPruner's appendix M" in fixed
    assert "VisiPruner's own figures" not in fixed


def test_a_small_models_paper_flops_are_not_rounded_to_nothing() -> None:
    assert "0.25 of 2.49 GFLOPs" in invoke("plan", "embedded")


def test_every_image_keeps_its_own_share() -> None:
    found = plan_json("13b", "--method", "fastv", "--images", "576", "--images", "301", "--options", '{"keep": 0.5}')
    assert [stage["vision_tokens"] for stage in found["stages"]] == [877, 288 + 150]
    assert found["total"]["encoder_flops"] == 2 * plan_json("13b")["total"]["encoder_flops"]


def test_a_checkpoint_is_planned_with_its_own_method_and_image_size(checkpoint: Path) -> None:
    found = plan_json(str(checkpoint))
    assert (found["method"], found["preset"], found["images"]) == ("hidrop", "embedded", [576])
    assert [stage["vision_tokens"] for stage in found["stages"]] == [0, 576, 96, 24, 0]
    # Two K/V heads of 32: half the bytes of the four query heads.
    assert found["stages"][0]["dense_kv_bytes"] == 2 * 20 * 32 * (2 * 2 * 32 * 2)


def test_a_checkpoints_preset_is_changed_by_force_only(checkpoint: Path) -> None:
    arguments = ("plan", str(checkpoint), "--method", "hidrop", "--preset", "tok48", "--options", '{"scale": true}')
    refused = CliRunner().invoke(app, list(arguments))
    assert refused.exit_code == 2
    assert "trained for hidrop preset 'embedded'" in refused.stderr
    assert '--force (in a configuration, "force": true)' in refused.stderr
    assert "hidrop tok48" in invoke(*arguments, "--force")


def test_a_siglip_tower_is_costed_too(checkpoint: Path) -> None:
    vision = CONFIG["vision_config"] | {"model_type": "siglip_vision_model"}
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"vision_config": vision}))
    assert plan_json(str(checkpoint), "--method", "none")["total"]["encoder_flops"] > 0


CANNOT_RUN = {
    "a text model": CONFIG["text_config"] | {"architectures": ["LlamaForCausalLM"]},
    "another family": CONFIG | {"architectures": ["VipLlavaForConditionalGeneration"], "model_type": "vipllava"},
    "another tower": CONFIG | {"vision_config": CONFIG["vision_config"] | {"model_type": "pixtral"}},
    "another text model": CONFIG | {"text_config": CONFIG["text_config"] | {"model_type": "gemma"}},
    "a schedule it was not trained for": CONFIG | {"hidrop": {"method": "none", "positions": "grouped"}},
}
CAPACITY = ("--tflops", "1", "--bandwidth", "100", "--kv-gib", "20")


@pytest.mark.parametrize("name", CANNOT_RUN)
def test_plan_and_capacity_refuse_in_the_words_of_serve(tmp_path: Path, name: str) -> None:
    from hidrop_server.control.arguments import apply_choice, parse
    from hidrop_server.errors import StartError

    (tmp_path / "config.json").write_text(json.dumps(CANNOT_RUN[name]), encoding="utf-8")
    choice = {"positions": "persistent"}
    with pytest.raises(StartError) as refused:
        apply_choice(parse(str(tmp_path), []), HidropConfig.parse(choice))
    for command in (("plan", str(tmp_path)), ("capacity", str(tmp_path), *CAPACITY)):
        result = CliRunner().invoke(app, [*command, "--hidrop-config", json.dumps(choice)])
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"hidrop: {refused.value}\n")


CANNOT_CHOOSE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a tower without a class token": (
        {"vision_config": CONFIG["vision_config"] | {"model_type": "siglip_vision_model"}},
        {"method": "mustdrop", "options": {"scale": True, "key_rate": 0.1}},
        "method 'mustdrop': it needs a vision tower whose class token ranks the patches, as CLIP's does; leave out "
        "key_rate",
    ),
    "RoPE that depends on the length": (
        {"text_config": CONFIG["text_config"] | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}},
        {"method": "fastv", "positions": "compacted"},
        "compacted positions need plain RoPE in every layer, this text model has rope type 'dynamic'",
    ),
}


@pytest.mark.parametrize("name", CANNOT_CHOOSE)
def test_plan_and_capacity_refuse_what_the_engine_would(tmp_path: Path, name: str) -> None:
    changed, choice, reason = CANNOT_CHOOSE[name]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changed), encoding="utf-8")
    for command in (("plan", str(tmp_path)), ("capacity", str(tmp_path), *CAPACITY)):
        result = CliRunner().invoke(app, [*command, "--hidrop-config", json.dumps(choice)])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"hidrop: {reason}")


class _Hub(BaseHTTPRequestHandler):
    """Has one file, the configuration of a text model, of whatever name it is asked for."""

    def do_GET(self) -> None:
        found = self.path == "/some/model/resolve/main/config.json"
        text = json.dumps(CANNOT_RUN["a text model"]).encode() if found else b""
        self.send_response(200 if found else 404)
        for header in (("ETag", '"1"'), ("X-Repo-Commit", "1" * 40), ("Content-Length", str(len(text)))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(text if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def plan_with_hub(address: str, model: str, cache: Path) -> str:
    """What is refused where the hub is at another address."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return the_line(run("plan", model, env=environment | {"HF_ENDPOINT": address, "HF_HOME": str(cache)}))


def test_a_model_of_the_hub_is_refused_in_the_same_words(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        line = plan_with_hub(f"http://127.0.0.1:{hub.server_address[1]}", "some/model", tmp_path)
        hub.shutdown()
    assert "LlamaForCausalLM is not a family that can run staged; supported: LLaVA-1.5, " in line


def test_without_a_hub_a_name_is_refused_at_once_with_the_names_that_need_none(tmp_path: Path) -> None:
    started = time.monotonic()
    line = plan_with_hub("http://127.0.0.1:9", "70b", tmp_path)
    assert time.monotonic() - started < 15, "downloads try for more than 20 seconds"
    assert "the hub cannot be reached (" in line
    assert "known without the hub: embedded, 7b, 13b; did you mean '7b'?" in line


def test_a_method_for_trained_checkpoints_is_warned_of_on_others(checkpoint: Path) -> None:
    def warning(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["plan", *arguments])
        assert result.exit_code == 0, result.stderr
        return result.stderr

    assert warning(str(checkpoint)) == warning("7b") == warning("7b", "--method", "fastv") == ""
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    for model in (("7b",), (str(checkpoint), "--preset", "embedded")):
        assert "hidrop: warning: method 'hidrop' is for checkpoints trained with it" in warning(
            *model, "--method", "hidrop"
        )


def test_shapes_are_read_as_llava_runs_them() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(num_key_value_heads=8))
    text = text_shape(config.get_text_config())
    assert text == TextShape(32, 4096, 11008, 32, 8, 128, 32000)
    assert Llava().vision_shape(config) == LLAVA_7B_VISION


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7b", "--method", "hidrp"], "unknown pruning method 'hidrp'; known: none, hidrop, "),
        (["7b", "--method", "hidrop", "--preset", "tok1"], "no preset 'tok1'; known: tok48, "),
        (["7b", "--method", "fastv", "--options", "{layer: 2}"], "--options is not JSON: "),
        (["7b", "--method", "fastv", "--options", "[2]"], "--options must be a JSON object, got [2]"),
        (["7b", "--method", "fastv", "--options", '{"layr": 2}'], "no option 'layr'; known: layer, "),
        (["13b", "--method", "hidrop"], "for 32 layers, the model has 40"),
        (["/no/such/model"], "no such model directory: /no/such/model"),
        (["no-such/model"], "cannot read the shape of model 'no-such/model': "),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_directory_without_a_configuration_is_a_mistake_too(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("option", [["--images", "0"], ["--text", "0"], ["--block-size", "0"]])
def test_sizes_below_one_are_refused(option: list[str]) -> None:
    assert CliRunner().invoke(app, ["plan", "7b", *option]).exit_code == 2


def test_decided_counts_of_several_images_cost_every_images_tower() -> None:
    shape = ModelShape(32, 576)
    resolved = resolve(HidropConfig.parse({"method": "visipruner"}), shape)
    stages = len(resolved.schedule.stages)
    one, three = (
        request_costs(
            SHAPES["7b"],
            resolved,
            Workload((image(576),) * images, 64, 32),
            [images * 576] * (stages - 1) + [images * 5 - 1],
        )
        for images in (1, 3)
    )
    assert one.encoder_flops == LLAVA_7B_VISION.flops([576])
    assert three.encoder_flops == 3 * LLAVA_7B_VISION.flops([576])
    assert three.stages[-1].vision_tokens == 14
