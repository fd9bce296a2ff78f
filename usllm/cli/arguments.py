"""What the user typed, in the form that Hydra reads: places instead of options, and text that stays text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from usllm.data.sources.files import COMPRESSIONS
from usllm.system.errors import UserError
from usllm.system.files import expanded

PLAIN_TEXT = ("prompt",)
"""Keys whose value ``null`` is the word."""
_FILES = {"path", "file", "evaluation", "json", "ckpt", "reference_losses"}
_FOLDERS = {
    "folder",
    "name",
    "run_dir",
    "output_root",
    "cache_dir",
    "include_path",
    "out",
    "runs",
    "dirpath",
    "save_dir",
}
_PLACES = _FILES | _FOLDERS
"""Last parts of keys whose value may be a place on this machine."""
_MULTIRUN = ("-m", "--multirun")


def readable(arguments: Sequence[str]) -> list[str]:
    """The arguments with quotes around every value that is text, whatever signs it holds.

    Text is what Hydra's grammar cannot read (``a=b``, ``~/a``, ``it's``), so that a value of the wrong kind is refused
    with its key by whoever reads it; and a file or folder that is there, where a key takes one, though the grammar
    would read a list, several values or a reference in its name.
    """
    parser = OverridesParser.create()
    return [argument if argument.startswith("-") else _readable(parser, argument) for argument in arguments]


def _readable(parser: OverridesParser, argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or not value:
        return argument
    quoted = f"{key}={quote(value)}"
    try:
        parser.parse_override(argument)
    except HydraException:
        try:
            parser.parse_override(quoted)
        except HydraException:  # the key is the problem
            return argument
        return quoted
    special = re.search(r"[,\[\]{}()$'\"\\]", value) is not None
    return quoted if special and key.rpartition(".")[2].lstrip("+") in _PLACES and is_there(value) else argument


def is_there(place: str) -> bool:
    """Whether a file or folder of that name exists; a name that no system allows does not."""
    try:
        return expanded(place).exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL in it, or ~ of a user that there is not
        return False


def expand_model(arguments: Sequence[str]) -> list[str]:
    """Let ``model=`` take a GGUF file, a folder or a hub name besides the options of the group ``model``.

    A value that looks like a place becomes the group option that reads such places; everything else is left to Hydra.
    In a sweep all of its values may be places of one kind.

    Raises:
        UserError: a sweep names places of several kinds, or places and options.
    """
    expanded: list[str] = []
    multirun = any(argument in _MULTIRUN for argument in arguments)
    for argument in arguments:
        key, _, value = argument.partition("=")
        places = _split(value) if multirun else [value]
        kinds = {_place(place) for place in places} if key == "model" else {None}
        if kinds == {None}:
            expanded.append(argument)
        elif len(kinds) > 1:
            raise UserError(
                f"{argument}: a sweep goes over options of the group, folders, .gguf files or names on the hub, each "
                "for itself; run the command once for each kind"
            )
        else:
            option, name = str(kinds.pop()).split()
            expanded += [f"model={option}", f"model.{name}={','.join(quote(place) for place in places)}"]
    return expanded


def _place(value: str) -> str | None:
    """Which option of the group ``model`` reads such a place, and its key; ``None`` for the name of an option.

    With one slash a value may be a name on the hub, unless its first part is a folder here.
    """
    if not value or ("," in value and not is_there(value)):
        return None
    if value.endswith(".gguf"):
        return "gguf file"
    if value.startswith(("/", "./", "../", "~")) or (is_there(value) and expanded(value).is_dir()):
        return "folder name"
    if "/" in value:
        local = value.count("/") > 1 or value.endswith("/") or is_there(value.partition("/")[0])
        return "folder name" if local else "hub name"
    return None


def expand_test_sets(arguments: Sequence[str]) -> list[str]:
    """Let ``data=[a.txt,b.jsonl.gz]`` name files to measure on; each becomes a test set called after its file.

    What kind of file it is follows from its name and its first bytes, when the configuration is checked.

    Raises:
        UserError: no file is named.
    """
    expanded: list[str] = []
    names: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key != "data" or not equals:
            expanded.append(argument)
            continue
        inner = value[1:-1] if value.startswith("[") and value.endswith("]") and not is_there(value) else value
        if not inner.strip() or inner == "null":
            raise UserError(f"{argument}: names no file to measure on; pass data=[<file>,…]")
        for path in _split(inner):
            plain = Path(path)
            plain = plain.with_suffix("") if plain.suffix.lower() in COMPRESSIONS else plain
            name = re.sub(r"\W", "_", plain.stem, flags=re.ASCII) or "text"
            name = f"text_{name}" if name[0].isdigit() else name  # Hydra would read a number
            names.append(name)
            number = names.count(name)
            prefix = f"+evaluation.test_sets.{name if number == 1 else f'{name}_{number}'}"
            expanded += [f"{prefix}.kind=auto", f"{prefix}.path={quote(path)}"]
    return expanded


def _split(value: str) -> list[str]:
    """The places of a list with commas between them; a comma in the name of one that is there is a part of it."""
    pieces, places = value.split(","), []
    while pieces:
        lengths = range(len(pieces), 1, -1)
        taken = next((n for n in lengths if is_there(",".join(pieces[:n]).strip())), 1)
        place = ",".join(pieces[:taken]).strip()
        quoted = len(place) > 1 and place[0] == place[-1] and place[0] in "'\""
        places.append(place[1:-1] if quoted and not is_there(place) else place)
        pieces = pieces[taken:]
    return places


def folder_of_model(arguments: Sequence[str]) -> list[str]:
    """Let ``model=`` name the folder of a packed model: in these commands it is a value, not a group of options.

    Raises:
        UserError: the folder is named twice, under both names.
    """
    keys = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    if "model" in keys and "folder" in keys:
        raise UserError("model=… and folder=… are one thing: give one of them")
    return [
        f"folder={argument.partition('=')[2]}" if key == "model" and "=" in argument else argument
        for key, argument in zip(keys, arguments, strict=True)
    ]


def without_wandb_argument(arguments: Sequence[str]) -> list[str]:
    """Drop the ``_wandb={…}`` that W&B appends to the command of a trial it starts again; Hydra would refuse it."""
    return [argument for argument in arguments if argument.lstrip("+-").partition("=")[0] != "_wandb"]


def quote_values(arguments: Sequence[str], keys: tuple[str, ...]) -> list[str]:
    """Make the values of ``keys`` plain text for Hydra, whatever signs they hold; in ``PLAIN_TEXT`` also ``null``."""
    split = [argument.partition("=") for argument in arguments]
    return [
        f"{key}={quote(value)}" if key in keys and equals and _is_plain(key, value) else key + equals + value
        for key, equals, value in split
    ]


def _is_plain(key: str, value: str) -> bool:
    """Whether the user left it to us to quote a value: not ``null``, and not what they quoted themselves."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return key in PLAIN_TEXT or not (value == "null" or quoted)


def quote(value: str) -> str:
    """``value`` as a string of Hydra's override grammar, in which spaces and colons have meanings.

    In it a backslash is one, but before a quote or at the end; ``${`` would be replaced by what it names.
    """
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped)
    return f"'{escaped}'"
