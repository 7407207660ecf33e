"""What a shell is told of an error: one sentence, whoever raised it."""

import re
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path

from salun_lightning.cli import program

_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
_FRAME = (  # what the parser puts around the line that matters
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Problem with given class_path",
    "Parser key",
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Expected a <class 'torch.Tensor'>",
)
_ADVICE = "See `{command} --help`."
_KNOWN: list[tuple[str, str]] = [  # sentences of the parser, of torch and of Lightning, and what they mean for a user
    (r"^Subcommand '.*' does not accept option '(.*)'", "There is no option --{0}. " + _ADVICE),
    (r"unrecognized arguments: (.*)", "There is no option {0}. " + _ADVICE),
    (r"argument subcommand: invalid choice: '(.*?)'", "There is no command '{0}'. See `{program} --help`."),
    (r"argument (?:-c/)?--(\S+): expected one argument", "--{0} needs a value."),
    (r"^the following arguments are required: folder$", "It is not said where to. Give a folder: `{command} FOLDER`."),
    (r"^the following arguments are required: (.*)", "Nothing is given for {0}. Name a configuration file with --config."),
    (r"^--(\S+): Expected a dot import path string: (.*)", "--{0}: there is no class called '{1}'."),
    (r"^Option '(.*)' is not accepted$", "The configuration holds '{0}', which this command does not know. " + _ADVICE),
    (r'"config":\s+File does not exist: (.*)', "There is no configuration file {0}. See `{program} configs`."),
    (r'"config":\s+Path is not a file: (.*)', "{0} is a folder. Give a configuration file."),
    (r"Invalid option \"(.*)\" for --print_config", "--print_config takes comments, skip_default or skip_null, not '{0}'."),
    (
        r"Given groups=.*expected input\[.*?\] to have (\d+) channels, but got (\d+) channels",
        "The network takes images of {0} channels, and those of the data have {1}. Change the network's input channels.",
    ),
    (
        r"Target (\d+) is out of bounds",
        "The network has no output for class {0}. Give it as many outputs as there are classes (num_classes).",
    ),
    (
        r"stack expects each tensor to be equal size, but got \[(.*?)\] at entry 0 and \[(.*?)\]",
        "The images differ in size ({0} and {1}). Resize them to one size, in train_transform and eval_transform of the data.",
    ),
    (
        r"Expected more than 1 value per channel when training",
        "BatchNorm cannot train on a batch of one image. Choose another --data.batch_size.",
    ),
    (
        r"mat1 and mat2 shapes cannot be multiplied \((.*?) and (.*?)\)",
        "A layer of the network does not fit its input ({0} and {1}). Have the images the size that it is made for?",
    ),
    (
        r"CUDA out of memory",
        "The device's memory is full. Choose a smaller --data.batch_size, or bf16 with --trainer.precision.",
    ),
    (r"No space left on device", "The disk is full. What was there before is unchanged; make room and repeat the command."),
    (r"is not in bounds, numpy accepts from 0", "--seed_everything takes a whole number from 0 to 4294967295."),
    (r"`Trainer\(devices='?(.*?)'?\)` value is not a valid", "--trainer.devices {0} is no number of devices. Give 1 or more."),
    (r"`devices` selected with `(\w+)` should be an int > 0", "--trainer.devices must be 1 or more."),
    (r"No supported gpu backend found", "This machine has no GPU that torch can use. Give --trainer.accelerator cpu."),
]


