"""What holds for every test: its marks, what it may do, and what it shows in docs/support.md."""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported
os.environ.pop("LLAMA_CPP", None)  # the developer's own converter, which `export` would start
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when trackio is imported

import pytest
from helpers.places import COLLECTED, ROOT, SHARDING_ENGINES, TESTS
from helpers.support import Support, read_file, write_file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-support", action="store_true", help="write what the tests show to docs/support.json and support.md"
    )


@pytest.fixture
def support() -> Support:
    """What the test shows of a table in docs/support.md; if it passes, that must be what is written there."""
    return Support()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    result = yield
    shown = item.funcargs.get("support")
    if shown is not None:
        item.user_properties.append(("support", shown.describe()))
        if not item.config.getoption("--write-support"):
            written = read_file().get(item.nodeid, [])
            assert written == shown.describe(), "run `pytest --write-support` on this file, and look at what changed"
    return result


@pytest.fixture(autouse=True)
def no_test_leaves_programs_behind() -> Iterator[None]:
    """Let no test leave a program of build/ in ``sys.path``, where the product would find it in the next one."""
    yield
    assert not [place for place in sys.path if place.startswith(str(ROOT / "build"))]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-support") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportWriter())


class SupportWriter:
    """Writes what the tests of a session have shown; a test that failed shows nothing."""

    def __init__(self) -> None:
        self.shown: dict[str, list[dict]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.shown[report.nodeid] = dict(report.user_properties).get("support", []) if report.passed else []

    def pytest_sessionfinish(self) -> None:
        write_file({**read_file(), **self.shown})
        subprocess.run([sys.executable, ROOT / "docs" / "generate.py"], check=True)


# What the tests of a folder do besides looking, and so the marks that they get.
MARKS = {
    "unit": (),
    "families": ("trains",),
    "runs": ("trains", "launches"),
    "serving": ("trains", "launches", "serves"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Give each test the marks of its folder; ``make check`` leaves the marked ones out.

    The names of all tests are kept, before any are left out.
    """
    session.stash[COLLECTED] = {item.nodeid for item in items}
    # Test processes share the tests by name, and an object's address differs between them.
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not unstable, f"give the cases of {unstable[0]} names"
    for item in items:
        for mark in MARKS[find_folder(item)]:
            item.add_marker(mark)
    mark_engines(item for item in items if find_folder(item) == "runs")
    mark_cases(item for item in items if find_folder(item) != "runs" and item.get_closest_marker("trains"))
    # Files of long tests first: the short ones then fill what one process has left when the other ends.
    items.sort(key=lambda item: list(MARKS)[::-1].index(find_folder(item)))


def mark_engines(launched: Iterable[pytest.Item]) -> None:
    """Give the mark ``nightly`` to the tests that show on a further engine what they show on one that shards.

    That one is FSDP2, or ZeRO-3 in a module that says ``SHARDED_BY = "zero3"``, so that the tests of a module share
    their runs. A test that knows neither keeps its first engine. A test with other values of another parameter is
    another test. A module that exists to compare all engines says so by ``ON_EVERY_ENGINE = True``.
    """
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in launched:
        by_engine = hasattr(item, "callspec") and "engine" in item.callspec.params
        if by_engine and not getattr(item.module, "ON_EVERY_ENGINE", False) and not item.get_closest_marker("nightly"):
            others = item.callspec.id.replace(item.callspec.params["engine"], "ENGINE")
            by_test[f"{item.module.__name__} {item.originalname} {others}"].append(item)
    for items in by_test.values():
        engines = {item.callspec.params["engine"]: item for item in items}
        wanted = [getattr(items[0].module, "SHARDED_BY", None), *SHARDING_ENGINES]
        kept = next((engines[engine] for engine in wanted if engine in engines), items[0])
        for item in items:
            if item is not kept:
                item.add_marker("nightly")


def mark_cases(trained: Iterable[pytest.Item]) -> None:
    """Give the mark ``nightly`` to the tests that train in process, but for the first and the last case of each."""
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in trained:
        if not item.get_closest_marker("nightly"):
            by_test[f"{item.module.__name__} {item.originalname}"].append(item)
    for items in by_test.values():
        for item in items[1:-1]:
            item.add_marker("nightly")


def find_folder(item: pytest.Item) -> str:
    """Return the folder of tests/ that a test lies in."""
    return item.path.relative_to(TESTS).parts[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Let no test train or start a process, nor a fixture for it, that is not marked so: ``make check`` stays quick."""
    from transformers import Trainer

    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("trains"):
            patch.setattr(Trainer, "train", lambda *args, **kwargs: refuse_unmarked("trains"))
        if not item.get_closest_marker("launches"):
            patch.setattr(subprocess, "Popen", QuietPopen)
        return (yield)


class QuietPopen(subprocess.Popen):
    """Starts anything but a program of Python's, as libraries do to learn about the machine."""

    def __init__(self, args, *rest, **options):
        program = Path(args.split()[0] if isinstance(args, str) else args[0]).name
        if "python" in program or program.startswith(("axolotl", "accelerate", "torchrun")):
            refuse_unmarked("launches")
        super().__init__(args, *rest, **options)


def refuse_unmarked(mark: str) -> NoReturn:
    where = {
        "trains": "mark this test with `pytest.mark.trains`, or move it",
        "launches": "move this test to tests/runs",
    }
    raise AssertionError(where[mark])
