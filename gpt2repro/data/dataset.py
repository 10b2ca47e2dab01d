"""How a dataset is named: in a recipe's `datasets`, and by the recipe's own fields of one."""

from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2repro import UserError
from gpt2repro.system.command_line import place
from gpt2repro.system.text import wrong_fields

Text = Annotated[str, Field(strict=True, min_length=1, pattern=r"^[^\x00]+$")]
Place = Annotated[Text, AfterValidator(place)]


def split_at_commas(value: Any) -> Any:
    """A list, as the command line spells it."""
    return [item for item in value.split(",") if item] if isinstance(value, str) else value


def number(value: Any) -> Any:
    """YAML 1.1 reads 6e-4 as text, and Python takes True for 1."""
    if isinstance(value, bool):
        raise ValueError("it takes a number")
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value  # which is refused


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
    data_files: Annotated[list[Place], BeforeValidator(split_at_commas)] | None = None
    text_column: Text = "text"
    document: Literal["file", "line"] | None = None
    weight: Annotated[float, BeforeValidator(number), Field(gt=0, le=1e9, allow_inf_nan=False)] = (
        1.0
    )
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
    if not isinstance(fields, Mapping):
        raise UserError(
            f"datasets: {fields!r} is no mapping such as {{'name': ..., 'weight': ...}}"
        )
    try:
        name = fields.get("name")
        name = str(name) if isinstance(name, Path) else name
        return Dataset.model_validate({**fields, "name": name})
    except ValidationError as error:
        raise UserError(f"datasets: {wrong_fields(error)}") from None


def held_out_of(dataset: Dataset, num_validation_units: int | None) -> Dataset:
    """The dataset with this number, if it has none of its own."""
    if dataset.num_validation_units is not None:
        return dataset
    return dataset.model_copy(update={"num_validation_units": num_validation_units})
