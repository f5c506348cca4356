"""Two nodes without a shared disk: whole runs of Axolotl on every engine, and the files needed to resume them."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.documents import find_section
from helpers.ending import CLOSING
from helpers.launched import MadeOnce, Run, difference
from helpers.nodes import INTERFACE, Node, make_nodes
from helpers.places import ENVIRONMENT, HANGS, at_night
from helpers.settings import BEST_IS_FIRST, l1ra, selection

ENGINES = ["ddp", "zero2", "zero3", "fsdp2-full", "fsdp2-sharded"]
# Updates after steps 2 and 4.
SETTINGS = {
    "layersel": {
        **selection("cka", ratio=0.5)["layersel"],
        **l1ra(update_ratio=1 / 3, last_update_ratio=0.8, move_ratio=0.3)["layersel"],
    },
    "max_steps": 6,
    **BEST_IS_FIRST,
    "save_total_limit": 10,
}
# The patterns in the table of files in docs/clusters.md.
ROWS = {
    "ddp": "DDP",
    "zero2": "ZeRO-1, ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2-full": "FSDP2, `FULL_STATE_DICT`",
    "fsdp2-sharded": "FSDP2, `SHARDED_STATE_DICT`",
}
MODEL_LOADS = "Loading weights"
SECONDS = 60  # a refused run takes 2, more on a busy machine; a process that waits for a dead one takes 1800
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
RECORDS = ("layersel/plan.json", "layersel/ranks.csv")
LACKS = re.compile(
    r"(?P<reader>process(?:es)? [^;]+?) on \S+ cannot read (?P<files>.+?), which process (?P<holder>\d+)"
)


@dataclass
class NodesRun:
    """A run on two nodes: both disks, exit codes, all logs and the time in seconds."""

    on: list[Run]
    codes: list[int]
    log: str
    seconds: float

    def read(self, name: str) -> list[bytes]:
        """Return the content of a file on each node."""
        return [(run.folder / name).read_bytes() for run in self.on]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with make_nodes(tmp_path_factory.mktemp("nodes")) as made:
        yield made


@pytest.fixture(scope="module")
def configure(nodes, make_config):
    """Return a function that writes a YAML file for each node, with the same output folder on their disks."""

    def write(engine: str, output: str, elsewhere: dict | None = None, **settings) -> list[Path]:
        root = nodes[0].root
        settings = {"dataset_prepared_path": str(root / "prepared"), **settings}
        others = [{}, elsewhere or {}]
        return [make_config(engine, output=root / output, **{**settings, **other})[0] for other in others]

    return write


@pytest.fixture(scope="module")
def train_on_nodes(nodes, zygote, configure):
    """Return a function that trains with real Axolotl on both nodes, and returns the finished run.

    ``local`` is the number of processes of a node; ``elsewhere`` are settings that differ on the second node.
    """
    runs = []

    def run(
        engine: str,
        *,
        expect: int | list = 0,
        output: str | None = None,
        local: int = 1,
        env: dict | None = None,
        **settings,
    ) -> NodesRun:
        runs.append(engine)
        output = output or f"run-{len(runs)}"
        paths = configure(engine, output, **settings)
        log = paths[0].with_suffix(f".{len(runs)}.log")
        args = [{"config": str(path)} for path in paths for _ in range(local)]
        described = [node.describe() for node in nodes]
        begun = time.monotonic()
        codes = zygote.run("axolotl.cli.train:do_cli", args, len(args), log, env or {}, nodes=described)
        seconds = time.monotonic() - begun
        text = "\n".join(Path(f"{log}.{rank}").read_text() for rank in range(len(args)))
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert codes == (expect if isinstance(expect, list) else [expect] * len(args)), (
            f"exit codes {codes}\n{text[-6000:]}"
        )
        return NodesRun([Run(node.disk / output, codes, text) for node in nodes], codes, text, seconds)

    return run


@pytest.fixture(scope="module")
def alone(train) -> Run:
    """The same run in one process."""
    return train("single", **SETTINGS)


@pytest.fixture(scope="module")
def whole_runs(train_on_nodes) -> dict[str, NodesRun]:
    return MadeOnce(lambda engine: train_on_nodes(engine, **SETTINGS))


def check_equal(run: NodesRun, alone: Run) -> None:
    """Compare a run on two nodes with one in one process; tolerances as in test_runs."""
    first = run.on[0]
    assert first.plan["calibration_rows"] == alone.plan["calibration_rows"]
    assert first.selected == alone.selected and len(alone.selected) == 4
    for one, two in zip(alone.plan["layers"], first.plan["layers"], strict=True):
        assert two["score"] == pytest.approx(one["score"], abs=1e-5)
    assert len({tuple(ranks.values()) for ranks in alone.ranks().values()}) > 2, "ranks moved more than once"
    assert run.read("layersel/ranks.csv") == [(alone.folder / "layersel/ranks.csv").read_bytes()] * 2
    assert first.losses() == pytest.approx(alone.losses(), abs=2e-5)
    assert difference(first.adapter("checkpoint-6"), alone.adapter("checkpoint-6")) <= 5e-5


def check_same_on_both(run: NodesRun) -> None:
    """Compare the files of the two nodes at the end of a run."""
    for name in (*ADAPTER, *RECORDS):
        first, second = run.read(name)
        assert first == second, name


@pytest.mark.parametrize("engine", ENGINES)
def test_two_nodes_choose_move_rank_and_train_as_one_process_does(whole_runs, alone, engine):
    run = whole_runs[engine]
    assert run.on[0].engine["engine"] == engine.split("-")[0] and run.on[0].engine["processes"] == 2
    check_equal(run, alone)
    assert run.log.count(CLOSING) == 1, "one of the nodes says it, once"


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ENGINES)
def test_both_nodes_have_the_best_adapter_at_the_end_byte_for_byte(whole_runs, engine):
    run = whole_runs[engine]
    check_same_on_both(run)
    best = run.on[0]
    assert difference(best.adapter(), best.adapter("checkpoint-2")) <= 1e-7
    assert best.pattern() == best.pattern(place="checkpoint-2") == best.ranks()[2] != best.ranks()[4]


def copy_checkpoint(run: NodesRun, nodes: list[Node], output: str, name: str = "checkpoint-4") -> None:
    """Copy each node's part of a checkpoint to a folder of its own."""
    for one, node in zip(run.on, nodes):
        shutil.copytree(one.folder / name, node.disk / output / name)


