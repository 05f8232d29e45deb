"""The settings of a pre-flight. Imports neither torch nor megatron.core."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_mopd.settings import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Preflight(Section):
    """What is measured before a student is trained on teachers, and what decides whether it may be.

    No source publishes thresholds. "Rethinking on-policy distillation" (arXiv 2604.13016) finds 97 to 99% of the mass
    on the tokens that student and teacher share where distillation succeeds, and section 3.3.3 of the Nemotron 3 Ultra
    report warms up before it where support is poor. The defaults lie between pairs of examples/demo.yaml that distil
    well (shared masses of 0.96 and more, at most 0.26 of the prefixes implausible, overlap 0.7) and a teacher put on a
    domain that it was not trained for (0.86, 0.67, 0.63).
    """

    prompts: Literal["held_out", "train"] = "held_out"
    """Side of the data whose prompts the student completes."""
    samples: int = Field(default=128, gt=0)
    """Prompts of each domain, one rollout each."""
    top_k: int = Field(default=16, gt=0)
    """Likeliest tokens of student and teacher that are compared."""
    implausible_ratio: float = Field(default=1e-3, gt=0, lt=1)
    """A token is implausible to a teacher that gives it less than this times the student's probability, and a prefix
    is once it holds such a token."""
    candidates: dict[str, list[str]] = {}
    """Teacher -> domains it is measured on; those it serves for a teacher not named. Here teachers may share a domain;
    one that serves none, with ``domains: []``, is measured alone."""
    min_shared_mass: Share = 0.9
    """Warm up below: of the probability that student, or teacher, puts on its own likeliest tokens, the share on those
    that are among the other's too."""
    min_overlap: Share = 0.3
    """Warm up below: mean share of the teacher's likeliest tokens that are among the student's. Low by itself where a
    few tokens hold all mass and the rest of the ``top_k`` is noise."""
    max_implausible: Share = 0.5
    """Warm up above: share of prefixes that are implausible to the teacher."""
    max_disagreement: float = Field(default=0.1, gt=0)
    """Refuse above: largest difference, in nats, between two scorings of one token, in another order and other
    micro-batches. fp32 differs by 1e-4, bf16 by hundredths; more says that a score depends on what it is scored with.
    """
    max_conflict: float = Field(default=0.1, ge=0)
    """Mean Jensen-Shannon divergence, in nats (at most ln 2 = 0.69), from which two teachers that share a domain are
    said to conflict. It decides on no teacher by itself: one of them can still serve."""
