"""What is forgotten, and the loaders. Knows nothing of models, but that a pipeline may be asked for images."""

from salun_lightning.data.augment import RandomCropFlip
from salun_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from salun_lightning.data.concepts import ConceptDataModule
from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.digits import DigitPromptsDataModule, DigitsDataModule
from salun_lightning.data.drawn import DrawnImages
from salun_lightning.data.forget import ForgetClasses, ForgetIndices, ForgetRandom, ForgetRequest
from salun_lightning.data.forget_concepts import ForgetConcepts
from salun_lightning.data.image_folder import ImageFolderDataModule
from salun_lightning.data.order import Order, epoch_seed, run_seed
from salun_lightning.data.samples import ImageTensors, Samples, joined
from salun_lightning.data.stl10 import STL10DataModule
from salun_lightning.data.svhn import SVHNDataModule
from salun_lightning.data.wrong_labels import WrongLabels

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ConceptDataModule",
    "DigitPromptsDataModule",
    "DigitsDataModule",
    "DrawnImages",
    "ForgetClasses",
    "ForgetConcepts",
    "ForgetIndices",
    "ForgetRandom",
    "ForgetRequest",
    "ForgetRetainDataModule",
    "ImageFolderDataModule",
    "ImageTensors",
    "Order",
    "RandomCropFlip",
    "STL10DataModule",
    "SVHNDataModule",
    "Samples",
    "Sources",
    "WrongLabels",
    "epoch_seed",
    "joined",
    "run_seed",
]
