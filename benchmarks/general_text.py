"""Write two general texts, on which ``quality.py --general`` measures what a model forgets.

    python benchmarks/general_text.py texts

``texts/python.txt`` is source code of Python's standard library, and ``texts/english.txt`` paragraphs of plain English
from Python's own help and from the descriptions of the installed packages. Both come with the environment, so that
nothing is downloaded; they differ between environments, and runs to be compared need the same two files.
"""

import argparse
import re
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

LENGTH = 400_000  # characters of each text
PART = 20_000  # characters of one source, at most, so that no author prevails
SHORTEST = 200  # characters of a paragraph
PLAIN = re.compile(r"[A-Za-z ,.;:'\"()-]")
# Modules that every Python has, with prose and code of many kinds.
MODULES = """
argparse ast bisect calendar codecs configparser copy csv dataclasses datetime difflib doctest email/message enum
fractions ftplib functools getopt glob heapq html/parser http/client http/server inspect json/decoder json/encoder
locale mailbox mimetypes netrc optparse pathlib pickle plistlib pprint queue random sched selectors shlex shutil smtplib
socket socketserver statistics string subprocess tarfile tempfile textwrap threading tokenize traceback types
unittest/case urllib/parse urllib/request uuid wave weakref zipfile
"""


def join(parts: list[str]) -> str:
    """Return the parts one after the other, up to ``LENGTH``."""
    return "\n\n".join(parts)[:LENGTH]


def collect_python(library: Path) -> str:
    """Return source code from the folder of the standard library."""
    # Some of them are a file in one version and a folder in another.
    files = [path for name in MODULES.split() for path in (library / f"{name}.py", library / name / "__init__.py")]
    return join([path.read_text(encoding="utf-8")[:PART] for path in files if path.exists()])


def find_prose(text: str) -> list[str]:
    """Return the paragraphs of a text that are plain English, each on one line."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [
        paragraph
        for paragraph in paragraphs
        if len(paragraph) >= SHORTEST and len(PLAIN.findall(paragraph)) >= 0.97 * len(paragraph) and ". " in paragraph
    ]


def collect_english() -> str:
    """Return paragraphs of Python's help and of the descriptions of packages, each once."""
    # The description is the body of the metadata, which importlib reads as an e-mail.
    described = {each.metadata["Name"]: each.metadata.json.get("description", "") for each in distributions()}
    sources = [topics[name] for name in sorted(topics)] + [described[name] for name in sorted(described)]
    parts = [paragraph for source in sources for paragraph in find_prose(str(source)[:PART])]
    return join([*dict.fromkeys(parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"python": collect_python(Path(argparse.__file__).parent), "english": collect_english()}
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text)} characters")


if __name__ == "__main__":
    main()
