"""What goes beside a training or a test: writers, and the evaluator of generated images."""

from salun_lightning.callbacks.clip_score import ClipScore
from salun_lightning.callbacks.generation import GenerationEvaluator
from salun_lightning.callbacks.image_writer import ImageWriter
from salun_lightning.callbacks.nudity import NudityCounter
from salun_lightning.callbacks.predictions import PredictionsWriter
from salun_lightning.callbacks.relearning import Relearning
from salun_lightning.callbacks.save_pipeline import SavePipeline

__all__ = [
    "ClipScore",
    "GenerationEvaluator",
    "ImageWriter",
    "NudityCounter",
    "PredictionsWriter",
    "Relearning",
    "SavePipeline",
]
