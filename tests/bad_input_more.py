"""What is wrong with data, networks, methods, masks and settings, and what is said of it; see ``test_bad_input``."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from salun_lightning import SmallResNet

SALUN, ORIGINAL, COMPARE = "--config=SALUN", "--config=ORIGINAL", "--config=digits"
SHORT = {  # what they stand for
    SALUN: ["--config=configs/digits.yaml", "--config=digits/random_tenth", "--config=configs/method/salun.yaml"],
    ORIGINAL: ["--config=configs/digits.yaml", "--config=digits/random_tenth", "--config=configs/digits/original.yaml"],
}
INDICES = "--data.forget=ForgetIndices"
IMAGES = ["fit", ORIGINAL, "--data=ImageFolderDataModule", "--data.image_size=8"]
MASK = ["fit", SALUN, "--saliency.ratio=null", "--model.original={files}/original.pt"]
COMPARED = ["compare", COMPARE, "--out={files}/out"]


def fit(*options: str) -> list[str]:
    return ["fit", SALUN, *options]


def data(*options: str) -> list[str]:
    return ["fit", ORIGINAL, *options]


def drawn(count: str) -> str:
    return f'--data.forget={{"class_path": "ForgetRandom", "init_args": {{"fraction": null, "count": {count}}}}}'


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_files(folder: Path) -> None:
    """The files that the cases name."""
    texts = {
        "tab.yaml": "model:\n\tnetwork: 1\n",
        "junk.safetensors": "junk",
        "floats.txt": "1\n2.5\n",
        "words.txt": "1\ncat\n",
        "negative.txt": "-1\n",
        "under.txt": "1_0\n",
        "plus.txt": "+5\n",
        "huge.txt": "9" * 20,
        "none.txt": "",
        "trainer.yaml": "trainer: {max_epoch: 3}\n",
        "top.yaml": "modell: 1\n",
        "mask.yaml": "saliency: {ratio: .nan}\n",
        "row.yaml": "task: digits\nseeds: 1\nrows: {original: digits/original, SalUn: [method/saloon]}\n",
        "option.yaml": "seeds: 1\nrows: {original: {config: digits, saliency: 0.5}}\n",
        "taken/photos.yaml": "",
    }
    (folder / "taken").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "utf16.txt").write_text("1\n2\n", encoding="utf-16")
    (folder / "empty").mkdir()
    save_file({"weight": torch.ones(3)}, folder / "floats.safetensors")
    save_file({"fc.weight": torch.ones(3, dtype=torch.uint8)}, folder / "other.safetensors")
    torch.save({"a": Touch(folder / "harm")}, folder / "evil.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, folder / "other.ckpt")
    torch.save({"epoch": 3}, folder / "no_weights.ckpt")
    torch.save(SmallResNet(10).state_dict(), folder / "original.pt")
    torch.save(SmallResNet(10, width=8).state_dict(), folder / "narrow.pt")
    _write_images(folder)


def _write_images(folder: Path) -> None:
    image = Image.new("L", (8, 8))
    for root, paths in {
        "empty_class": ["train/a/1.png", "train/b/1.png"],
        "truncated": ["train/a/1.png", "train/a/bad.png", "train/b/1.png"],
        "text": ["train/a/1.png", "train/a/bad.png", "train/b/1.png"],
        "other_classes": ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/z/1.png"],
        "hidden": ["train/.git/1.png"],
    }.items():
        for path in paths:
            (folder / root / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / root / path)
    (folder / "flat" / "train").mkdir(parents=True)
    (folder / "empty_class" / "train" / "c").mkdir()
    bad = folder / "truncated" / "train" / "a" / "bad.png"
    bad.write_bytes(bad.read_bytes()[:40])
    (folder / "text" / "train" / "a" / "bad.png").write_text("no image")


CASES = [
    ("indices bools", data(INDICES, "--data.forget.positions=[false,false,true]"), "mask"),
    ("indices floats", data(INDICES, "--data.forget.positions=[1.9,2.2]"), "1.9"),
    ("indices mixed", data(INDICES, "--data.forget.positions=[1,true]"), "True"),
    ("indices text", data(INDICES, "--data.forget.positions=[a,b]"), "'a'"),
    ("indices negative", data(INDICES, "--data.forget.positions=[-1]"), "-1"),
    ("indices beyond", data(INDICES, "--data.forget.positions=[99999]"), "Index 99999 is out of range"),
    ("indices huge", data(INDICES, "--data.forget.positions=[99999999999999999999999]"), "out of range"),
    ("indices none", data(INDICES, "--data.forget.positions=[]"), "forget set is empty"),
    ("indices null", data(INDICES, "--data.forget.positions=null"), "positions"),
    ("indices missing", data(INDICES), "positions"),
    ("indices no file", data(INDICES, "--data.forget.positions=nowhere.txt"), "There is no file of positions"),
    ("indices folder", data(INDICES, "--data.forget.positions={files}"), "There is no file of positions"),
    ("indices file floats", data(INDICES, "--data.forget.positions={files}/floats.txt"), "Line 2"),
    ("indices file words", data(INDICES, "--data.forget.positions={files}/words.txt"), "Line 2"),
    ("indices file negative", data(INDICES, "--data.forget.positions={files}/negative.txt"), "Line 1"),
    ("indices file underscore", data(INDICES, "--data.forget.positions={files}/under.txt"), "Line 1"),
    ("indices file plus", data(INDICES, "--data.forget.positions={files}/plus.txt"), "Line 1"),
    ("indices file huge", data(INDICES, "--data.forget.positions={files}/huge.txt"), "out of range"),
    ("indices file empty", data(INDICES, "--data.forget.positions={files}/none.txt"), "forget set is empty"),
    ("indices file utf16", data(INDICES, "--data.forget.positions={files}/utf16.txt"), "not a text file"),
    ("indices file binary", data(INDICES, "--data.forget.positions={files}/binary.txt"), "not a text file"),
    ("fraction nan", data("--data.forget.fraction=.nan"), "between 0 and 1"),
    ("fraction 0", data("--data.forget.fraction=0"), "between 0 and 1"),
    ("fraction 1", data("--data.forget.fraction=1"), "between 0 and 1"),
    ("fraction text", data("--data.forget.fraction=tenth"), "'tenth'"),
    ("fraction bool", data("--data.forget.fraction=true"), "rue"),
    ("fraction null", data("--data.forget.fraction=null"), "cannot be null by itself. Give all of it: --data.forget"),
    ("fraction tiny", data("--data.forget.fraction=0.0001"), "forget set is empty"),
    ("count 0", data(drawn("0")), "positive"),
    ("count many", data(drawn("5000")), "there are only"),
    ("count float", data(drawn("2.5")), "2.5"),
    ("count all", data(drawn("1299")), "retain set is empty"),
    ("seed negative", data("--data.forget.seed=-3"), "seed"),
    ("seed float", data("--data.forget.seed=1.5"), "1.5"),
    ("seed huge", data("--data.forget.seed=99999999999"), "seed"),
    ("within unknown", data("--data.forget.within_class=cat"), "There is no class 'cat'"),
    ("class unknown", data("--data.forget=ForgetClasses", "--data.forget.names=[cat]"), "There is no class 'cat'"),
    ("class bool", data("--data.forget=ForgetClasses", "--data.forget.names=[true]"), "rue"),
    ("class beyond", data("--data.forget=ForgetClasses", "--data.forget.names=[10]"), "There is no class '10'"),
    ("class float", data("--data.forget=ForgetClasses", "--data.forget.names=[1.5]"), "1.5"),
    ("class none", data("--data.forget=ForgetClasses", "--data.forget.names=[]"), "empty"),
    ("class all", data("--data.forget=ForgetClasses", "--data.forget.names=[0,1,2,3,4,5,6,7,8,9]"), "retain set is empty"),
    ("val 1", data("--data.val_fraction=1"), "val_fraction must be"),
    ("val negative", data("--data.val_fraction=-0.1"), "val_fraction must be"),
    ("val nan", data("--data.val_fraction=.nan"), "val_fraction must be"),
    ("val text", data("--data.val_fraction=tenth"), "'tenth'"),
    ("split seed", data("--data.split_seed=-1"), "split_seed must be a whole number"),
    ("batch negative", data("--data.batch_size=-4"), "batch_size must be positive"),
    ("batch float", data("--data.batch_size=1.5"), "1.5"),
    ("order", data("--data.order=shuffled"), "--data.order takes one of"),
    ("workers negative", data("--data.num_workers=-1"), "num_workers must not be negative"),
    ("folder root missing", ["fit", "--data=ImageFolderDataModule", "--data.forget=ForgetRandom"], "root"),
    ("folder no root", [*IMAGES, "--data.root=nowhere"], "There is no folder 'nowhere"),
    ("folder empty root", [*IMAGES, "--data.root={files}/empty"], "There is no folder"),
    ("folder flat", [*IMAGES, "--data.root={files}/flat"], "flat"),
    ("folder hidden", [*IMAGES, "--data.root={files}/hidden"], "hidden"),
    ("folder empty class", [*IMAGES, "--data.root={files}/empty_class"], "empty_class"),
    ("folder truncated", [*IMAGES, "--data.root={files}/truncated"], "bad.png"),
    ("folder text", [*IMAGES, "--data.root={files}/text"], "bad.png' cannot be read: it is not an image"),
    ("folder other classes", [*IMAGES, "--data.root={files}/other_classes"], "different classes: b, z"),
    ("folder size", [*IMAGES, "--data.root={files}/empty_class", "--data.image_size=0"], "image_size must be positive"),
    ("network classes", data("--model.network.num_classes=0"), "num_classes must be positive, got 0"),
    ("network width", data("--model.network.width=0"), "width must be positive, got 0"),
    ("network width text", data("--model.network.width=wide"), "'wide'"),
    ("network mean", data("--model.network.mean=[0.5,0.5]"), "one finite number for each channel"),
    (
        "network channels",
        data("--model.network.mean=[0.5,0.5]", "--model.network.std=[0.5,0.5]"),
        "mean and std are of 2 channels",
    ),
    ("network std 0", data("--model.network.std=[0.0]"), "std is positive"),
    (
        "torchvision name",
        data("--model.network=TorchvisionClassifier", "--model.network.name=resnet19", "--model.network.num_classes=10"),
        "torchvision has no classifier 'resnet19'",
    ),
    (
        "torchvision stem",
        data(
            "--model.network=TorchvisionClassifier",
            "--model.network.name=vgg11",
            "--model.network.num_classes=10",
            "--model.network.cifar_stem=true",
        ),
        "cifar_stem",
    ),
    ("torchvision needs", data("--model.network=TorchvisionClassifier"), "needs"),
    ("network none", ["fit", ORIGINAL, "--model=ImageClassifier", "--model.network=null"], "network"),
    ("channels last", data("--model.channels_last=maybe"), "'maybe'"),
    ("method unknown", fit("--model.method=Forget"), "neither a class nor a file called 'Forget'"),
    ("alpha", fit("--model.method=NegGradPlus", "--model.method.alpha=2"), "alpha"),
    ("alpha text", fit("--model.method=NegGradPlus", "--model.method.alpha=x"), "'x'"),
    (
        "diffusion method",
        fit("--model.method=Remap", "--model.original={files}/original.pt"),
        "Remap is a method for diffusion models",
    ),
    ("diffusion method ESD", fit("--model.method=ESD", "--model.original={files}/original.pt"), "ESD"),
    ("order of method", fit("--model.method=RandomLabel", "--model.method.order=both"), "order"),
    ("finetune order", data("--model.method.order=forget"), "order"),
    ("original junk", fit("--model.original={files}/junk.ckpt"), "junk.ckpt' cannot be read"),
    ("original evil", fit("--model.original={files}/evil.pt"), "state_dict()"),
    ("original list", fit("--model.original={files}/list.pt"), "holds a list"),
    ("original other", fit("--model.original={files}/other.ckpt"), "does not fit the network"),
    ("original narrow", fit("--model.original={files}/narrow.pt"), "does not fit the network"),
    ("original no weights", fit("--model.original={files}/no_weights.ckpt"), "The checkpoint holds no weights"),
    ("original folder", fit("--model.original={files}/empty"), "not a pipeline directory"),
    ("original safetensors", fit("--model.original={files}/junk.safetensors"), "junk.safetensors' cannot be read"),
    ("original config", fit("--model.original=configs/digits.yaml"), "cannot be read"),
    ("mask missing", [*MASK, "--saliency.mask=nowhere.safetensors"], "There is no saliency mask at 'nowhere.safetensors'"),
    ("mask junk", [*MASK, "--saliency.mask={files}/junk.safetensors"], "cannot be read as a saliency mask"),
    ("mask evil", [*MASK, "--saliency.mask={files}/evil.pt"], "nothing was executed"),
    ("mask floats", [*MASK, "--saliency.mask={files}/floats.safetensors"], "not bool or uint8"),
    ("mask other", [*MASK, "--saliency.mask={files}/other.safetensors"], "belongs to another network"),
    ("mask of a model", [*MASK, "--saliency.mask={files}/original.pt"], "is not a tensor of zeros and ones"),
    ("mask folder", [*MASK, "--saliency.mask={files}"], "There is no saliency mask"),
    ("mask checkpoint", [*MASK, "--saliency.mask={files}/other.ckpt"], "saliency mask"),
    ("neither ratio nor mask", MASK, "takes either ratio"),
    ("ratio negative", fit("--saliency.ratio=-0.1"), "ratio must lie between"),
    ("ratio nan", ["fit", SALUN, "--config={files}/mask.yaml"], "ratio must lie between"),
    ("ratio bool", fit("--saliency.ratio=true"), "rue"),
    ("uncovered", fit("--saliency.uncovered=held"), "--saliency.uncovered takes one of"),
    ("freeze", fit("--saliency.freeze_buffers=sometimes"), "'sometimes'"),
    ("saliency seed", fit("--saliency.seed=x"), "'x'"),
    ("saliency option", fit("--saliency.rate=0.5"), "rate"),
    ("optimizer kind", fit("--model.optimizer=torch.nn.Linear"), "Linear"),
    ("rate infinite", data("--model.optimizer.lr=.inf"), "The learning rate is inf"),
    ("rate negative", data("--model.optimizer.lr=-0.1"), "-0.1"),
    ("momentum", data("--model.optimizer.momentum=-1"), "momentum"),
    ("decay", data("--model.optimizer.weight_decay=-1"), "weight_decay"),
    ("optimizer option", fit("--model.optimizer.betas=1"), "betas"),
    ("scheduler kind", fit("--model.lr_scheduler=torch.nn.Linear"), "Linear"),
    ("lr interval", fit("--model.lr_interval=batch"), "--model.lr_interval takes one of"),
    ("epochs -2", ["fit", ORIGINAL, "--trainer.max_epochs=-5"], "max_epochs"),
    ("steps", data("--trainer.max_steps=abc"), "'abc'"),
    ("accumulate 0", data("--trainer.accumulate_grad_batches=0"), "accumulate"),
    ("accumulate text", data("--trainer.accumulate_grad_batches=x"), "'x'"),
    ("clip algorithm", data("--trainer.gradient_clip_val=1", "--trainer.gradient_clip_algorithm=max"), "max"),
    ("val steps", data("--trainer.val_check_interval=0"), "--trainer.val_check_interval must be positive, got 0"),
    ("clip negative", data("--trainer.gradient_clip_val=-1"), "--trainer.gradient_clip_val must not be negative"),
    ("trainer key", data("--config={files}/trainer.yaml"), "There is no option --trainer.max_epoch"),
    ("val interval", data("--trainer.check_val_every_n_epoch=0"), "check_val_every_n_epoch"),
    ("limit", data("--trainer.limit_train_batches=1.5"), "limit_train_batches"),
    ("nodes", data("--trainer.num_nodes=0"), "num_nodes"),
    ("devices text", data("--trainer.devices=many"), "devices"),
    ("gpu", data("--trainer.accelerator=gpu"), "no GPU"),
    ("overfit", data("--trainer.overfit_batches=2"), "overfit_batches"),
    ("callbacks", data("--trainer.callbacks+=Nowhere"), "Nowhere"),
    ("logger", data("--trainer.logger=Nowhere"), "Nowhere"),
    ("plugins", data("--trainer.plugins=Nowhere"), "Nowhere"),
    ("deepspeed", fit("--trainer.strategy=deepspeed"), "eepSpeed"),
    ("fsdp", fit("--trainer.strategy=fsdp"), "fsdp"),
    ("root is a file", ["fit", ORIGINAL, "--trainer.default_root_dir={files}/empty.yaml"], "empty.yaml"),
    ("tab in yaml", ["fit", "--config={files}/tab.yaml"], "tab.yaml', line 2"),
    ("binary yaml", ["fit", "--config={files}/binary.yaml"], "binary.yaml"),
    ("top key", ["fit", ORIGINAL, "--config={files}/top.yaml"], "modell"),
    ("seed text", ["fit", ORIGINAL, "--seed_everything=x"], "'x'"),
    ("seed huge run", ["fit", ORIGINAL, "--seed_everything=99999999999"], "--seed_everything"),
    ("option twice wrong", ["tests"], "There is no command 'tests'"),
    ("dashes", ["--fit"], "--fit"),
    ("value of bool", data("--trainer.enable_checkpointing=perhaps"), "'perhaps'"),
    ("subcommand option", ["test", ORIGINAL, "--ckpt_path={files}/evil.pt"], "of which nothing was executed"),
    ("test weights", ["test", ORIGINAL, "--ckpt_path={files}/original.pt"], "is not the checkpoint of a run"),
    ("predict missing", ["predict", ORIGINAL, "--ckpt_path=nowhere.ckpt"], "There is no checkpoint at"),
    ("http", ["test", ORIGINAL, "--ckpt_path=http://127.0.0.1:9/x.ckpt"], "127.0.0.1:9"),
    ("compare seeds none", [*COMPARED, "--seeds=[]"], "seed"),
    ("compare seeds twice", [*COMPARED, "--seeds=[1,1]"], "seed"),
    ("compare seeds float", [*COMPARED, "--seeds=[1.5]"], "1.5"),
    ("compare metrics", [*COMPARED, "--metrics=[]"], "metrics"),
    ("compare threads 0", [*COMPARED, "--threads=0"], "threads"),
    ("compare threads text", [*COMPARED, "--threads=all"], "'all'"),
    ("compare reference", [*COMPARED, "--reference=Gold"], "There is no row 'Gold'"),
    ("compare floor", [*COMPARED, "--noise_floor=Gold"], "Gold"),
    ("compare only none", [*COMPARED, "--only=[]"], "only"),
    ("compare option", [*COMPARED, "--row=1"], "ambiguous option: --row=1"),
    ("compare argument", [*COMPARED, "--out={files}/out", "--seeds=1", "--", "--data.foo=1"], "has no option 'foo'"),
    ("compare no file", ["compare", "--config=nowhere.yaml"], "There is no configuration file"),
    ("compare empty", ["compare", "--config={files}/empty.yaml"], "empty.yaml' holds no options"),
    ("compare rows", [*COMPARED, "--rows=3"], "rows"),
    (
        "compare row",
        ["compare", "--config={files}/row.yaml"],
        "There is no configuration 'method/saloon'",
    ),
    ("compare row option", ["compare", "--config={files}/option.yaml"], "saliency"),
    ("compare task", [*COMPARED, "--task=digit"], "There is no configuration 'digit'"),
    ("compare floor negative", [*COMPARED, "--noise_floor=-1"], "'noise_floor' is -1"),
    ("configs option", ["configs", "--all"], "--all"),
    ("init where", ["init"], "Give a folder: `python train.py init FOLDER`"),
    ("init again", ["init", "{files}/taken"], "photos.yaml' is there already"),
    ("init no images", ["init", "{files}/new", "--images=nowhere"], "There is no folder 'nowhere/train'"),
]
