"""`hidrop calibrate` on tiny checkpoints of the families: numbers recomputed naively, proposals that a server takes."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner, Result

from vllm_hidrop.cli.app import app
from vllm_hidrop.config import HidropConfig, Resolved, resolve
from vllm_hidrop.engine.model_checks import fitted_to_model
from vllm_hidrop.lab.calibrate.checkpoint import Checkpoint
from vllm_hidrop.lab.calibrate.contributions import Readings, read
from vllm_hidrop.lab.calibrate.curves import Settings, measure
from vllm_hidrop.lab.calibrate.samples import Sample, read_samples
from vllm_hidrop.models.families import family_of
from vllm_hidrop.plan.schedule import Keep

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM's processor

NAMES = ("qwen2_5_vl", "qwen3_vl", "internvl", "glm4v")
OTHERS = ("qwen2_vl", "qwen3_vl_moe", "llava_next", "llava_onevision", "mistral3", "glm4v_moe", "idefics3", "smolvlm")
KEEP = 5
NUM_LAYERS = 8
WORDS = "t5 t6 t7"


class Naive:
    """One eager pass over [prompt, answer] that shows weights [H, N, N] and values [K, N, D] of every layer.

    ``outputs`` replace what attention hands to its output projection; ``hidden`` are columns that a layer must not see.
    """

    def __init__(
        self,
        path: Path,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[int, Tensor] | None = None,
        hidden: Mapping[int, Tensor] | None = None,
    ) -> None:
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        llm = model.eval().get_decoder()
        self.values: list[Tensor] = []
        self.states: list[Tensor] = []
        for index, layer in enumerate(llm.layers):
            attention = layer.self_attn
            attention.v_proj.register_forward_hook(partial(self._keep_values, attention.head_dim))
            if index in (outputs or {}):
                attention.o_proj.register_forward_pre_hook(partial(self._replace, (outputs or {})[index]))
            if index in (hidden or {}):
                layer.register_forward_pre_hook(partial(self._hide, (hidden or {})[index]), with_kwargs=True)
            layer.register_forward_hook(self._keep_states)
        with torch.no_grad():
            output = model(**inputs, output_attentions=True, use_cache=False)
        self.weights = [weights[0] for weights in output.attentions]
        self.predicted = output.logits[0].argmax(-1)

    def _keep_values(self, head_size: int, _: Any, args: Any, output: Tensor) -> None:
        self.values.append(output[0].unflatten(-1, (-1, head_size)).transpose(0, 1))

    def _keep_states(self, _: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.states.append(output[0])

    @staticmethod
    def _replace(output: Tensor, _: Any, args: Any) -> tuple[Tensor]:
        return (output[None],)

    @staticmethod
    def _hide(columns: Tensor, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        num_rows = len(columns)
        open_cells = torch.ones(num_rows, num_rows, dtype=torch.bool).tril() & ~columns
        open_cells |= torch.eye(num_rows, dtype=torch.bool)
        mask = torch.zeros(1, 1, num_rows, num_rows).masked_fill(~open_cells, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    def parts(self, layer: int) -> Tensor:
        """What every column adds to every row's attention output, [rows, columns, H * D]."""
        values = self.values[layer].repeat_interleave(len(self.weights[layer]) // len(self.values[layer]), 0)
        return torch.einsum("hqk,hkd->qkhd", self.weights[layer], values).flatten(2)


class Case:
    """A checkpoint, one image and question, our encoding of them, and the naive dense pass."""

    def __init__(self, path: Path) -> None:
        drawn = next(read_samples("synthetic", None, 3))
        self.path = path
        self.sample = Sample(drawn.image.resize((96, 64)), WORDS, "t7 t8 t9")
        self.ours = Checkpoint(str(path))
        encoded = self.ours.encode(self.sample.image, self.sample.question, self.sample.answer, 8)
        self.inputs, self.rows = encoded.inputs, encoded.rows
        self.is_vision = torch.zeros(encoded.rows.num_rows, dtype=torch.bool)
        self.is_vision[encoded.rows.vision] = True
        self.dense = Naive(path, self.inputs)
        self.readings: Readings = read(self.ours, [self.sample], Keep(count=KEEP), 8)

    def unchanged(self, other: Naive) -> float:
        answer = slice(self.rows.num_prompt - 1, -1)
        return float((other.predicted[answer] == self.dense.predicted[answer]).float().mean())

    def norms(self, layer: int) -> Tensor:
        return self.dense.parts(layer)[self.rows.last_prompt][self.is_vision].norm(dim=1)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Case:
    return Case(checkpoint(request.param))


def test_contributions_are_the_last_rows_weights_times_values(case: Case) -> None:
    for layer, found in enumerate(case.readings.contributions[0]):
        parts = case.dense.parts(layer)[case.rows.last_prompt]
        whole = parts.sum(0)
        mine = parts[case.is_vision]
        torch.testing.assert_close(found.norm, mine.norm(dim=1), atol=1e-5, rtol=1e-4)
        expected = cosine_similarity(whole - mine, whole[None], dim=1)
        torch.testing.assert_close(found.cosine, expected, atol=1e-5, rtol=1e-4)


def test_hidrops_curves_are_those_of_the_naive_pass(case: Case) -> None:
    other = Sample(case.sample.image.rotate(180), WORDS, "t7")
    curves = measure(case.ours, [other, case.sample], Settings(windows=(1,), top_tokens=4, max_answer_tokens=8))
    alone = measure(case.ours, [case.sample, other], Settings(windows=(1,), top_tokens=4, max_answer_tokens=8))
    turned = case.ours.encode(other.image, WORDS, "", 0)
    there = Naive(case.path, turned.inputs)
    instruction = case.rows.instruction
    cross = [
        float(cosine_similarity(a[instruction], b[instruction], dim=-1).mean())
        for a, b in zip(case.dense.states, there.states, strict=True)
    ]
    assert curves.cross == pytest.approx(cross, abs=2e-5)
    assert alone.vision_intra == pytest.approx(curves.vision_intra, abs=1e-6)
    gone = [Naive(case.path, case.inputs, hidden=dict.fromkeys(range(x, NUM_LAYERS), case.is_vision)) for x in (2, 6)]
    assert [case.readings.agreement[x] for x in (2, 6)] == pytest.approx([case.unchanged(each) for each in gone])


def test_a_cut_keeps_what_adds_most(case: Case) -> None:
    num_unknown = max(case.ours.family.num_levels(case.ours.config) - 1, 0)
    assert [value is None for value in case.readings.cut] == [at < num_unknown for at in range(NUM_LAYERS - 1)]
    for deciding in (3, 5):
        dropped = case.is_vision.clone()
        best = case.norms(deciding).topk(KEEP).indices
        dropped[case.rows.vision[best]] = False
        cut = Naive(case.path, case.inputs, hidden=dict.fromkeys(range(deciding + 1, NUM_LAYERS), dropped))
        assert case.readings.cut[deciding] == pytest.approx(case.unchanged(cut))


def test_quiet_layers_edit_the_weights_behind_the_softmax(case: Case) -> None:
    vision, text, outputs = case.rows.vision, case.rows.prompt_text, dict[int, Tensor]()
    for layer in range(2):
        now = Naive(case.path, case.inputs, outputs)  # weights of this layer, with the earlier ones edited
        weights = now.weights[layer].clone()
        seen = weights[:, text][:, :, vision].sum(-1)
        weights[:, text[:, None], vision] = 0
        if layer == 0:
            weights[:, text, vision[0]] = seen
            weights[:, vision[:, None], vision] = 0
        now.weights[layer] = weights
        outputs[layer] = now.parts(layer).sum(1)
        assert case.readings.quiet[layer] == pytest.approx(case.unchanged(Naive(case.path, case.inputs, outputs)))


def calibrate(*arguments: str | Path) -> Result:
    quick = ("--samples", "2", "--data", "synthetic", "--answer-tokens", "2")
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments), *quick], env={"COLUMNS": "120"})


