"""The closing block of a run: its facts, its commands, and its width."""

import shlex

import pytest
from helpers.experts import make_experts
from helpers.models import make_lora, make_small_llama
from helpers.plans import list_modules, make_plan
from peft import LoraConfig
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import list_pictures, plan_path
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.reports.closing import WIDTH, describe_plan, describe_run
from axolotl_layersel.reports.outcome import cut_list, describe_parameters, join_layers, read_outcome
from axolotl_layersel.reports.savings import describe_savings
from axolotl_layersel.selection.plan import Parameters, Plan
from axolotl_layersel.selection.plan_file import write_plan

TARGETS = ["q_proj", "v_proj", "down_proj"]
MOST_LINES = 15


def save_adapter(folder, layers: int = 6, **settings) -> None:
    settings = {"task_type": "CAUSAL_LM", **settings}
    model = make_lora(make_small_llama(layers), TARGETS, **settings)
    model.peft_config["default"].base_model_name_or_path = "org/Base-1B"
    model.save_pretrained(str(folder))


def save_run(folder, selected=(1, 3), **values) -> Plan:
    """Save a run that keeps some of six layers, and return its plan."""
    modules = [f"model.layers.{layer}.{part}" for layer in selected for part in ("self_attn.q_proj", "mlp.down_proj")]
    values = {"modules": modules, "parameters": Parameters(plain=2_440_000, trained=1_220_000), **values}
    plan = make_plan([0.1 * layer for layer in range(6)], selected, **values)
    write_plan(plan, plan_path(folder))
    save_adapter(folder, layers_to_transform=list(selected))
    return plan


def join_commands(lines: list[str]) -> list[str]:
    """Return the commands of a block, each on one line."""
    text = "\n".join(lines).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines()]


def find_command(lines: list[str], label: str) -> list[str]:
    (line,) = [line for line in join_commands(lines) if line.startswith(label)]
    return shlex.split(line.removeprefix(label))


def test_a_run_with_one_rank_says_what_it_did_where_it_is_and_what_to_do_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = save_run("outputs/run", backward_end=1)
    lines = describe_run("outputs/run", "run.yml")
    text = " ".join(" ".join(lines).split())
    head = "layersel: method cka keeps 2 of 6 layers (1, 3); the others are without an adapter; rank 4 in every module"
    assert text.startswith(f"{head} parameters 1.22 of plain LoRA's 2.44 million parameters train")
    assert describe_savings(plan) in text
    assert "files outputs/run: the adapter, layersel/plan.json" in text
    assert "readers PEFT, vLLM and llama.cpp read the adapter as it is. TGI and LoRAX leave out all of it" in text
    assert find_command(lines, "show") == ["axolotl-layersel", "show", "outputs/run"]
    assert find_command(lines, "merge") == ["axolotl", "merge-lora", "run.yml", "--lora-model-dir", "outputs/run"]
    serve = "vllm serve org/Base-1B --enable-lora --max-lora-rank 8 --lora-modules run=outputs/run"
    assert find_command(lines, "serve") == serve.split()
    assert find_command(lines, "export") == ["axolotl-layersel", "export", "outputs/run", "--for", "tgi"]
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= WIDTH
    result = CliRunner().invoke(app, find_command(lines, "show")[1:])
    assert result.exit_code == 0 and "2 of 6 layers" in result.output


