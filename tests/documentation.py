"""Reads the documentation's fenced blocks and runs them: commands through the command line's `main`, Python as written.

A page's blocks run in order in one directory. In front of a fence, `<!-- not run: REASON -->` leaves a block out and `<!-- extended: REASON -->` leaves
it to `make test-all`. A Python block that begins with the comment `# FOLDER/NAME.py` is a file that a user adds to the folder of a registry; one that
begins with `# an entry of CAPABILITIES` is the entry that a new backend adds there.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edm_deploy.runtime.capabilities import CAPABILITIES
from edm_deploy_tools.cli import main

ROOT = Path(__file__).parent.parent
RUN_LANGUAGES = ("bash", "python")
LANGUAGES = (*RUN_LANGUAGES, "text", "")  # output and layouts, which are not run
FENCE = re.compile(r"```(\w*)$")
MARKER = re.compile(r"<!-- (not run|extended): (.+) -->$")
ADDED_FILE = re.compile(r"# ([\w/]+/\w+\.py)\n")
ENTRY = "# an entry of CAPABILITIES"
# Least work of each command: an option's value replaces the one that is written, and is added where none is written.
SMALLEST = {
    "calibrate": {"--rows": "2", "calibration_samples": "2"},
    "finetune": {"--rows": "2", "calibration_samples": "2", "steps": "2", "batch": "2"},
    "compare": {"--rows": "2", "--samples": "2", "--steps": "2", "--budget": "1s", "--bits": "W4A4"},
    "evaluate": {"--samples": "2", "--steps": "2"},
    "sample": {"--num-images": "2", "--steps": "2"},
    "generate": {"--num-images": "4", "--steps": "2"},
    "bench-serve": {"--requests": "2", "--rounds": "1", "--steps": "1:2", "--overhead-seconds": "0"},
    "bench": {"--batch": "2", "--rounds": "2"},
}
# Sizes that a model of a few thousand parameters has in place of those of a real one; replaced where they are written.
SMALLER = {"--height": "16", "--width": "16", "--resume": None}
TIMED = "--budget"  # left out with its value: how many steps a budget leaves depends on the machine


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Its file.
        line: Number of its first line, from 1.
        language: As written behind the fence.
        text: Between the fences.
        marker: `not run`, `extended` or empty.
    """

    page: Path
    line: int
    language: str
    text: str
    marker: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    blocks, opened, marker = [], None, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if opened is not None:
            if line == "```":
                blocks.append(Block(page, opened[0], opened[1], "".join(opened[2]), marker))
                opened, marker = None, ""
            else:
                opened[2].append(line + "\n")
        elif fence := FENCE.match(line):
            opened = (number + 1, fence[1], [])
        elif found := MARKER.match(line):
            marker = found[1]
        elif line.strip():
            marker = ""
    assert opened is None, f"{page}:{opened and opened[0]}: a fence is not closed"
    return blocks


class Runner:
    """Runs the blocks of one page in the current directory.

    Args:
        models: By the name that the documentation gives to a model, the words that replace it in a command: the directory of a tiny model, and options.
        patch: Undoes what blocks add to the registries.
    """

    def __init__(self, models: dict[str, list[str]], patch: pytest.MonkeyPatch) -> None:
        self.models, self.patch = models, patch
        self.names: dict[str, Any] = {"__name__": "documentation"}

    def run(self, block: Block) -> None:
        """Run one block; fails with its page and line."""
        if block.language == "bash":
            for line, command in commands_of(block):
                self._command(f"{block.page.relative_to(ROOT)}:{line}", command)
        elif added := ADDED_FILE.match(block.text):
            self._add_file(Path(added[1]), block.text)
        elif block.text.startswith(ENTRY):
            entry = eval(block.text.partition("\n")[2], vars(importlib.import_module("edm_deploy.runtime.capabilities")))
            self.patch.setitem(CAPABILITIES, entry.backend, entry)
        else:
            text = block.text
            for name, words in self.models.items():
                text = text.replace(f'"{name}"', repr(words[0]))
            exec(compile("\n" * (block.line - 1) + text, str(block.page), "exec"), self.names)

    def _command(self, place: str, command: list[str]) -> None:
        if command[0] == "edm-deploy":
            code = main(smallest([part for word in command[1:] for part in self.models.get(word, [word])]))
        elif command[:2] == ["python", "-m"]:
            code = importlib.import_module(command[2]).main(command[3:])
        else:
            pytest.fail(f"{place}: {command[0]!r} is neither edm-deploy nor python -m; mark the block as not run, and say why")
        if code:
            pytest.fail(f"{place}: `{shlex.join(command)}` ended with exit code {code}; its message is in the captured stderr")

    def _add_file(self, path: Path, text: str) -> None:
        """Write the file, and let the registry of its folder look into the current directory too."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        package = importlib.import_module(".".join(path.parent.parts))
        self.patch.setattr(package, "__path__", [*package.__path__, str(path.parent.resolve())])
        self.patch.delitem(sys.modules, ".".join(path.with_suffix("").parts), raising=False)


def commands_of(block: Block) -> list[tuple[int, list[str]]]:
    """The commands of a bash block with their lines; a backslash continues a line, `#` begins a comment."""
    commands, begun, pending = [], block.line, ""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        begun = begun if pending else number
        pending += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if words := shlex.split(pending, comments=True):
            commands.append((begun, words))
        pending = ""
    return commands


def smallest(arguments: list[str]) -> list[str]:
    """The command with the least work: options of SMALLEST set, sizes of SMALLER replaced."""
    command, *words = arguments
    least = dict(SMALLEST.get(command, {})) if "--help" not in words else {}
    result, position = [command], 0
    while position < len(words):
        word, position = words[position], position + 1
        key = words[position].partition("=")[0] if word == "--set" else word
        if key in least or word == TIMED:
            position += 1  # its value; those of `least` are added below
        elif word in SMALLER:
            replacement = SMALLER[word]
            result += [] if replacement is None else [word, replacement if command != "build-engine" else "8:8:16"]
            position += replacement is not None
        else:
            result.append(word)
    if command == "bench" and "--finetune-step" in words:
        least["--batch"] = "2"
    for key, value in least.items():
        result += [key, value] if key.startswith("--") else ["--set", f"{key}={value}"]
    return result
