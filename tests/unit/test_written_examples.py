"""What the README and the pages of docs/ tell a reader to write is valid, and what they name is there."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.axolotl_files import PLUGIN, find_unknown_keys, validate, without_plugins
from helpers.documents import PAGES, README, Block, find_blocks, find_section, list_blocks, remove_blocks
from helpers.places import ROOT
from markdown.extensions.toc import slugify

from axolotl_layersel import __version__
from axolotl_layersel.config.flexora import FlexoraConfig
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig

COMPARISON = ROOT / "benchmarks" / "peft_method_comparison" / "README.md"
DOCUMENTS = [README, *PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"))]
DOCUMENTS.append(COMPARISON)
# What a fragment is merged into.
FILE = {
    "base_model": "base",
    "plugins": [PLUGIN],
    "layersel": {"selection": {"method": "cka"}},
    "datasets": [{"path": "train.jsonl", "type": "alpaca"}],
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0002,
    "bf16": True,
}
# Programs that are not installed here, and the options of theirs that are named.
PROGRAMS = {
    "vllm": {"--enable-lora", "--lora-modules", "--max-lora-rank"},
    "curl": {"-H", "-d"},
    "hf": set(),
    "kubectl": {"--from-file", "-f"},
    "sbatch": set(),
}


@pytest.fixture
def no_plugins(monkeypatch):
    monkeypatch.chdir(ROOT)
    with without_plugins():
        yield


@pytest.mark.parametrize("block", list_blocks("yaml"), ids=str)
def test_axolotl_accepts_a_yaml_block(block, no_plugins):
    content = yaml.safe_load(block.text)
    whole = {**FILE, **content}
    if "lora_target_modules" in content:
        del whole["lora_target_linear"]
    cfg = validate(whole, 2 if {"fsdp_config", "deepspeed"} & set(content) else 1)
    assert LayerselConfig.model_validate(cfg.layersel.to_dict()) == LayerselConfig(**whole["layersel"])
    assert find_unknown_keys(whole) == set()


def test_the_readme_and_the_first_page_begin_with_the_same_whole_file():
    (readme,) = find_blocks(README, "yaml")
    first = find_blocks(ROOT / "docs" / "start.md", "yaml")[0]
    assert readme.text == first.text and {"base_model", "datasets"} <= set(yaml.safe_load(readme.text))


def split_commands(block: Block) -> list[list[str]]:
    """Return the commands of a block as words, without comments."""
    # A line goes on after a backslash, and within quotes.
    lines = re.findall(r"(?:'[^']*'|\\\n|[^'\n])+", block.text)
    return [words for line in lines if (words := shlex.split(line.replace("\\\n", " "), comments=True))]


def find_options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("-")}


def list_options(parser) -> set[str]:
    """Return the options of a command that argparse reads, under both of their spellings."""
    names = {name for action in parser._actions for name in action.option_strings}
    return names | {name[:2] + name[2:].replace("-", "_") for name in names}


def check_launcher(name: str, words: list[str]) -> None:
    """Check what a launcher is given, up to the program that it starts."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parser = {"accelerate": launch_command_parser, "torchrun": get_args_parser}[name]()
    own = words[: words.index("-m")] if "-m" in words else words
    assert find_options(own) <= list_options(parser)
    if "-m" in words:
        module, config = words[words.index("-m") + 1 :]
        assert module == "axolotl.cli.train" and (ROOT / config).exists()


def check_click(command, words: list[str]) -> None:
    """Check a command of click's: its subcommands, its options, and what follows ``--``."""
    words, launched = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert not hasattr(command, "commands") or all(word.startswith("-") for word in words), words
    assert find_options(words) <= {name for param in command.params for name in param.opts}
    if launched:
        launcher = words[words.index("--launcher") + 1]
        check_launcher(launcher, launched)


