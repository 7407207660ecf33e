"""What the README and the pages in docs/ show, run as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import salun_lightning.methods
from salun_lightning import ForgetClasses, ForgetIndices, ForgetRandom, Patch, SaliencyMask, WrongLabels, configurations
from salun_lightning.cli import main
from salun_lightning.comparison.command import compare
from salun_lightning.configurations import find, located
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.methods import GROUP, Method
from salun_lightning.networks.loading import read_checkpoint
from salun_lightning.search import command as search_command
from tests.modules.small_runs import same, weights
from tests.modules.test_unlearn import Dictionaries, Theirs

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
}
TEXT = "\n".join(PAGES.values())
QUICK = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def blocks(language: str, pages: str = TEXT) -> list[str]:
    """The code blocks of one language, those of the README first."""
    return re.findall(rf"^```{language}\n(.*?)^```", pages, flags=re.DOTALL | re.MULTILINE)


def block(language: str, mark: str) -> str:
    """The one block that holds a mark."""
    (found,) = (text for text in blocks(language) if mark in text)
    return found


def commands() -> list[list[str]]:
    """The words of every ``train.py`` that a shell block shows, also of those that another command wraps."""
    found = []
    for text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if "train.py" in line:
                words = shlex.split(line, comments=True)
                words = [part for word in words for part in (shlex.split(word) if "train.py " in word else [word])]
                start = next(number for number, word in enumerate(words) if word.endswith("train.py"))
                found.append(words[start + 1 :])
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a reader stands in, with the files that the pages tell to write; new configurations are found by name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(configurations, "SHIPPED", tmp_path / "configs")
    main(["init", "my_photos"])
    (tmp_path / "my_module.py").write_text(block("python", "class Forgetful") + block("python", "class AscentStep"))
    for written in (("yaml", "my_module.Forgetful"), ("python", "class CappedAscent"), ("yaml", "CappedAscent")):
        _write(tmp_path, block(*written))
    monkeypatch.syspath_prepend(str(tmp_path))
    here = str(tmp_path / "salun_lightning" / "methods")
    monkeypatch.setattr(salun_lightning.methods, "__path__", [*salun_lightning.methods.__path__, here])
    return tmp_path  # what is imported from here stays imported: the parser looks for every method that there is in its module


def _write(folder: Path, text: str) -> None:
    """A block whose first line is a comment with the name of its file."""
    name, _, content = text.partition("\n")
    path = folder / name.removeprefix("# ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 130


def test_every_link_leads_somewhere() -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(
            r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
        )
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = [
        (name, target)
        for name, text in PAGES.items()
        for target in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, flags=re.MULTILINE)
        for target in target
        if target and not target.startswith("https://")
    ]
    assert len(links) > 30
    for name, target in links:
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), f"{name}: {target}"
    linked = {
        (ROOT / name).parent.joinpath(target.partition("#")[0]).resolve() for name, target in links if name == "README.md"
    }
    assert {path for path in (ROOT / "docs").glob("*.md") if path not in linked} == set()


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?<![\w/])((?:configs|docs|tests|salun_lightning|\.ci|\.github)/[\w./-]*\w)(?![\w*{<])", TEXT))
    tasks = "|".join(path.stem for path in configurations.SHIPPED.glob("*.yaml"))
    shipped = set(re.findall(rf"-c ([\w/]+)(?=[\s`])|`((?:method|{tasks})(?:/[\w/]+)?)`", TEXT))
    found = {"".join(pair) for pair in shipped}
    assert len(named) + len(found) > 40
    shown = {text.splitlines()[0].removeprefix("# ") for language in ("python", "yaml") for text in blocks(language)}
    assert [path for path in sorted(named - shown) if not (ROOT / path).exists()] == []
    own = {str(Path(path).relative_to("configs").with_suffix("")) for path in shown if path.startswith("configs/")}
    assert [name for name in sorted(found - own) if not (find(name) or find(name, "compare"))] == []


def test_the_methods_that_the_readme_names_are_there() -> None:
    (section,) = re.findall(r"^## Methods\n(.*?)^## ", PAGES["README.md"], flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`(\w+)`", section)
    assert len(named) >= 3
    assert all(issubclass(getattr(salun_lightning.methods, name), Method) for name in named)


@pytest.mark.filterwarnings("ignore:.*`train_dataloader` yielded None")
def test_reuse_in_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("python", "import SaliencyMasking")
    exec(compile(code, "README.md", "exec"), {})
    assert "SaliencyMask(33 of 66 weights in 2 tensors may move)\n0.0\n" in capsys.readouterr().out
    assert SaliencyMask.load("mask.safetensors").num_kept == 33
    assert len([line for line in code.splitlines() if line]) <= 12


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:Total length of `(CombinedLoader|DataLoader)`")
def test_unlearning_in_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"task": Theirs(), "train": Dictionaries(), "test": Dictionaries()}
    exec(compile(block("python", "Unlearn("), "own_method.md", "exec"), names)
    assert names["trainer"].current_epoch == 2
    assert names["task"].seen[0].keys() == {"image", "label"}
    assert not same(weights(names["task"].network), weights(Theirs().network))


def test_a_concept_is_forgotten_in_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block("python", "small_text_to_image"), "text_to_image.md", "exec"), names)
    assert (tmp_path / "without_sevens" / "model_index.json").is_file()
    assert names["trainer"].global_step == 2
    trained = names["model"].network.state_dict()
    names["small_text_to_image"]("a an beside in ink zero one two three four five six seven eight nine").save_pretrained(
        tmp_path / "my_pipeline"
    )
    exec(compile(block("python", "Patch.between"), "text_to_image.md", "exec"), names)
    unet = names["DiffusionPipeline"].from_pretrained("my_pipeline").unet
    assert same(names["before"].state_dict(), unet.state_dict())
    Patch.load("seven.safetensors").apply(unet)
    assert same(unet.state_dict(), trained)


def test_own_methods(folder: Path) -> None:
    """In a file of the reader's own, and as the two files of a contribution, which is found by its name."""
    quick = [*QUICK, "--trainer.limit_val_batches=0", "--trainer.limit_train_batches=2"]
    main(["fit", "-c", "digits", "-c", "digits/original", *quick])
    import_module("salun_lightning.methods.capped_ascent")
    methods = {"Forgetful": "forgetful.yaml", "CappedAscent": "method/capped_ascent", "AscentStep": "my_module.AscentStep"}
    orders = {}
    for name, mark in methods.items():
        (words,) = (words for words in commands() if mark in words)
        cli = main([*words, *quick])
        assert type(cli.model.method).__name__ == name
        orders[name] = cli.datamodule.train_dataloader().sampler.order
    assert orders == {"Forgetful": "paired", "CappedAscent": "paired", "AscentStep": "forget"}
    runs = {path.name: path / "checkpoints" / "last.ckpt" for path in (folder / "runs" / "digits").iterdir()}
    assert runs.keys() == {"original", "forgetful", "capped_ascent", "step"}
    before, after = (read_checkpoint(runs[name])["state_dict"] for name in ("original", "step"))
    assert cli.trainer.global_step == 1
    cli.model.eval()
    losses = []
    for state in (before, after):
        cli.model.load_state_dict(state)
        with torch.no_grad():
            losses.append(sum(cli.model.losses(samples).sum() for samples in cli.datamodule.set_dataloader("forget")))
    assert losses[0] < losses[1]
    assert len(block("yaml", "CappedAscent").splitlines()) <= 8


