"""Whatever is wrong on the command line is said in one sentence, and the exit status is not 0."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import salun_lightning.lightning_cli  # noqa: F401  # Lightning's logger keeps the stderr of its first import
from salun_lightning.cli import console
from tests.bad_input_more import CASES as MORE
from tests.bad_input_more import COMPARE, ORIGINAL, SALUN, SHORT, write_files

ROOT = Path(__file__).parents[1]
FILES = {"empty.yaml": "", "list.yaml": "- 1\n", "syntax.yaml": "a: 1\nb: [1,\nc: }", "junk.ckpt": "junk"}
FILES |= {"no_class.yaml": "model: {init_args: {channels_last: true}}\n"}
FILES |= {"nan.yaml": "model: {init_args: {optimizer: {init_args: {lr: .nan}}}}\n"}
# {files} is the folder of these files
CASES = [
    ("command", ["fitt"], "There is no command 'fitt'"),
    ("no configuration", ["fit"], "Nothing is given for data, model. Name a configuration file"),
    ("no such file", ["fit", "--config=nowhere.yaml"], "There is no configuration file"),
    ("folder", ["fit", "--config=configs/digits"], "is a folder. Give a configuration file"),
    ("empty file", ["fit", "--config={files}/empty.yaml"], "empty.yaml' holds no options"),
    ("list in file", ["fit", "--config={files}/list.yaml"], "list.yaml' holds no options"),
    ("not yaml", ["fit", "--config={files}/syntax.yaml"], "syntax.yaml', line 3, is not YAML"),
    ("no class", ["fit", "--config={files}/no_class.yaml"], "--model names no class. Give its class_path"),
    ("no value", ["fit", "--config"], "--config needs a value"),
    ("unknown option", ["fit", SALUN, "--nonsense=1"], "There is no option --nonsense=1. See `python train.py fit --help`"),
    ("unknown word", ["fit", SALUN, "nonsense"], "There is no option nonsense"),
    ("model option", ["fit", SALUN, "--model.methud=X"], "salun_lightning.ImageClassifier has no option 'methud'"),
    ("data option", ["fit", SALUN, "--data.foo=2"], "salun_lightning.DigitsDataModule has no option 'foo'"),
    ("network option", ["fit", SALUN, "--model.network.foo=1"], "salun_lightning.SmallResNet has no option 'foo'"),
    ("epochs", ["fit", SALUN, "--trainer.max_epochs=many"], "--trainer.max_epochs takes a whole number, not 'many'"),
    ("precision", ["fit", SALUN, "--trainer.precision=bf17"], "'bf16', not 'bf17'"),
    ("no devices", ["fit", SALUN, "--trainer.accelerator=cpu", "--trainer.devices=0"], "--trainer.devices 0 is no number"),
    ("accelerator", ["fit", SALUN, "--trainer.accelerator=quantum"], "invalid accelerator name"),
    ("strategy", ["fit", SALUN, "--trainer.strategy=ddpp"], "invalid strategy name"),
    ("clipping", ["fit", SALUN, "--trainer.gradient_clip_val=abc"], "--trainer.gradient_clip_val takes a number, not 'abc'"),
    ("ratio", ["fit", SALUN, "--saliency.ratio=1.2"], "ratio must lie between 0 (nothing may move) and 1"),
    ("ratio type", ["fit", SALUN, "--saliency.ratio=half"], "--saliency.ratio takes a number, not 'half'"),
    ("ratio and mask", ["fit", SALUN, "--saliency.mask=m.safetensors"], "takes either ratio"),
    ("soft ratio", ["fit", SALUN, "--saliency=SoftMasking", "--saliency.ratio=1.2"], "ratio of SoftMasking must lie between 0"),
    (
        "soft ratio type",
        ["fit", SALUN, "--saliency=SoftMasking", "--saliency.ratio=half"],
        "--saliency.ratio takes a number, not 'half'",
    ),
    ("soft option", ["fit", SALUN, "--saliency=SoftMasking", "--saliency.score=snip"], "SoftMasking has no option 'score'"),
    ("score", ["fit", SALUN, "--saliency.score=foo"], "--saliency.score takes one of 'gradient'"),
    ("model class", ["fit", SALUN, "--model=Nowhere"], "--model: there is neither a class nor a file called 'Nowhere'"),
    ("method module", ["fit", SALUN, "--model.method=mine.Own"], "there is no module 'mine' for 'mine.Own'"),
    ("method kind", ["fit", SALUN, "--model.method=torch.nn.Linear"], "'torch.nn.Linear' is not a Method"),
    (
        "network needs",
        ["fit", SALUN, "--model.network=torch.nn.Linear"],
        "--model.network: torch.nn.Linear needs in_features, out_features",
    ),
    ("network file", ["fit", SALUN, "--model.network=nowhere.yaml"], "--model.network: there is no file 'nowhere.yaml'"),
    ("optimizer", ["fit", SALUN, "--model.optimizer=SGDD"], "neither a class nor a file called 'SGDD'"),
    ("rate type", ["fit", SALUN, "--model.optimizer.lr=fast"], "--model.optimizer.lr takes a number, not 'fast'."),
    ("scheduler needs", ["fit", SALUN, "--model.lr_scheduler=CosineAnnealingLR"], "CosineAnnealingLR needs T_max"),
    ("data file", ["fit", SALUN, "--data=nowhere.yaml"], "--data: there is no file 'nowhere.yaml'"),
    ("request", ["fit", SALUN, "--data.forget=ForgetCat"], "neither a class nor a file called 'ForgetCat'"),
    ("fraction", ["fit", SALUN, "--data.forget.fraction=7"], "must lie between 0 and 1, got 7.0"),
    ("fraction and count", ["fit", SALUN, "--data.forget.count=3"], "ForgetRandom takes either fraction or count"),
    ("batch size", ["fit", SALUN, "--data.batch_size=0"], "batch_size must be positive, got 0"),
    ("seed", ["fit", SALUN, "--seed_everything=-1"], "--seed_everything takes a whole number from 0"),
    ("checkpoint", ["fit", SALUN, "--ckpt_path=nowhere.ckpt"], "There is no checkpoint at 'nowhere.ckpt'"),
    ("checkpoint folder", ["fit", SALUN, "--ckpt_path={files}"], "' is a folder. Give the checkpoint file in it"),
    ("damaged checkpoint", ["fit", ORIGINAL, "--ckpt_path={files}/junk.ckpt"], "junk.ckpt' cannot be read as a checkpoint"),
    ("code in checkpoints", ["fit", ORIGINAL, "--weights_only=false"], "--weights_only false would execute"),
    ("resume the original", ["fit", SALUN, "--ckpt_path=original"], "What fit starts from is given with --model.original"),
    ("original", ["fit", SALUN, "--model.original=nowhere.ckpt"], "There is no model at 'nowhere.ckpt'"),
    ("random weights", ["fit", SALUN, "--model.original=null"], "RandomLabel would unlearn random weights"),
    ("rate", ["fit", ORIGINAL, "--config={files}/nan.yaml"], "The learning rate is nan. Give a finite number"),
    ("test what", ["test", SALUN], "It is not said which model to test"),
    ("validate what", ["validate", SALUN], "It is not said which model to validate"),
    ("predict what", ["predict", SALUN], "It is not said which model to predict"),
    ("no original", ["test", ORIGINAL, "--ckpt_path=original"], "There is no original model"),
    ("no last", ["test", ORIGINAL, "--ckpt_path=last"], "There is no checkpoint at "),
    (
        "few outputs",
        ["fit", ORIGINAL, "--model.network.num_classes=3"],
        "The network has 3 outputs, but the data has 10 classes",
    ),
    ("channels", ["fit", ORIGINAL, "--model.network.in_channels=3"], "The network takes images of 3 channels"),
    ("row", ["compare", COMPARE, "--only=foo"], "There is no row 'foo'"),
    ("seeds", ["compare", COMPARE, "--seeds=abc"], "--seeds takes a whole number or a list, not 'abc'"),
    ("compare needs", ["compare"], "Nothing is given for rows, out, seeds"),
    ("compare of fit", ["compare", SALUN], "which this command does not know"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    write_files(folder)
    return folder


@pytest.fixture
def run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command line as a shell does; the exit status, and what stands on stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(arguments: list[str]) -> tuple[int, str]:
        words = [part.replace("{files}", str(files)) for word in arguments for part in SHORT.get(word, [word])]
        if arguments[0] in {"fit", "test"} and SHORT.keys() & set(arguments[1:2]):
            words[3:3] = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
            words[3:3] = [f"--trainer.default_root_dir={tmp_path}/run", "--trainer.max_epochs=1"]
        return console(words), capsys.readouterr().err

    return run


@pytest.mark.parametrize(("arguments", "said"), [pytest.param(*case[1:], id=case[0]) for case in CASES + MORE])
def test_bad_input_gets_one_sentence(arguments: list[str], said: str, run: Callable[..., tuple[int, str]]) -> None:
    status, shown = run(arguments)
    last = shown.strip().splitlines()[-1]
    assert status in {1, 2}
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in shown


def test_there_are_as_many_cases_as_promised_each_once(files: Path) -> None:
    assert len({case[0] for case in CASES + MORE}) == len(CASES + MORE) >= 200
    assert not (files / "harm").exists()


def test_debug_shows_where(run: Callable[..., tuple[int, str]]) -> None:
    status, shown = run(["--debug", "fit", SALUN, "--data.batch_size=0"])
    assert status == 1
    assert "Traceback" in shown
    assert "error: batch_size must be positive" in shown.splitlines()[-1]