def check_command(words: list[str]) -> None:
    """Check that a command of the documents is there, with its options and the files that it names."""
    import typer
    from axolotl.cli.main import cli

    from axolotl_layersel.cli.main import app

    program, *rest = words
    if program == "axolotl-layersel":
        check_click(typer.main.get_command(app), rest)
    elif program == "axolotl":
        check_click(cli, rest)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert set(rest) <= targets
    elif program == "python":
        script = (ROOT / rest[0]).read_text()
        shared = (ROOT / "benchmarks" / "measuring.py").read_text()
        assert all(f'"{option}"' in script or f'"{option}"' in shared for option in find_options(rest[1:]))
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        extras = re.findall(r"^(\w+) = ", project, flags=re.MULTILINE)
        named = re.fullmatch(r"\.(?:\[(\w+)\])?", rest[1])
        wheel = f"axolotl_layersel-{__version__}-py3-none-any.whl"
        known = named[1] in {None, *extras} if named else rest[1] in {wheel, *read_pinned()}
        assert rest[0] == "install" and known
    elif program in ("accelerate", "torchrun"):
        check_launcher(program, rest[1:] if program == "accelerate" else rest)
    else:
        assert find_options(rest) <= PROGRAMS[program]
    named = [word for word in rest if re.match(r"(example_configs|benchmarks/results)/", word)]
    assert all((ROOT / name).exists() for name in named)


def read_pinned() -> set[str]:
    """Return the packages that the Makefile installs by their names."""
    return set(re.findall(r"pip install ([\w.=]+)", (ROOT / "Makefile").read_text()))


@pytest.mark.parametrize("block", [*list_blocks("bash"), *find_blocks(COMPARISON, "bash")], ids=str)
def test_the_commands_of_a_block_are_known(block):
    commands = split_commands(block)
    assert commands
    for words in commands:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "axolotl-layersel plan run.yml --repeats 4",
        "axolotl-layersel choose run.yml",
        "axolotl merge run.yml",
        "axolotl train run.yml --launcher torchrun -- --processes 4",
        "make tests",
        "python benchmarks/quality.py report runs.csv --drawing curves.svg",
        "pip install '.[plot]'",
        "pip install axolotl-layersel",
    ],
)
def test_a_command_that_is_not_there_is_found(line):
    with pytest.raises(AssertionError):
        check_command(shlex.split(line))


def test_every_python_block_is_an_example_that_a_test_runs():
    # tests/runs/test_plain_trainer.py and test_new_weight_runs.py run the first, test_served_adapters.py the other.
    assert Counter(block.document.name for block in list_blocks("python")) == {"trainer.md": 1, "serving.md": 1}


def test_rows_of_data_are_what_their_format_needs():
    (block,) = list_blocks("json")
    assert all(json.loads(line).keys() == {"instruction", "output"} for line in block.text.splitlines())


@pytest.mark.parametrize(
    "block, page, heading",
    [
        (SelectionConfig, "selection.md", "Keys"),
        (FlexoraConfig, "flexora.md", "Keys"),
        (L1RAConfig, "l1ra.md", "Keys"),
    ],
)
def test_a_page_explains_every_key_of_its_block_once(block, page, heading):
    table = find_section(page, heading).split("| key |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == sorted(block.model_fields)


def test_files_that_documents_name_exist():
    text = "".join(document.read_text() for document in (README, *PAGES) if document.name != "contributing.md")
    named = set(re.findall(r"(?:example_configs|benchmarks|tests|demo)/[\w./-]*\w\.\w+", text))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def find_anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", remove_blocks(document.read_text()), flags=re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(document):
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", remove_blocks(document.read_text()))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in find_anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.read_text().split()) <= 900


def test_a_served_model_is_asked_with_the_prompt_that_it_was_trained_on():
    from axolotl.prompters import AlpacaPrompter

    commands = [words for block in find_blocks(ROOT / "docs" / "one-gpu.md", "bash") for words in split_commands(block)]
    (request,) = (json.loads(words[words.index("-d") + 1]) for words in commands if words[0] == "curl")
    assert request["prompt"] == next(iter(AlpacaPrompter().build_prompt("How are you?")))
    assert any(f"{request['model']}=outputs/run" in words for words in commands)


def test_the_version_that_documents_name_is_the_packages():
    text = "".join(document.read_text() for document in (README, *PAGES))
    named = re.findall(r"axolotl_layersel-([\d.]+)-py3|layersel: plugin ([\d.]+) is loaded", text)
    assert {version for pair in named for version in pair if version} == {__version__}
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_page_for_axolotls_list_is_short():
    assert len((ROOT / "docs" / "axolotl.md").read_text().split()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_says_in_its_first_lines_what_the_reader_can_do_after_it(page):
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    first = text.split("\n\n", 1)[1].strip().split("\n\n")[0]
    assert re.match(r"(After|With) th(is|ese) pages? you (can|know)", first)
    # GitHub shows the pages too, in any order.
    assert text.startswith("# ")