def copy_lacking(message: str, nodes: list[Node], output: str, name: str = "checkpoint-4") -> list[str]:
    """Copy the files that ``message`` says to copy, and return their patterns."""
    copied = []
    for match in LACKS.finditer(message):
        reader = nodes[int(re.search(r"\d+", match["reader"])[0])]
        holder = nodes[int(match["holder"])]
        for pattern in re.split(r", | and ", match["files"]):
            (path,) = (holder.disk / output / name).glob(pattern)
            target = reader.disk / output / name / path.relative_to(holder.disk / output / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
            copied.append(pattern)
    return copied


def check_documented(engine: str, copied: list[str]) -> None:
    """Compare the missing files with the patterns and folders in the manual's table."""
    section = find_section("clusters.md", "Nodes without a shared disk")
    row = re.search(rf"^\| {ROWS[engine]} \| (.*?) \|", section, flags=re.MULTILINE)[1]
    named = re.findall(r"`([^`]+\.\w+|latest|\w+/)`", row)
    patterns = [f"{name}*" if name.endswith("/") else name for name in named]
    matches = {pattern: fnmatch.filter(copied, pattern) for pattern in patterns}
    assert all(matches.values()) and {name for names in matches.values() for name in names} == set(copied), matches


@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_that_lack_files_end_at_once_with_what_to_copy_and_resume_exactly_once_it_is_there(
    whole_runs, train_on_nodes, nodes, engine
):
    whole, output = whole_runs[engine], f"resumed-{engine}"
    copy_checkpoint(whole, nodes, output)
    settings = {**SETTINGS, "auto_resume_from_checkpoints": True, "output": output}
    refused = train_on_nodes(engine, expect=1, **settings)
    (message,) = set(re.findall(r"LayerselError: (.*)", refused.log))
    assert refused.log.count(f"LayerselError: {message}") == 2, "every rank says it, once"
    place = nodes[0].root / output / "checkpoint-4"
    assert message.startswith(f"resume_from_checkpoint: of {place} process ")
    assert f"process 1 on {nodes[1].name} cannot read " in message
    assert MODEL_LOADS not in refused.log and refused.seconds < SECONDS
    check_documented(engine, copy_lacking(message, nodes, output))
    resumed = train_on_nodes(engine, **settings)
    assert (resumed.on[0].folder / "weights_at_4.safetensors").exists(), "it did not resume at step 4"
    assert resumed.read("layersel/ranks.csv") == whole.read("layersel/ranks.csv")
    assert difference(whole.on[0].adapter("checkpoint-6"), resumed.on[0].adapter("checkpoint-6")) <= 1e-6
    assert difference(whole.on[0].adapter(), resumed.on[0].adapter()) <= 1e-6
    check_same_on_both(resumed)


@pytest.mark.nightly
def test_a_checkpoint_of_another_run_on_the_second_node_is_refused(whole_runs, train_on_nodes, nodes):
    copy_checkpoint(whole_runs["zero2"], nodes, "mixed")
    path = nodes[0].disk / "mixed" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    next(entry for entry in state["log_history"] if "loss" in entry)["loss"] += 0.5
    (nodes[1].disk / "mixed" / "checkpoint-4" / path.name).write_text(json.dumps(state))
    settings = {**SETTINGS, "auto_resume_from_checkpoints": True, "output": "mixed"}
    refused = train_on_nodes("zero2", expect=1, **settings)
    place = nodes[0].root / "mixed" / "checkpoint-4"
    assert refused.log.count(f"LayerselError: resume_from_checkpoint: of {place} process 1 on") == 2, "files come first"
    copy_lacking(re.search(r"LayerselError: (.*)", refused.log)[1], nodes, "mixed")
    (nodes[1].disk / "mixed" / "checkpoint-4" / path.name).write_text(json.dumps(state))
    refused = train_on_nodes("zero2", expect=1, **settings)
    assert refused.log.count(f"LayerselError: output_dir: {place} of process 1") == 2
    assert "their losses in trainer_state.json differ" in refused.log
    assert MODEL_LOADS not in refused.log and refused.seconds < SECONDS


@pytest.mark.nightly
def test_a_node_that_was_given_the_other_ones_number_is_told_what_to_copy(whole_runs, train_on_nodes, nodes):
    """A scheduler may restart a job with the nodes in another order."""
    for one, node in zip(whole_runs["zero3"].on[::-1], nodes):
        shutil.copytree(one.folder / "checkpoint-4", node.disk / "swapped" / "checkpoint-4")
    settings = {**SETTINGS, "auto_resume_from_checkpoints": True, "output": "swapped"}
    refused = train_on_nodes("zero3", expect=1, **settings)
    (message,) = set(re.findall(r"LayerselError: (.*)", refused.log))
    assert "rng_state_0.pth" in copy_lacking(message, nodes, "swapped") and "process 1 on" in message


@pytest.mark.nightly
def test_output_folders_that_differ_between_nodes_are_refused(train_on_nodes, nodes):
    other = str(nodes[0].root / "elsewhere")
    refused = train_on_nodes("ddp", expect=1, output="here", elsewhere={"output_dir": other}, **SETTINGS)
    assert (
        refused.log.count(f"LayerselError: output_dir: '{other}' on process 1, '{nodes[0].root / 'here'}' on process")
        == 2
    )
    assert MODEL_LOADS not in refused.log


# With two processes on each of two nodes, each process has one of the four rows of a step.
FOUR = {**SETTINGS, "micro_batch_size": 1}


@pytest.mark.nightly
def test_two_nodes_with_two_processes_each_do_as_one_process_does(train_on_nodes, train):
    run = train_on_nodes("zero3", local=2, **FOUR)
    assert run.on[0].engine == {**run.on[0].engine, "engine": "zero3", "processes": 4}
    check_equal(run, train("single", **{**FOUR, "micro_batch_size": 4}))
    check_same_on_both(run)


# --- Without Axolotl ----------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_plain_trainer_saves_on_each_node_what_it_saves_on_the_first(zygote, nodes, tmp_path):
    described = [node.describe() for node in nodes]
    arguments = {"folder": str(nodes[0].root / "plain")}
    codes = zygote.run("helpers.plain_training:train_plainly", arguments, 2, tmp_path / "log", {}, nodes=described)
    assert codes == [0, 0], (tmp_path / "log.1").read_text()[-3000:]
    first, second = (node.disk / "plain" for node in nodes)
    for place in ("checkpoint-2", "checkpoint-4", "."):
        for name in (*ADAPTER, RECORDS[0]):
            assert (first / place / name).read_bytes() == (second / place / name).read_bytes()


# --- Another number of processes ----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_run_on_two_nodes_goes_on_in_one_process_and_back(whole_runs, train, train_on_nodes, nodes, tmp_path):
    whole = whole_runs["ddp"]
    shutil.copytree(whole.on[0].folder / "checkpoint-2", tmp_path / "checkpoint-2")
    settings = {**SETTINGS, "auto_resume_from_checkpoints": True}
    shorter = train("single", output=tmp_path, **settings)
    warning = "was written by 2 processes, and this run has 1: random streams, such as dropout's, begin anew"
    assert shorter.log.count(f"checkpoint-2 {warning}") == 1
    for node in nodes:
        shutil.copytree(tmp_path / "checkpoint-4", node.disk / "elastic" / "checkpoint-4")
    wider = train_on_nodes("ddp", output="elastic", **settings)
    assert "checkpoint-4 was written by one process, and this run has 2" in wider.log
    for run, step in ((shorter, 2), (wider.on[0], 4)):
        assert (run.folder / f"weights_at_{step}.safetensors").exists(), f"it did not resume at step {step}"
        assert run.ranks() == whole.on[0].ranks()
        # As between one and two processes in test_runs.
        assert difference(run.adapter("checkpoint-6"), whole.on[0].adapter("checkpoint-6")) <= 5e-5
    check_same_on_both(wider)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["zero2", "fsdp2-sharded"])
