# SPDX-License-Identifier: Apache-2.0
"""The part of a recipe that says how masks are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from spikenm_fx.errors import PlanError

if TYPE_CHECKING:
    from spikenm_fx.masks.methods import Method

__all__ = ["Closed", "MethodSpec"]


class Closed(BaseModel):
    """Strict, frozen, and no key that is not named here."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )


_JSON_PLAIN = {"type": ["number", "boolean", "string", "null"]}


class MethodSpec(Closed):
    """How the masks are learned."""

    name: str = Field(
        default="spikenm",
        description="spikenm, cyclical, regrow, activity, uticket, magnitude, srste, maskllm, "
        "random or dense",
    )
    total_steps: int | None = Field(
        default=None,
        gt=0,
        description="optimizer steps of the training; temperatures anneal over them",
    )
    options: dict[str, Annotated[Any, WithJsonSchema(_JSON_PLAIN)]] = Field(
        default_factory=dict,
        description="of the method, where its defaults are not wanted, e.g. {fade: 0.0} of "
        "spikenm for training that is N:M at every step",
    )
    seed: int = Field(default=0, description="of the sampling noise")

    # Methods lie above plans: imported only when a recipe is read.
    @field_validator("name", mode="after")
    @classmethod
    def _known(cls, value: str) -> str:
        from spikenm_fx.masks.methods import method_class

        try:
            method_class(value)
        except PlanError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("options", mode="after")
    @classmethod
    def _options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from spikenm_fx.masks.methods.options import wrong_options

        if "name" not in info.data:  # which is wrong itself
            return value
        wrong = wrong_options(info.data["name"], value, info.data.get("total_steps"))
        if wrong:
            # one mistake for each, with its place
            raise ValidationError.from_exception_data(
                cls.__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("value_error", "{text}", {"text": text}),
                        loc=(option,) if option else (),
                        input=value.get(option),
                    )
                    for option, text in wrong.items()
                ],
            )
        return value

    def made(self) -> Method:
        """The method, with its options."""
        from spikenm_fx.masks.methods import method_named

        return method_named(self.name, **self.options)
