"""``python -m scripts.vllm_names`` writes docs/vllm-names.md: every name of vLLM that we import, override or rely on.

With ``--vllm FOLDER``, where another version's ``vllm`` lies unpacked, it writes nothing and prints what that version
has otherwise, and which of our overrides no longer take its arguments; both are read, neither is imported.
"""

import argparse
import ast
import builtins
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.sources import FUNCTIONS, Definition, Function, Module, Sources, describe, members
from vllm_hidrop.engine.compat import installed_vllm_version

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "vllm-names.md"
OURS = {
    "vllm_hidrop": ROOT / "vllm_hidrop",
    "hidrop_server": ROOT / "server",
    "hidrop_loadtests": ROOT / "loadtests",
}

MADE_AT_RUN_TIME = {
    "vllm_hidrop.runners.v1.StagedRunner": ("vllm.v1.worker.cpu_model_runner.CPUModelRunner",),
    "vllm_hidrop.runners.v2.StagedRunner": ("vllm.v1.worker.cpu.model_runner.CPUModelRunner",),
    "vllm_hidrop.runners.worker.StagedWorker": (
        "vllm.v1.worker.cpu_worker.CPUWorker",
        "vllm.v1.worker.gpu_worker.Worker",
    ),
}
"""By our class, vLLM's classes that it extends where the program runs, which its source does not name."""

MOVED = {
    "vllm.entrypoints.launchers.cli_args": "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.serve.utils.api_utils": "vllm.entrypoints.common.startup",
    "vllm.renderers.chat_utils": "vllm.renderers.chat_utils.chat_message",
    "vllm.v1.core.kv_cache_utils": "vllm.v1.core.kv_cache_planning",
}
"""By module of vLLM, where a newer version that we accept has names of it; our code imports from either."""

TOUCHED = {
    "vllm.config.VllmConfig": "additional_config cache_config compilation_config model_config parallel_config "
    "scheduler_config use_v2_model_runner",
    "vllm.forward_context.ForwardContext": "attn_metadata slot_mapping",
    "vllm.model_executor.layers.attention.Attention": "head_size impl kv_cache layer_name num_heads num_kv_heads",
    "vllm.model_executor.layers.attention.MMEncoderAttention": "_forward_method head_size num_heads num_kv_heads scale",
    "vllm.model_executor.layers.layernorm.RMSNorm": "has_weight variance_epsilon variance_size_override weight",
    "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding": "cos_sin_cache is_neox_style rotary_dim",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl": "do_kv_cache_update forward scale",
    "vllm.v1.core.block_pool.BlockPool": "_insert_block_hash blocks enable_caching free_block_queue free_blocks "
    "get_num_free_blocks null_block num_gpu_blocks",
    "vllm.v1.core.encoder_cache_manager.EncoderCacheManager": "cache_size cached free freeable num_embeds_by_hash "
    "num_free_slots num_freeable_slots request_cached_ids",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": "block_pool enable_caching truncate_computed_blocks",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue": "fake_free_list_head fake_free_list_tail",
    "vllm.v1.core.kv_cache_utils.KVCacheBlock": "block_hash block_id is_null next_free_block prev_free_block ref_cnt",
    "vllm.v1.core.sched.output.NewRequestData": "mm_features num_computed_tokens req_id",
    "vllm.v1.core.sched.output.SchedulerOutput": "finished_req_ids num_scheduled_tokens preempted_req_ids "
    "scheduled_encoder_inputs scheduled_new_reqs",
    "vllm.v1.core.sched.scheduler.Scheduler": "deferred_frees running",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": "kv_cache_group_id",
    "vllm.v1.engine.core.EngineCore": "scheduler",
    "vllm.v1.engine.core_client.AsyncMPClient": "call_utility_all_async",
    "vllm.v1.request.Request": "_block_hasher block_hashes mm_features num_computed_tokens num_prompt_tokens "
    "sampling_params skip_reading_prefix_cache structured_output_request",
    "vllm.v1.worker.block_table.BlockTable": "block_size block_table get_device_tensor num_blocks_per_row pin_memory "
    "slot_mapping_mode",
    "vllm.v1.worker.block_table.MultiGroupBlockTable": "block_tables",
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": "block_ids mm_features",
    "vllm.v1.worker.gpu_input_batch.InputBatch": "block_table generators num_computed_tokens_cpu "
    "num_computed_tokens_cpu_tensor num_prompt_tokens_cpu_tensor req_id_to_index req_ids",
    "vllm.v1.worker.utils.AttentionGroup": "build_metadata",
}
"""By class, members that we use of objects that reach us as arguments or attributes, without an import of the class."""