def test_the_contributed_method_passes_the_linter() -> None:
    code = block("python", "class CappedAscent")
    name = code.splitlines()[0].removeprefix("# ")
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--stdin-filename", name, "-"]
        found = subprocess.run(ruff, cwd=ROOT, input=code, capture_output=True, check=False, text=True)
        assert found.returncode == 0, found.stdout


def test_the_test_of_the_contributed_method(folder: Path) -> None:
    import_module("salun_lightning.methods.capped_ascent")
    names: dict[str, Any] = {}
    exec(block("python", "def test_capped_ascent"), names)
    names["test_capped_ascent_stops_at_its_cap"]()


def test_every_block_is_tried_by_a_test() -> None:
    """The marks by which the tests here and in test_recipes.py find their blocks; a new block needs a new test."""
    tried = {
        "python": (
            *("import SaliencyMasking", "def forget_loss", "export_state_dict", "class Forgetful", "class AscentStep"),
            *("CappedAscent", "Predictions.load", "Unlearn(", "small_text_to_image", "Patch.between"),
        ),
        "yaml": ("my_module.Forgetful", "data.forget: {", "data.wrong_labels", "CappedAscent"),
        "toml": ("entry-points",),
        "sh": ("train.py", "pip install -e", "pytest", ".ci/run", "memorised.py"),
    }
    languages = re.findall(r"^```(\w+)$", TEXT, flags=re.MULTILINE)
    assert set(languages) == set(tried)
    for language, marks in tried.items():
        assert [text for text in blocks(language) if not any(mark in text for mark in marks)] == []
        assert len(blocks(language)) == languages.count(language)


