"""The methods of preference training, by name: their machinery is in `base`, their classes in the modules beside it."""

from __future__ import annotations

from bfpo.objective.base import (
    METHODS,
    Beside,
    Method,
    PairLoss,
    ReadsBeside,
    Setting,
    check_number,
    get_method,
    make_method,
    method_settings,
    register,
    setting,
)
from bfpo.objective.pairwise import (
    BFPO,
    BSO,
    IPO,
    MODPO,
    BSOWithPhi,
    BSOWithSBA,
    DPOHelpful,
    DPOMix,
    DPOSafe,
    DPOSafeFirst,
    LinearSum,
    RobustDPO,
    SafeDPO,
)
from bfpo.objective.pointwise import KLDO, KTO
from bfpo.objective.rivals import BalancedDPO, CatDPO, HyPO

__all__ = [
    "BFPO",
    "BSO",
    "IPO",
    "KLDO",
    "KTO",
    "METHODS",
    "MODPO",
    "BSOWithPhi",
    "BSOWithSBA",
    "BalancedDPO",
    "Beside",
    "CatDPO",
    "DPOHelpful",
    "DPOMix",
    "DPOSafe",
    "DPOSafeFirst",
    "HyPO",
    "LinearSum",
    "Method",
    "PairLoss",
    "ReadsBeside",
    "RobustDPO",
    "SafeDPO",
    "Setting",
    "check_number",
    "get_method",
    "make_method",
    "method_settings",
    "register",
    "setting",
]
