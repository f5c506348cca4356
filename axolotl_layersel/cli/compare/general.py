"""The general text of a comparison, whose loss tells what a run forgets. No datasets."""

import json

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import read_parsed
from axolotl_layersel.config.strict_block import quote

WAY_OUT = "Give a text file with a passage on each line, or JSON lines with the key `text`."


def read_passages(path: str) -> list[str]:
    """Return the passages of general text: each line of a text file, or the ``text`` of each line of JSON.

    Args:
        path: the file. Its name says whether it is JSON lines.

    Raises:
        LayerselError: if the file cannot be read, or has no text.
    """

    def parse(content: str) -> list[str]:
        if not path.endswith((".jsonl", ".json")):
            return content.splitlines()
        # Text in JSON may contain other ends of lines, such as U+2028.
        texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        other = next((text for text in texts if not isinstance(text, str)), "")
        if not isinstance(other, str):
            raise ValueError(f"the text {quote(other)} is not a string")
        "".join(texts).encode()  # JSON can name half of a surrogate pair, which no tokenizer takes
        return texts

    passages = [passage for passage in read_parsed("--general", path, WAY_OUT, parse) if passage.strip()]
    if not passages:
        raise LayerselError(f"--general: {path} has no text. {WAY_OUT}")
    return passages