BODIES = {
    "vllm.entrypoints.launchers.api_server.app_state.init_app_state": "server.app changes the handlers it makes",
    "vllm.entrypoints.launchers.api_server.entry.build_and_serve": "server.app.uvicorn_options copies its arguments",
    "vllm.entrypoints.launchers.app.build_app": "server.app undoes its middlewares and authentication",
    "vllm.entrypoints.cli.serve.run_multi_api_server": "server.processes follows its order",
    "vllm.model_executor.models.clip.CLIPEncoder.forward": "staged.encoder_selection runs its layers one by one",
    "vllm.model_executor.models.clip.CLIPVisionTransformer.forward": "staged.encoder_selection runs its parts",
    "vllm.model_executor.models.llama.LlamaDecoderLayer.forward": "staged.loop runs its parts",
    "vllm.model_executor.models.llama.LlamaModel.forward": "staged.loop runs its layers",
    "vllm.model_executor.models.qwen2.Qwen2DecoderLayer.forward": "staged.loop runs its parts",
    "vllm.v1.core.kv_cache_utils._get_kv_cache_groups_uniform_page_size": "plan.costs counts groups as it does",
    "vllm.v1.engine.async_llm.AsyncLLM.__init__": "server.engine replaces the processors it makes",
    "vllm.v1.worker.cpu_worker.CPUWorker.init_device": "runners.worker changes the runner it makes",
    "vllm.v1.worker.gpu_worker.Worker.init_device": "runners.worker changes the runner it makes",
}
"""Functions whose code, not only whose signature, ours copies or relies on, and how; besides those it overrides."""

MODULE = re.compile(r"vllm(\.\w+){2,}")  # in a string: one that is started by its name
NAME = re.compile(r"^vllm\.[\w.]+", re.MULTILINE)  # imported or used, on the page

HEAD = """# The names of vLLM

Generated from the sources of vLLM {version} and of `vllm_hidrop/`, `server/` and `loadtests/` by
`python -m scripts.vllm_names`; a test compares. How the page is used: CONTRIBUTING.md, "Taking on a new vLLM".
Not in it: members of objects that reach ours as arguments, unless `TOUCHED` in the script names them."""
OVERRIDDEN = (
    "Below each class of ours, the members of vLLM's classes that it overrides; in front of a method, eight digits "
    "that change with its source."
)
RELIED_ON = "Functions that ours copies, or whose order or parts it relies on, with the digits of their source."
IMPORTED = "Where a class is called, with the arguments of its constructor."
USED = "Members of what is imported or extended."


@dataclass
class Names:
    """What the page shows, by section; what the version lacks, and which of its arguments our overrides refuse."""

    imported: dict[str, bool] = field(default_factory=dict)  # by dotted name, whether it is called
    lines_of_imports: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    overridden: dict[str, set[str]] = field(default_factory=dict)
    relied_on: list[str] = field(default_factory=list)
    lacking: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)


def names_of(sources: Sources) -> Names:
    """Read our packages and the vLLM among ``sources``."""
    found = Names()
    for package in OURS:
        for module in sources.modules(package):
            _read_imports(sources, module, found)
            for node in ast.walk(module.tree):
                if isinstance(node, ast.ClassDef):
                    _read_class(sources, Definition(module.name, node.name, node), found)
    for dotted, touched in TOUCHED.items():
        found.used |= {_line(sources, f"{dotted}.{name}", found) for name in touched.split()}
    found.lines_of_imports = sorted(
        _line(sources, dotted, found, is_called=called) for dotted, called in found.imported.items()
    )
    for dotted, why in BODIES.items():
        definition = _find(sources, dotted)
        if definition is None:
            found.lacking.add(f"{dotted}: {why}")
        else:
            found.relied_on.append(f"{sources.digest(definition)} {dotted}: {why}")
    return found


