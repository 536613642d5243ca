"""Config of the red-team loop: a model's own answers to hard prompts, judged, ranked, and made into training pairs."""

from __future__ import annotations

from pydantic import Field, model_validator

from bfpo.config.evaluate import GenerateConfig
from bfpo.config.judges import RankerConfig
from bfpo.config.label import OpinionKeys

__all__ = ["RedteamConfig"]


class RedteamConfig(GenerateConfig, OpinionKeys):
    """`bfpo redteam`: prompts -> completions -> verdicts and order -> pairs, as `bfpo prepare` writes them."""

    num_completions: int = Field(default=4, ge=2, description="number of completions per prompt; the paper takes 2")
    ranker: RankerConfig = Field(description="who says which of two completions of a prompt is more helpful")
    validation: float = Field(
        default=0.0, ge=0, lt=1, description="share of the prompts whose pairs are held out (the validation split)"
    )
    max_requests: int | None = Field(
        default=None,
        ge=1,
        description="most requests to servers, those sent again too, per start, of generation and of judging and "
        "ranking each; null = no limit",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals in the report")

    def unread_by_engine(self) -> frozenset[str]:
        """Return the keys that nobody reads with this engine; some are for the judges too."""
        return super().unread_by_engine() - {"threads", "max_requests"}

    def unread(self) -> frozenset[str]:
        """Leave out what needs several judges or a server, where there are none."""
        unread = set(super().unread())
        if len(self.judges) == 1:
            unread.add("rule")
        if not self.has_server() and self.engine != "server":
            unread.add("max_requests")
        return frozenset(unread)

    @model_validator(mode="after")
    def _no_key_in_vain(self) -> RedteamConfig:
        needed = {"rule": "several judges", "max_requests": "a url"}
        for name in sorted(self.unread() & self.model_fields_set & needed.keys()):
            raise ValueError(f"{name}: not read without {needed[name]}; leave it out")
        return self
