"""Influence functions: from a trained model to attribution scores."""

from hessops.influence.bilinear import BilinearForm, LowRankBilinearForm
from hessops.influence.damping import Damping
from hessops.influence.gradients import GradientProvider
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

__all__ = [
    "ArnoldiInfluence",
    "BilinearForm",
    "BlockMode",
    "CgInfluence",
    "Damping",
    "DirectInfluence",
    "GradientProvider",
    "Influence",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "LissaInfluence",
    "LowRankBilinearForm",
    "NystroemSketchInfluence",
    "SecondOrderMode",
]
