"""Write the parts of the documentation that the code knows better: ``python docs/generate.py``."""

from pathlib import Path

from axolotl_layersel.selection.methods import METHODS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- The table of methods is made by docs/generate.py. -->", "<!-- End of the table of methods. -->"


def make_method_table() -> str:
    """Return the methods as a table in Markdown."""
    rows = [
        f"| `{method.name}` | {method.reads} | {', '.join(method.units)} | {method.summary} |"
        for method in METHODS.values()
    ]
    return "\n".join(["| method | reads | chooses among | the score |", "|---|---|---|---|", *rows])


def fill(text: str) -> str:
    """Return the text of the README with the table of methods between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_method_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
