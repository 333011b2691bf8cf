"""Training methods: one paper, one file.

A *method* (:class:`stseg.Method`) is one training: ``stseg.fit(FixMatch(network), labeled, config, unlabeled=...)``.
A *recipe* is several, with labels made in between: ``stseg.SelfTrainer(..., method=STPlusPlus())``.
"""

from stseg.methods.adv_ssl import AdvSSL
from stseg.methods.cct import CCT
from stseg.methods.class_mix import ClassMix
from stseg.methods.cps import CPS
from stseg.methods.cutmix_seg import CutMixSeg
from stseg.methods.dcc import DCC
from stseg.methods.ecs import ECS
from stseg.methods.fixmatch import FixMatch
from stseg.methods.gct import GCT
from stseg.methods.mean_teacher import MeanTeacher
from stseg.methods.registry import create_method, list_methods
from stseg.methods.s4gan import S4GAN
from stseg.methods.s4l import S4L
from stseg.methods.st import ST, Baseline, STPlusPlus
from stseg.methods.supervised import Supervised
from stseg.methods.u2pl import U2PL
from stseg.methods.unimatch import UniMatch
from stseg.methods.unimatch_v2 import UniMatchV2
from stseg.stages.labeling import Labeling
from stseg.stages.recipe import OneStage, Recipe

__all__ = [
    "CCT",
    "CPS",
    "DCC",
    "ECS",
    "GCT",
    "S4GAN",
    "S4L",
    "ST",
    "U2PL",
    "AdvSSL",
    "Baseline",
    "ClassMix",
    "CutMixSeg",
    "FixMatch",
    "Labeling",
    "MeanTeacher",
    "OneStage",
    "Recipe",
    "STPlusPlus",
    "Supervised",
    "UniMatch",
    "UniMatchV2",
    "create_method",
    "list_methods",
]
