"""Sections of a method that only some variants have: AdaLoRA's budget, a hybrid's second part."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from forgetting.sections.fields import Count, Name, NotNegative, Number, Positive, Share, Strict

_LAYERS = r"^(all|last [1-9][0-9]*)$"


class Budget(Strict):
    """AdaLoRA's budget: the mean rank falls from an initial one to `rank` (arXiv 2303.10512).

    Of all steps, the share `tinit` trains the initial rank, and the share `tfinal` at the end what
    is left of it; between them the budget falls with the cube of what is left of the time, and the
    singular values that matter least are set to 0. Initial rank, shares and interval are near those
    of the paper's runs; peft's own defaults are shares of 0.
    """

    initial_ratio: Annotated[Number, Field(gt=1, allow_inf_nan=False)] = Field(
        1.5, description="Initial rank of each adapter in multiples of `rank`, rounded up."
    )
    tinit: Share = Field(0.1, description="Share of the steps before the budget falls.")
    tfinal: Share = Field(0.5, description="Share of the steps after the budget has fallen.")
    every: Count = Field(1, description="Steps between two allocations of the budget (deltaT).")
    orthogonality: NotNegative = Field(
        0.5,
        description="Weight of the penalty that keeps A and B orthogonal: the mean over all of "
        "them of the Frobenius norm of A A^T - I or B^T B - I.",
    )

    @model_validator(mode="after")
    def _time_is_left(self) -> Budget:
        if self.tinit + self.tfinal >= 1:
            raise ValueError(
                "`tinit` and `tfinal` leave no time for the budget to fall; their sum "
                "must be less than 1"
            )
        return self

    @property
    def name(self) -> str:
        """What differs from the defaults: `tinit0.2-every10`."""
        changed = self.model_dump(exclude_defaults=True)
        return "-".join(f"{key.split('_')[0]}{value:g}" for key, value in changed.items())


def _layers_in_words(value: Any) -> Any:
    """Tell in one sentence what may be named; the types alone would tell it of each in turn."""
    words = isinstance(value, str) and re.fullmatch(_LAYERS, value)
    names = isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
    if not (words or names):
        raise ValueError(
            f"expected all, last N (such as last 4) or a list of names of modules, found {value!r}"
        )
    return value


class Then(Strict):
    """The second part of a hybrid: the adapter is merged, and chosen layers are trained in full.

    The course of the learning rate is one over both parts, with another peak in the second, where
    the optimizer starts afresh: its rate rises to that course in a warm-up as long as the first, or
    in half of what is left before a cooldown or the end, if that is shorter.
    """

    after: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the steps that train the adapter."
    )
    layers: Annotated[
        Annotated[str, Field(pattern=_LAYERS)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
        BeforeValidator(_layers_in_words),
    ] = Field(
        description="What is trained after that: `all`, the `last N` blocks, or modules by the end "
        "of their names, in which * stands for anything: `mlp`, `layers.3.self_attn`, `lm_head`."
    )
    learning_rate: Positive = Field(description="Peak learning rate of the second part.")
    suffix: Name | None = Field(
        None,
        description="Part of the method's name, in place of the one made of these settings.",
    )

    @property
    def layers_name(self) -> str:
        """The layers as part of a name: `last4`, `mlp-lm_head`."""
        if isinstance(self.layers, str):
            return self.layers.replace(" ", "")
        return "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", layer) for layer in self.layers)

    @property
    def name(self) -> str:
        """The end of the method's name: `last4-at0.5-lr1e-05`."""
        made = f"{self.layers_name}-at{self.after:g}-lr{self.learning_rate:g}"
        return self.suffix or made