def _find(sources: Sources, dotted: str) -> Definition | None:
    """What a name stands for, or the same name in the module that it has moved to."""
    module, _, name = dotted.rpartition(".")
    found = sources.find(dotted)
    return sources.find(f"{MOVED[module]}.{name}") if found is None and module in MOVED else found


def _line(sources: Sources, dotted: str, names: Names, *, is_called: bool = False) -> str:
    """``dotted``, what it is, and where it is defined if elsewhere."""
    found = _find(sources, dotted)
    if found is None:
        names.lacking.add(dotted)
        return f"{dotted} is not there"
    elsewhere = f", from {found.dotted}" if found.dotted != dotted else ""
    about = (
        f"class{sources.constructor(found)}" if is_called and isinstance(found.node, ast.ClassDef) else describe(found)
    )
    return f"{dotted} {about}{elsewhere}"


def _read_imports(sources: Sources, module: Module, names: Names) -> None:
    """A file's imports from vLLM, modules that it starts by name, and the members that it uses of what it imports."""
    imported = {name: bound for name, bound in module.bindings.items() if isinstance(bound, str)}
    imported = {name: bound for name, bound in imported.items() if bound.split(".")[0] == "vllm"}
    calls = (node.func for node in ast.walk(module.tree) if isinstance(node, ast.Call))
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    for name, dotted in imported.items():
        names.imported[dotted] = names.imported.get(dotted, False) or name in called
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            of = sources.find(imported[node.value.id])
            if of is not None and (of.node is None or sources.class_of(of) is not None):
                names.used.add(_line(sources, f"{imported[node.value.id]}.{node.attr}", names))
        elif isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)):
            names.imported.setdefault(str(node.value), False)


def _read_class(sources: Sources, cls: Definition, names: Names) -> None:
    """What a class of ours overrides of vLLM's classes, and what it uses of them through ``self``."""
    line = _line_of_descent(sources, cls)
    ours = [each for each in line if each.module.split(".")[0] in OURS]
    theirs = [each for each in line if each not in ours]
    if not theirs:
        return
    for each in ours:
        for name, node in members(each.node).items():
            for definition in _defined_in(theirs, name):
                _read_override(sources, each, (name, node), definition, names)
    own = {name for each in ours for name in members(each.node)}
    for name in sorted(_asked_of_self(ours) - own):
        known_to = next((each for each in theirs if sources.member(each, name) is not None), None)
        if known_to is not None:
            names.used.add(_line(sources, f"{known_to.dotted}.{name}", names))


def _line_of_descent(sources: Sources, cls: Definition) -> list[Definition]:
    """The class, and its bases of ours and vLLM's; ValueError for a base that the source does not name."""
    assert isinstance(cls.node, ast.ClassDef)
    made = [sources.find(dotted) for dotted in MADE_AT_RUN_TIME.get(cls.dotted, ())]
    line = list(sources.line_of_descent(cls))
    for base in filter(None, made):
        line += [each for each in sources.line_of_descent(base) if each not in line]
    module = sources.module(cls.module)
    assert module is not None
    known = module.bindings.keys() | vars(builtins).keys()
    unknown = [base.id for base in cls.node.bases if isinstance(base, ast.Name) and base.id not in known]
    if unknown and not made:
        raise ValueError(f"{cls.dotted} extends {unknown[0]}, an argument: name its classes in MADE_AT_RUN_TIME")
    return line


def _defined_in(classes: Iterable[Definition], name: str) -> list[Definition]:
    """Where vLLM defines a member that several of its classes may define: those that ``super()`` reaches one by one."""
    own = [(cls, members(cls.node)[name]) for cls in classes if name in members(cls.node)]
    found = [Definition(cls.module, f"{cls.name}.{name}", node) for cls, node in own]
    return [each for each in found if "@abstractmethod" not in describe(each)] or found


