"""From labelled text and a pretrained model to an artefact."""

from lexmill.fit.config import DataConfig, FitConfig
from lexmill.fit.fit import FitResult, Watch, fit
from lexmill.fit.model import model_directory

__all__ = ["DataConfig", "FitConfig", "FitResult", "Watch", "fit", "model_directory"]
