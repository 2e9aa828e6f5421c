"""Influence functions: from a trained model to attribution scores."""

from hessops.influence.bilinear import BilinearForm, LowRankBilinearForm
from hessops.influence.calculators import SequentialInfluenceCalculator
from hessops.influence.converter import TorchNumpyConverter
from hessops.influence.dask import DaskInfluenceCalculator
from hessops.influence.dask_dataset import torch_dataset_to_dask_array
from hessops.influence.ekfac import EkfacInfluence
from hessops.influence.fitted import FittedBlock, FittedModel, TrainingData
from hessops.influence.gradients import GradientProvider
from hessops.influence.lazy import InfluenceChunk, LazyFactors, LazyInfluences, TopInfluences
from hessops.influence.memory import MemoryEstimate
from hessops.influence.model import InfluenceFunctionModel
from hessops.influence.models import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    Influence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from hessops.influence.modes import BlockMode, InfluenceMode, SecondOrderMode
from hessops.operators.damping import Damping

__all__ = [
    "ArnoldiInfluence",
    "BilinearForm",
    "BlockMode",
    "CgInfluence",
    "Damping",
    "DaskInfluenceCalculator",
    "DirectInfluence",
    "EkfacInfluence",
    "FittedBlock",
    "FittedModel",
    "GradientProvider",
    "Influence",
    "InfluenceChunk",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "LazyFactors",
    "LazyInfluences",
    "LissaInfluence",
    "LowRankBilinearForm",
    "MemoryEstimate",
    "NystroemSketchInfluence",
    "SecondOrderMode",
    "SequentialInfluenceCalculator",
    "TopInfluences",
    "TorchNumpyConverter",
    "TrainingData",
    "torch_dataset_to_dask_array",
]