def test_requests() -> None:
    made: list[Any] = []
    for line in block("yaml", "data.forget: {").splitlines():
        entry = yaml.safe_load(line)["data.forget"]
        made.append(
            {c.__name__: c for c in (ForgetClasses, ForgetIndices, ForgetRandom)}[entry["class_path"]](**entry["init_args"])
        )
    assert [type(request) for request in made] == [ForgetRandom, ForgetClasses, ForgetIndices]
    assert len(made[0].indices(torch.zeros(50, dtype=torch.int64), ["cat"], torch.arange(50))) == 5
    wrong = yaml.safe_load(block("yaml", "data.wrong_labels"))
    assert wrong.pop("data.forget") is None
    true = torch.zeros(50, dtype=torch.int64)
    assert WrongLabels(**wrong.pop("data.wrong_labels")).labels(true, ["cat", "dog"], torch.arange(50)).sum() == 5
    assert not wrong


def test_the_entry_point_is_of_the_group_and_names_a_method(folder: Path) -> None:
    ((group, offers),) = tomllib.loads(block("toml", "entry-points"))["project"]["entry-points"].items()
    assert group == GROUP
    for name, place in offers.items():
        module, _, method = place.partition(":")
        assert issubclass(getattr(import_module(module), method), Method)
        assert name == method


class _Parsed(Exception):
    """Raised in the place of making what a command asks for."""


def _stop(cli: UnlearningCLI) -> None:
    raise _Parsed(cli)


def test_every_command_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning's commands are given is parsed to the end; of ``compare``, the names of options and rows."""
    import_module("salun_lightning.methods.capped_ascent")
    monkeypatch.setattr(UnlearningCLI, "instantiate_classes", _stop)
    with pytest.raises(_Parsed) as stopped:
        main(["fit", "-c", "digits", "-c", "method/salun"])
    cli = stopped.value.args[0]  # its parser serves all, which saves half a second each time
    parsed = [words for words in commands() if words[0] in {"fit", "validate", "test", "predict"}]
    assert len(parsed) >= 10
    for given in parsed:
        words, _ = located(given)
        if "--model.help" in words:
            with pytest.raises(SystemExit) as ended:
                cli.parse_arguments(cli.parser, words)
            assert ended.value.code == 0
        else:
            cli.parse_arguments(cli.parser, words)
            assert cli.config[words[0]].model.class_path.startswith("salun_lightning.")
    compared = [words for words in commands() if words[0] == "compare"]
    others = [words for words in commands() if words[0] in {"configs", "init"}]  # init: see test_recipes
    assert sorted(words[0] for words in others) == ["configs", "init"]
    assert len(compared) >= 6
    searched = [words for words in commands() if words[0] == "search"]
    assert len(parsed) + len(compared) + len(others) + len(searched) == len(commands())
    for words in searched:
        monkeypatch.setattr(search_command, "search", lambda **options: options)
        options = main(words)
        assert options["config"]
        assert all(find(name, "compare") for name in options["config"])
        assert all(find(name, "method") for name in options["methods"])
    for given in compared:
        words = given[: given.index("--")] if "--" in given else given  # behind it are options of fit
        named = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
        assert named <= compare.__annotations__.keys() | {"config"}
        _, files = located(words, "compare")
        assert files
        rows = {name for file in files for name in yaml.safe_load(file.read_text()).get("rows", {})}
        assert rows
        if "--only" in words:
            only = words[words.index("--only") + 1]
            assert only == "$row" or only.lower() in {row.lower() for row in rows}


def test_the_loop_over_rows_names_them_all() -> None:
    comparison = yaml.safe_load((ROOT / "configs/compare/cifar10.yaml").read_text())
    loop = re.search(r"for row in ([\w ]+);", TEXT)
    assert loop is not None
    assert set(loop[1].split()) == set(comparison["rows"]) - {"original"}


def test_the_two_commands_install_and_run() -> None:
    main_job, tests = (text.strip() for text in blocks("sh", PAGES["README.md"])[:2])
    install, job = main_job.rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -e ."
    assert job == ".venv/bin/python train.py compare -c digits"
    assert (
        tests
        == "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2 --dist loadfile"
    )