def _asked_of_self(classes: Iterable[Definition]) -> set[str]:
    """The attributes of ``self`` and ``super()`` in our classes."""
    nodes = (node for cls in classes if cls.node is not None for node in ast.walk(cls.node))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }


def _read_override(
    sources: Sources, ours: Definition, own: tuple[str, ast.AST], theirs: Definition, names: Names
) -> None:
    name, node = own
    if name in ("__module__", "__doc__"):
        return
    is_function = isinstance(theirs.node, FUNCTIONS)
    digest = f"{sources.digest(theirs)} " if is_function else ""
    line = f"{digest}{theirs.dotted} {describe(theirs)}"
    names.overridden.setdefault(ours.dotted, set()).add(line)
    if name != "__init__" and isinstance(node, FUNCTIONS) and isinstance(theirs.node, FUNCTIONS):
        for missing in refused_arguments(node, theirs.node):
            names.refused.add(f"{ours.dotted}.{name} takes no {missing}, {theirs.dotted} does")


def refused_arguments(ours: Function, theirs: Function) -> Iterator[str]:
    """The arguments that a method takes and our override does not."""
    mine, named = ours.args, {arg.arg for arg in (*ours.args.args, *ours.args.kwonlyargs)}
    places = [*theirs.args.posonlyargs, *theirs.args.args]
    if mine.vararg is None:
        own_places = [*mine.posonlyargs, *mine.args]
        yield from (arg.arg for arg in places[len(own_places) :] if arg.arg not in named)
    if mine.kwarg is None:
        yield from (arg.arg for arg in theirs.args.kwonlyargs if arg.arg not in named)


def _name_in(line: str) -> str:
    """A line of the page from its name on, without digits in front."""
    return re.sub(r"^[0-9a-f]{8} ", "", line)


def page(names: Names) -> str:
    """The whole of docs/vllm-names.md."""
    overridden = "\n\n".join(
        "\n".join([ours, *(f"  {line}" for line in sorted(lines, key=_name_in))])
        for ours, lines in sorted(names.overridden.items())
    )
    sections = {
        "Overridden": (OVERRIDDEN, overridden),
        "Relied on": (RELIED_ON, "\n".join(names.relied_on)),
        "Imported": (IMPORTED, "\n".join(names.lines_of_imports)),
        "Used": (USED, "\n".join(sorted(names.used))),
    }
    parts = [HEAD.format(version=installed_vllm_version())]
    parts += [f"## {title}\n\n{about}\n\n```text\n{text}\n```" for title, (about, text) in sections.items()]
    return "\n\n".join(parts) + "\n"


def installed_vllm() -> Path:
    """The folder of the installed vLLM, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("vLLM is not installed")
    return Path(spec.origin).parent


def sources_with(vllm: Path) -> Sources:
    """Our packages and the vLLM in a folder."""
    return Sources({"vllm": vllm, **OURS}, deep=OURS)


def difference(old: str, new: str, names: tuple[str, str]) -> str:
    """The lines in which two pages differ, below the class of ours that they belong to; empty where they are equal."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *names, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith("@@"))


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or compare another vLLM with it; returns 1 where that vLLM lacks what we need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="unpacked vllm package of another version")
    folder = parser.parse_args(arguments).vllm
    if folder is None:
        PAGE.write_text(page(names_of(sources_with(installed_vllm()))), encoding="utf-8")
        return 0
    found = names_of(sources_with(folder))
    before, now = PAGE.read_text(encoding="utf-8"), page(found)
    print(difference(before, now, (PAGE.name, str(folder))))
    gone = set(NAME.findall(before)).difference(NAME.findall(now))
    faults = [*(f"not there: {name}" for name in sorted(found.lacking | gone)), *sorted(found.refused)]
    print("\n".join(faults) or "every name is there, and every override takes vLLM's arguments", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
