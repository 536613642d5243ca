"""Dials of the closed world: label noise, a biased judge, confounds, harm unseen in training, categories, turns.

The oracle stays exact at every setting: a dial changes which training data are drawn and what labels they get, never
what the oracle says of a text. Held-out pairs keep its labels.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from bfpo.core.settings import ConfigPart
from bfpo.world.world import HARMS, WARDS

__all__ = ["NO_DIALS", "Dials"]

Share = Annotated[float, Field(ge=0, le=1)]
Flips = Annotated[float, Field(ge=0, le=0.5)]
_MOST_UNSEEN = 12


class Dials(ConfigPart):
    """What makes the closed world harder; every default leaves it as it is."""

    safety_flips: Flips = Field(default=0.0, description="share of the main stream's safety labels that are flipped")
    order_flips: Flips = Field(
        default=0.0, description="share of the pairs of both streams whose order of helpfulness is reversed"
    )
    missed_harm: Share = Field(
        default=0.0,
        description="a biased judge: share of the harmful combinations whose unsafe answers it labels safe, always; "
        "it calls no safe answer unsafe",
    )
    unseen_wards: int = Field(
        default=0,
        ge=0,
        le=_MOST_UNSEEN,
        description=f"number of the {len(WARDS)} wards that training shows without any rough verb, so that every harm "
        "to them is unseen",
    )
    style_confound: Share = Field(
        default=0.0,
        description="share of the main stream's pairs in which an answer is safe exactly if it declines: the style of "
        "a refusal alone predicts the label",
    )
    length_confound: Share = Field(
        default=0.0, description="share of the pairs of both streams in which the more helpful answer is the longer"
    )
    harm_shares: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        description=f"weights of the categories of harm ({', '.join(HARMS)}) in training, one left out is never seen; "
        "prompts get their category; null = no categories",
    )
    multi_turn: Share = Field(
        default=0.0,
        description="share of the prompts that are a second turn: it refers to the thing of a harmless first one, so "
        "that harm is a combination over turns",
    )

    @model_validator(mode="after")
    def _some_harm(self) -> Dials:
        if unknown := sorted((self.harm_shares or {}).keys() - HARMS.keys()):
            raise ValueError(f"harm_shares: got {unknown[0]!r}; allowed: {', '.join(HARMS)}")
        if self.harm_shares is not None and not sum(self.harm_shares.values()) > 0:
            raise ValueError(f"harm_shares: got {self.harm_shares}; needed: a weight above 0")
        return self

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the dials that are at their default and not given, so that other configs stay as they were."""
        values: dict[str, Any] = serialize(self)
        idle = {name for name, key in Dials.model_fields.items() if getattr(self, name) == key.default}
        return {name: value for name, value in values.items() if name not in idle - self.model_fields_set}

    @property
    def unseen(self) -> frozenset[str]:
        """The wards on which training shows no harm: the last ones of the world's list."""
        return frozenset(list(WARDS)[len(WARDS) - self.unseen_wards :])


NO_DIALS = Dials()