def test_moved_ranks_are_those_of_the_file_and_the_export_that_is_offered_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter("run", rank_pattern={"q_proj": 2, "v_proj": 5}, alpha_pattern={"q_proj": 2, "v_proj": 5})
    names = [
        f"model.layers.{layer}.{part}"
        for layer in range(6)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    final = {name: {"q": 2, "v": 5, "d": 4}[name.rpartition(".")[2][0]] for name in names}
    RankHistory({0: dict.fromkeys(names, 3), 4: final}).write("run")
    lines = describe_run("run")
    assert lines[0] == "layersel: rank moved between 18 LoRA modules: ranks from 2 to 5 after l1ra"
    # q 32 -> 32, v 32 -> 16, down 48 -> 32, in six layers.
    plain, trained = 6 * 3 * (64 + 48 + 80), 6 * (2 * 64 + 5 * 48 + 4 * 80)
    assert read_outcome(tmp_path / "run").parameters == Parameters(plain=plain, trained=trained)
    text = " ".join(" ".join(lines).split())
    assert f"{trained:,} LoRA parameters train, and plain LoRA has {plain:,}" in text
    assert "PEFT and vLLM 0.32 or later read the adapter as it is. llama.cpp and TensorRT-LLM would scale it" in text
    assert "layersel/ranks.csv" in text and "CONFIG.yml" in text and "backward" not in text
    export = find_command(lines, "export")
    assert CliRunner().invoke(app, export[1:]).exit_code == 0
    assert read_outcome(tmp_path / "llama.cpp-run").readers.right == ["PEFT", "vLLM 0.32 or later", "llama.cpp"]


def test_frozen_modules_do_not_count(tmp_path):
    modules = [f"model.layers.4.{part}" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    write_plan(freeze(make_plan([0.1] * 6, (4,), modules=modules)), plan_path(tmp_path))
    save_adapter(tmp_path, rank_pattern={r"layers\.4\.mlp\.down_proj": 7})
    outcome = read_outcome(tmp_path)
    assert outcome.trained == set(modules) and list(outcome.ranks) == modules
    text = " ".join(" ".join(describe_run(tmp_path)).split())
    assert text.startswith("layersel: method cka keeps 1 of 6 layers (4); the others are frozen; ranks from 4 to 7")


def freeze(plan: Plan) -> Plan:
    plan.unselected = plan.settings["unselected"] = "freeze"
    return plan


def test_pictures_are_named_or_counted(tmp_path):
    save_run(tmp_path)
    first, second, third, fourth, *_ = list_pictures(tmp_path)
    for path in (first, second, third):
        path.touch()
    (tmp_path / "layersel" / "of-a-user.png").touch()
    names = ", ".join(f"layersel/{path.name}" for path in (first, second, third))
    assert names in " ".join(" ".join(describe_run(tmp_path)).split())
    fourth.touch()
    assert "4 pictures in layersel" in " ".join(" ".join(describe_run(tmp_path)).split())


@pytest.mark.parametrize("layers", [6, 126])
def test_the_block_of_a_large_run_in_a_deep_folder_stays_short(tmp_path, monkeypatch, layers):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ("a folder of" + "/deeper" * 3) / "run"
    selected = tuple(range(0, layers, 2))
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in selected]
    plan = make_plan([0.5] * layers, selected, modules=modules, parameters=Parameters(plain=3, trained=2))
    write_plan(plan, plan_path(folder))
    save_adapter(folder, rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM")
    lines = describe_run(folder.relative_to(tmp_path), "configs/run of mine.yml")
    assert len(lines) <= MOST_LINES + 1 and max(map(len, lines)) <= WIDTH
    assert find_command(lines, "merge")[2] == "configs/run of mine.yml"
    place = str(folder.relative_to(tmp_path))
    assert find_command(lines, "show")[2] == place
    assert find_command(lines, "serve")[-1] == f"run={place}"


def test_lora_on_experts_is_merged_by_the_method_that_knows_it_and_not_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run("run")
    config = LoraConfig.from_pretrained("run")
    config.target_parameters = ["mlp.experts.gate_up_proj"]
    config.save_pretrained("run")
    lines = describe_run("run")
    assert find_command(lines, "merge")[-2:] == ["--merge-method", "legacy"]
    text = " ".join(" ".join(lines).split())
    assert "readers PEFT reads the adapter as it is." in text
    assert "vllm" not in text and "export" not in text


def test_rank_that_has_moved_next_to_experts_is_told_and_counted(tmp_path):
    final = {
        f"model.layers.{layer}.self_attn.{kind}": rank
        for layer in range(3)
        for kind, rank in (("q_proj", 3), ("v_proj", 1))
    }
    make_experts("Mixtral", rank_pattern={"q_proj": 3, "v_proj": 1}).save_pretrained(str(tmp_path))
    RankHistory({0: dict.fromkeys(final, 2), 4: final}).write(tmp_path)
    outcome = read_outcome(tmp_path)
    assert outcome.ranks == final
    experts = sum(size for name, size in outcome.file.sizes.items() if "experts" in name)
    # q 32 -> 32, v 32 -> 16, in three layers.
    plain, trained = 3 * 2 * (64 + 48), 3 * (3 * 64 + 48)
    assert experts and outcome.parameters == Parameters(plain=experts + plain, trained=experts + trained)
    assert describe_run(tmp_path)[0] == "layersel: rank moved between 6 LoRA modules: ranks from 1 to 3 after l1ra"


def test_a_choice_without_training_says_how_to_use_it(tmp_path):
    modules = list_modules(2)
    plan = make_plan(
        [0.5, 0.2],
        (0, 1),
        method="gradient",
        granularity="module",
        modules=modules[:7],
        module_scores=dict.fromkeys(modules, 0.5),
        ranks=dict(zip(modules[:7], (1, 2, 3, 4, 4, 4, 4))),
        parameters=Parameters(plain=4608, trained=2304),
    )
    lines = describe_plan(plan, tmp_path / "plan.json")
    head = "layersel: method gradient keeps 7 of 10 LoRA modules, in all 2 layers; the others are without an adapter"
    assert " ".join(" ".join(lines).split()).startswith(f"{head}; ranks from 1 to 4")
    assert "  parameters    2,304 of plain LoRA's 4,608 parameters train" in lines
    assert f"use it layersel.selection.plan: {tmp_path / 'plan.json'}" in " ".join(" ".join(lines).split())
    assert find_command(lines, "show")[1:] == ["show", str(tmp_path / "plan.json")]


def test_a_run_without_its_files_is_an_error(tmp_path):
    with pytest.raises(LayerselError, match=r"adapter_config\.json cannot be read"):
        describe_run(tmp_path)


def test_numbers_and_layers_are_short():
    def describe(trained: int, plain: int) -> str:
        return describe_parameters(Parameters(plain=plain, trained=trained))

    assert describe(9, 10) == "9 of plain LoRA's 10 parameters train"
    assert describe(999, 1_000_000) == "0.00 of plain LoRA's 1.00 million parameters train"
    assert describe(2_440_000, 2_440_001) == "2.44 million LoRA parameters train, as many as plain LoRA has"
    assert join_layers([0, 1, 3, 4, 5, 7]) == "0, 1, 3-5, 7"
    assert join_layers(["encoder.0", "encoder.1", "encoder.2", "decoder.3"]) == "encoder.0-2, decoder.3"
    long = cut_list(join_layers(list(range(0, 200, 2))))
    assert len(long) <= 45 and long.endswith(", ...")