def started(path: Path, choice: Path) -> Resolved:
    """What a server checks at its start, without an engine."""
    config: Any = AutoConfig.from_pretrained(path)
    family = family_of(config.architectures[0])
    family.check(config)
    resolved = resolve(HidropConfig.checked(json.loads(choice.read_text())), family.shape(config))
    fitted_to_model(resolved, family, config)
    return resolved


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_the_proposals_start_a_server(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint(name)
    for number, method in enumerate((("hidrop",), ("visipruner",), ("visipruner", "--fixed-layers"))):
        file = tmp_path / f"{number}.json"
        result = calibrate(path, "--method", *method, "--json", file, "--budget", _budget(path, method[0]))
        assert result.exit_code == 0, result.output
        assert "Note: proposed by hidrop calibrate from 2 samples; not published" in result.stdout
        resolved = started(path, file)
        assert resolved.method.name == method[0]
        assert resolved.schedule.num_layers == NUM_LAYERS
        written = json.loads(file.read_text())
        assert "not published" in written["note"]
        counts = written["options"].get("keeps") or [written["options"].get("keep", "1/1")]
        assert all("/" in count for count in counts)
        assert (tmp_path / f"{number}.curves.json").is_file()


def _budget(path: Path, method: str) -> str:
    if method != "hidrop":
        return "0"
    refused = calibrate(path, "--budget", "0")
    assert "the least this schedule reaches is " in refused.stderr, refused.output
    return refused.stderr.rsplit(" ", 1)[1].strip()