def sentence(error: BaseException, words: Sequence[str]) -> str:
    """Say in one sentence what is wrong.

    Args:
        error: The error.
        words: The command line it comes from.

    Example:
        >>> sentence(ValueError("batch_size must be positive, got 0."), ["fit"])
        'batch_size must be positive, got 0.'
        >>> sentence(KeyError("x"), ["fit"])
        "KeyError: 'x' (--debug shows where)"
    """
    text = str(error.args[1] if isinstance(error, ArgumentError) and len(error.args) > 1 else error).strip()
    command = " ".join([program(), *words[:1]])
    for pattern, meaning in _KNOWN:
        if found := re.search(pattern, text):
            given = [group.replace(f"{command.rpartition(' ')[2]}.", "") for group in found.groups()]
            return meaning.format(*given, program=program(), command=command)
    if "Parser key" in text or "Does not validate" in text:
        return _unframed(text, command)
    if isinstance(error, UnicodeDecodeError) or (isinstance(error, ArgumentError) and "config" in text.lower()):
        return _of_a_file(text, words)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: '{error.filename}'."
    text = " ".join(text.split())
    if isinstance(error, ArgumentError | ValueError | OSError) or type(error).__name__ == "MisconfigurationException":
        return text or f"{type(error).__name__} (--debug shows where)"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _unframed(text: str, command: str) -> str:
    """The sentence in the midst of the parser's report, with the option it is about."""
    text = _of_one_class(text)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    option = ".".join(re.findall(r'Parser key "(.*?)"', text))
    values = re.findall(r"(?:Given value:|Got value:) (.*)", text)
    value = _bare(values[0]) if values else ""
    lines = [
        re.sub(r"^Type typing.Callable.*?expects a function or a callable class: |^Not of type \w+: |\. Got value: .*", "", x)
        for x in lines
    ]
    reasons = [line for line in lines if line and not line.startswith(_FRAME)]
    others = [line for line in reasons if not line.startswith("Expected a ")]
    others.sort(key=lambda line: line.startswith("Import path"))  # last: the option may take several classes
    classes = re.findall(r"Problem with given class_path '(.*?)'", text)
    if others:
        return _reason(others[0], option, value, classes, command)
    if any("dot import path" in line for line in reasons) and not re.search(r"class '(int|float)'", " ".join(reasons)):
        return f"--{option}: there is neither a class nor a file called '{value or reasons[0].rpartition(' ')[2]}'."
    if value == "None" and "NestedArg" in text:  # the parser makes a text of it
        whole, _, name = option.rpartition(".")
        form = f"'{{class_path: ..., init_args: {{{name}: null, ...}}}}'"
        return f"--{option} cannot be null by itself. Give all of it: --{whole} {form}."
    return f"--{option} takes {_expected(text)}, not '{value}'."


def _of_one_class(text: str) -> str:
    """The parser's report where an option may be of several classes, without what it says of those that are not meant."""
    tried = re.search(r"^( *)- Problem with given class_path '.*?':\n(?:\1 +.*\n)*", text, re.MULTILINE)
    if tried is None:
        return text
    others = rf"^{tried[1]}- (Import path .* does not correspond to|Problem with given class_path) .*\n(?:{tried[1]} +.*\n)*"
    before, behind = (re.sub(others, "", part, flags=re.MULTILINE) for part in (text[: tried.start()], text[tried.end() :]))
    return before + tried[0] + behind


def _bare(value: str) -> str:
    """A value without what the parser wraps it in: ``NestedArg(key='forget', val='Cat')`` is Cat."""
    value = re.sub(r"\. Got value: .*", "", value.strip())
    found = re.match(r"NestedArg\(key=.*?, val='(.*)'\)$|Namespace\(class_path='(.*?)'", value)
    return (found[1] or found[2]) if found else value


def _reason(reason: str, option: str, value: str, classes: list[str], command: str) -> str:
    owner = classes[-1] if classes else value
    needy = owner if len(classes) > 1 else value or owner  # the parser names the class, unless it is a callable
    if owner in {"lightning.LightningModule", "lightning.LightningDataModule"}:
        return f"--{option} names no class. Give its class_path."
    readings: list[tuple[str, Callable[[str], str]]] = [
        (
            r"Option '(.*?)' is not accepted",
            lambda name: f"{owner} has no option '{name}'. See `{command} --model.help {owner}`.",
        ),
        (r"the following arguments are required: (.*)", lambda names: f"--{option}: {needy} needs {names}."),
        (r"No module named '(.*?)'", lambda name: _missing(name, option, value)),
        (r"does not correspond to a subclass of (\w+)", lambda name: f"--{option}: '{value}' is not a {name}."),
    ]
    for pattern, said in readings:
        if found := re.search(pattern, reason):
            return said(found[1])
    return reason


def _missing(module: str, option: str, value: str) -> str:
    if value.endswith((".yaml", ".yml", ".json")):
        return f"--{option}: there is no file '{value}'."
    return f"--{option}: there is no module '{module}' for '{value}'. Is it in the working directory, or installed?"


def _expected(text: str) -> str:
    choices = re.findall(r"Expected a typing\.Literal\[(.*?)\]", text)
    if choices:
        return f"one of {', '.join(choices)}"
    kinds = [_TYPES.get(name, f"a {name}") for name in re.findall(r"Expected a <class '([\w.]+)'>", text) if name != "NoneType"]
    if re.search("class 'float'", text):
        kinds = [kind for kind in kinds if kind != "a whole number"]
    return " or ".join(dict.fromkeys(kinds)) or "another value"


def _of_a_file(text: str, words: Sequence[str]) -> str:
    """Which configuration file cannot be read; the parser does not say."""
    import yaml

    joined = " ".join(words)
    for name in re.findall(r"(?:--config|-c)[ =](\S+)", joined):
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            return f"The configuration file '{name}'{line}, is not YAML. Correct it there."
        if not isinstance(content, dict):
            return f"The configuration file '{name}' holds no options. Write one `option: value` on each line."
    return " ".join(text.split())