def test_engines_that_cannot_resume_with_other_processes_say_so_before_the_model_loads(
    whole_runs, train_on_nodes, nodes, engine
):
    output = f"wider-{engine}"
    copy_checkpoint(whole_runs[engine], nodes, output)
    settings = {**FOUR, "auto_resume_from_checkpoints": True}
    refused = train_on_nodes(engine, expect=1, local=2, output=output, **settings)
    place = nodes[0].root / output / "checkpoint-4"
    said = f"LayerselError: resume_from_checkpoint: {place} was written by 2 processes, and this run has 4. Under "
    assert refused.log.count(said) == 4
    assert MODEL_LOADS not in refused.log and refused.seconds < SECONDS


# --- Nodes that die -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "way"), [*at_night(("ddp", "STOP"), ("zero2", "DIE")), ("fsdp2-full", "DIE")])
def test_a_node_that_is_gone_ends_the_other_within_the_timeout_and_is_told_of_first(train_on_nodes, engine, way):
    settings = {**selection("last"), "ddp_timeout": 20, "env": {"LAYERSEL_TEST_SIGNAL": f"{way}:3"}}
    run = train_on_nodes(engine, expect=[1, -9], **settings)
    assert run.on[0].engine["engine"] == engine.split("-")[0]
    said = "layersel: process 0 cannot reach another process of the run: that has ended, or has not answered for"
    assert f"{said} ddp_timeout: 20 seconds." in run.log
    assert run.log.index(said) < run.log.index("Traceback")
    assert run.seconds < SECONDS + 20


