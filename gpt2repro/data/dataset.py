"""How a dataset is named: in a recipe's `datasets`, and by the recipe's own fields of one."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gpt2repro import UserError
from gpt2repro.system.command_line import place

Text = Annotated[str, Field(strict=True, min_length=1, pattern=r"^[^\x00]+$")]
Place = Annotated[Text, AfterValidator(place)]


class Dataset(BaseModel):
    """A dataset and its part in a run; the fields mean what they mean in a recipe.

    weight: of its tokens, in proportion to the weights of the others.
    epochs: passes over it, after which the others have its share; null repeats it.
    num_validation_units: null takes the recipe's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Place
    config: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    data_files: list[Place] | None = None
    text_column: Text = "text"
    document: Literal["file", "line"] | None = None
    weight: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 1.0
    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = None
    num_validation_units: Annotated[int, Field(ge=0, le=10**9)] | None = None

    @property
    def exact_weight(self) -> Fraction:
        """The weight as it is written, 0.1 being a tenth."""
        return Fraction(repr(self.weight))

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f" x {self.weight:g}"
        return f"{self.name} {self.config or ''}".rstrip() + weight


def named(fields: Mapping[str, Any]) -> Dataset:
    """A dataset by its fields.

    Raises:
        UserError: one line for all that is wrong with them.
    """
    try:
        return Dataset.model_validate(dict(fields))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError(f"datasets: {'; '.join(wrong)}") from None