@pytest.mark.nightly
def test_a_signal_to_one_process_ends_both_nodes_with_their_parts_of_a_checkpoint(train_on_nodes):
    run = train_on_nodes("zero2", expect=143, env={"LAYERSEL_TEST_SIGNAL": "TERM:3"}, **SETTINGS)
    for rank, one in enumerate(run.on):
        parts = one.folder / "checkpoint-3" / "global_step3"
        assert (parts / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").exists()
        assert not (one.folder / "adapter_model.safetensors").exists()
    assert "Traceback" not in run.log


# --- Started by hand ----------------------------------------------------------------------------------------------


def launch(nodes: list[Node], paths: list[Path], *words: str) -> str:
    """Run a launcher on each node as a user does, and return the output of both.

    ``{rank}``, ``{host}`` and ``{config}`` in its arguments are filled in.
    """
    running = []
    for rank, (node, path) in enumerate(zip(nodes, paths)):
        filled = [word.format(rank=rank, host=nodes[0].address, config=path) for word in words]
        environment = {**os.environ, **ENVIRONMENT, **({"GLOO_SOCKET_IFNAME": INTERFACE} if node.holder else {})}
        with open(path.with_suffix(f".{rank}.log"), "w") as log:
            running.append(subprocess.Popen([*node.enter(), *filled], env=environment, stdout=log, stderr=log))
    codes = [process.wait(timeout=HANGS) for process in running]
    text = "\n".join(path.with_suffix(f".{rank}.log").read_text() for rank, path in enumerate(paths))
    assert codes == [0, 0], text[-6000:]
    return text


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("engine", "command"),
    [
        (
            "ddp",
            "accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank}"
            " --main_process_ip {host} --main_process_port 29517 -m axolotl.cli.train {config}",
        ),
        (
            "zero2",
            "torchrun --nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr {host} --master_port 29518"
            " -m axolotl.cli.train {config}",
        ),
    ],
)
def test_the_launchers_start_two_nodes(nodes, configure, alone, engine, command):
    paths = configure(engine, f"launched-{engine}", **SETTINGS)
    text = launch(nodes, paths, *command.split())
    run = NodesRun([Run(node.disk / f"launched-{engine}", [0, 0], text) for node in nodes], [0, 0], text, 0)
    assert run.on[0].engine["engine"] == engine and run.on[0].engine["processes"] == 2
    check_equal(run, alone)
    check_same_on_both(run)
